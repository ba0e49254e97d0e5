"""Makes `checkpoint-v4`: a checkpoint with every kind of state in it, by this version's own writer.

    python -m tests.golden.make tests/golden/checkpoint-v4

Once a version is out its file stays as it is: later versions must read it. `STATE` is what they must find in it.
"""

import math
import sys
from pathlib import Path

import torch

from fivestep.run.checkpoint import save_checkpoint

STEP, VAL_LOSS = 7, 0.125


def f32(*values):
    return torch.tensor(values, dtype=torch.float32)


CLOCK = {"step": 7, "epoch": 1, "samples": 42, "tokens": 336, "seconds": 1.5, "waiting": 0.25}
PYTHON = {"version": 3, "words": [*range(624), 624], "gauss": None}
NUMPY = {
    "bit_generator": "MT19937",
    "state": {"key": torch.arange(624, dtype=torch.int32), "pos": 624},
    "has_gauss": 1,
    "gauss": -0.5,
}
TORCH = torch.arange(16, dtype=torch.uint8)
RANDOM = {"python": PYTHON, "numpy": NUMPY, "torch": TORCH, "cuda": [], "mps": None}
TIED = f32(1.0, -2.0, math.inf)
WEIGHTS = {
    "encoder": TIED,
    "decoder": TIED,
    "half": torch.tensor([0.5, -1.5], dtype=torch.bfloat16),
    "count": torch.tensor(3),
    "nothing": torch.zeros(0, 4),
    "mask": torch.tensor([[True, False]]),
}
MOMENTS = {0: {"step": torch.tensor(7.0), "exp_avg": f32(0.1, 0.2, 0.3), "exp_avg_sq": f32(0.01, 0.02, 0.03)}}
STATE = {
    "model": {**WEIGHTS, "half": torch.tensor([0.25, -1.25], dtype=torch.bfloat16)},  # beside the averaged ones
    "optimizers": [
        {
            "state": MOMENTS,
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "amsgrad": False, "foreach": None, "params": [0]}],
        }
    ],
    "schedulers": [{"last_epoch": 7, "_last_lr": [0.000125], "base_lrs": [1e-3], "_is_initial": False}],
    "criterion": {"weight": f32(0.5)},
    "clock": CLOCK,
    "position": 3,
    "carry": (f32(0.0, -0.0), [f32(math.nan), None], {"cell": f32(1e-45)}),
    "epoch_loss": {"total": 8.25, "weight": 24.0, "entries": 3},
    "logged_loss": {"total": 0.0, "weight": 0.0, "entries": 0},
    "data": {
        "kind": "loader",
        "ways": {"seed_once": False, "iterated_twice": True},
        "lazy": True,
        "seed": 2**62 + 1,
        "start": {"random": RANDOM, "generators": {"sampler.generator": TORCH}, "seed": None, "sampler": None},
        "generators": {
            "dataset.own": {
                "bit_generator": "PCG64",
                "state": {"state": 2**127 + 5, "inc": 2**126 + 1},
                "has_uint32": 0,
                "uinteger": 0,
            }
        },
        "sampler": {"sampler": {"yielded": 6}, "track": None, "ahead": [[4, 5], [6]], "drawn": 5, "handed": 3},
    },
    "plateau": {
        "best_loss": 0.125,
        "since_best": 1,
        "since_annealed": 1,
        "annealing": 0.25,
        "best": {
            "model": {"encoder": f32(9.0, 8.0, 7.0)},
            "criterion": {"weight": f32(0.75)},
            "optimizers": [MOMENTS],
            "average": {"updates": 5, "weights": [f32(4.0)]},
        },
    },
    "average": {"updates": 7, "weights": [f32(1.0, -2.0, 3.0)]},
    "loss_scale": {"scale": 65536.0, "good_steps": 7},
    "last": {
        "step": 7,
        "epoch": 2,
        "loss": torch.tensor(2.75),
        "count": 8,
        "grad_norm": torch.tensor(1.25),
        "learning_rate": 0.000125,
    },
    "told": {**CLOCK, "step": 5},
    "skipped": [{"epoch": 0, "position": 4, "batches": 2, "step": 3, "loss": math.nan, "grad_norm": math.inf}],
    "random": RANDOM,
    "run": {"metrics": 1234, "best": 0.125},
    "other": {
        "bytes": b"\x00\xff$",
        "text": "\u0000 \ud800 é \u2028",
        "$odd": -(2**70),
        (3.5): True,
        None: [],
        "e": (),
    },
}


if __name__ == "__main__":
    save_checkpoint(Path(sys.argv[1]), WEIGHTS, STATE, STEP, VAL_LOSS)
