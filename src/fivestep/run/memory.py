"""The memory of this process, as torch tells it for CUDA, and the system (Linux) for the CPU. In bytes.

On the CPU only anonymous pages count: those of libraries and mapped files are not the run's. The allocator's own
habits are in it: what it keeps of freed memory, and what it reuses. Every function returns None where nobody tells.
"""

from pathlib import Path

import torch

STATUS, FORGET, SYSTEM = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")


def held(device: torch.device) -> int | None:
    """What is held now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _entry(STATUS, "RssAnon") if device.type == "cpu" else None


def forget_peak(device: torch.device) -> bool:
    """Let `peak_held` begin anew; False where that cannot be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        FORGET.write_text("5")  # proc(5): resets VmHWM
    except OSError:
        return False
    return device.type == "cpu"


def peak_held(device: torch.device) -> int | None:
    """The most that was held since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak, *mapped = (_entry(STATUS, name) for name in ("VmHWM", "RssFile", "RssShmem"))
    return None if peak is None or device.type != "cpu" else peak - sum(size or 0 for size in mapped)


def free(device: torch.device) -> int | None:
    """What can still be had without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _entry(SYSTEM, "MemAvailable") if device.type == "cpu" else None


def _entry(file: Path, name: str) -> int | None:
    """`name:  123 kB` in a file of the system."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)
