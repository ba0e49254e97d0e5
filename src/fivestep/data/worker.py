"""Work on blocks of text, in order: in this process, or in several of our own program beside it.

    frames on the worker's standard input: the task as JSON, then a block of UTF-8 each
    frames on its standard output: an answer each, in the same order

Owns the workers and their protocol: no pickle, no fork, and no import of the caller's script, which so needs no
`__main__` guard. A worker ends when its input does, or its parent, however that died. What a task does is the
tokenizer's.
"""

import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import msgspec
import numpy as np

from fivestep import errors
from fivestep.data.bpe import learnable
from fivestep.data.sources import keep_freed_memory
from fivestep.data.tokenizer import Ids, Tokenizer, count_words, from_json, learn_pairs
from fivestep.errors import FivestepError, UsageError

MOST_WORKERS = 4  # by default, for the sake of memory: each has the vocabulary
_HEAD = struct.Struct("<cQ")  # of a frame: its kind, the length of what follows
_DATA, _END, _REFUSED = b"+", b".", b"!"

Work = Callable[[str], bytes]


def default_workers() -> int:
    """One for each core that this process may use, up to `MOST_WORKERS`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS)


def counted(blocks: Iterable[str], workers: int) -> Generator[dict[str, int], None, None]:
    """`count_words` of each block, in order; in this process where `workers` is 1."""
    if workers <= 1:
        yield from map(count_words, blocks)
    else:
        yield from map(msgspec.json.decode, _mapped({"count": "words"}, blocks, workers))


def encoded(tokenizer: Tokenizer, blocks: Iterable[str], workers: int) -> Generator[Ids, None, None]:
    """The ids of each block, which leaves its last line open, in order; in this process where `workers` is 1."""
    if workers <= 1:
        yield from map(tokenizer.encode_prompt, blocks)
    else:
        answers = _mapped({"encode": tokenizer.to_json()}, blocks, workers)
        yield from (np.frombuffer(ids, tokenizer.dtype) for ids in answers)


def learned(blocks: Iterable[str], min_count: int, max_vocabulary: int | None, beside: bool) -> Tokenizer:
    """Byte pairs learned from blocks that cut no token; `beside`: in a process that a Ctrl-C can end at once."""
    if not beside:
        return learn_pairs(blocks, min_count, max_vocabulary)
    with _started({"learn": [min_count, max_vocabulary]}, 1) as (worker,):
        for block in learnable(blocks):
            worker.send(_DATA, block.encode())
        return from_json(json.loads(worker.ask(_END, b"")))


def _mapped(task: dict[str, Any], blocks: Iterable[str], workers: int) -> Iterator[bytes]:
    with _started(task, workers) as started, ThreadPoolExecutor(workers) as threads:
        idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in started:
            idle.put(worker)

        def ask(block: str) -> bytes:
            worker = idle.get()
            try:
                return worker.ask(_DATA, block.encode())
            finally:
                idle.put(worker)

        asked: deque[Future[bytes]] = deque()
        try:
            for block in blocks:
                asked.append(threads.submit(ask, block))
                if len(asked) > workers:  # one waits while each has one: memory stays bounded
                    yield asked.popleft().result()
            while asked:
                yield asked.popleft().result()
        except BaseException:
            for future in asked:
                future.cancel()
            for worker in started:
                worker.kill()  # so that no thread waits for an answer any more
            raise


class Worker:
    """A process that answers frames; the parent's end."""

    def __init__(self, task: dict[str, Any]) -> None:
        package = str(Path(errors.__file__).parents[1])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fivestep.data.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # a Ctrl-C reaches the parent alone, which ends its workers
        )
        self.send(_DATA, json.dumps(task).encode())

    def send(self, kind: bytes, data: bytes) -> None:
        assert self.process.stdin is not None
        try:
            _write(self.process.stdin, kind, data)
        except BrokenPipeError:
            raise self._ended() from None

    def ask(self, kind: bytes, data: bytes) -> bytes:
        """The answer to a frame. Raises UsageError as the worker did, FivestepError where it ended."""
        self.send(kind, data)
        assert self.process.stdout is not None
        answer = _read(self.process.stdout)
        if answer is None:
            raise self._ended()
        if answer[0] == _REFUSED:
            raise UsageError(answer[1].decode())
        return answer[1]

    def _ended(self) -> FivestepError:
        """Why it takes no frame, or gives no answer: what it refused, else its exit code."""
        assert self.process.stdout is not None
        last = _read(self.process.stdout)
        if last is not None and last[0] == _REFUSED:
            return UsageError(last[1].decode())
        return FivestepError(
            f"a worker of the preparation ended early, with code {self.process.wait()}; "
            "where memory ran out, `fivestep data make` with --workers 1 needs the least"
        )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()


@contextmanager
def _started(task: dict[str, Any], number: int) -> Iterator[list[Worker]]:
    """Workers with a task, ended when the block ends, well or not."""
    workers: list[Worker] = []
    try:
        for _ in range(number):
            workers.append(Worker(task))
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.close()


def _write(file: IO[bytes], kind: bytes, data: bytes) -> None:
    file.write(_HEAD.pack(kind, len(data)))
    file.write(data)
    file.flush()


def _read(file: IO[bytes]) -> tuple[bytes, bytes] | None:
    """A frame's kind and data; None at the end."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    kind, length = _HEAD.unpack(head)
    data = file.read(length)
    return (kind, data) if len(data) == length else None


def serve(incoming: IO[bytes], outgoing: IO[bytes]) -> None:
    """The worker's end: answer every frame until there are no more. What is refused is said to the parent."""
    first = _read(incoming)
    if first is None:
        return
    try:
        _serve(json.loads(first[1]), incoming, outgoing)
    except UsageError as error:
        _write(outgoing, _REFUSED, str(error).encode())


def _serve(task: dict[str, Any], incoming: IO[bytes], outgoing: IO[bytes]) -> None:
    if "learn" in task:
        with suppress(EOFError):
            pairs = learn_pairs(_blocks(incoming), *task["learn"])
            _write(outgoing, _DATA, json.dumps(pairs.to_json()).encode())
        return
    work = _work(task)
    while (frame := _read(incoming)) is not None:
        try:
            _write(outgoing, _DATA, work(frame[1].decode()))
        except UsageError as error:
            _write(outgoing, _REFUSED, str(error).encode())


def _blocks(incoming: IO[bytes]) -> Iterator[str]:
    """The blocks up to the end that the parent sends. Raises EOFError where the parent ended without one."""
    while (frame := _read(incoming)) is not None:
        if frame[0] == _END:
            return
        yield frame[1].decode()
    raise EOFError


def _end_with_parent(parent: int) -> None:
    """End this process once its parent is another: the one that started it has died. Learning reads no input."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _work(task: dict[str, Any]) -> Work:
    if "count" in task:
        return lambda text: msgspec.json.encode(count_words(text))
    tokenizer = from_json(task["encode"])
    return lambda text: tokenizer.encode_prompt(text).tobytes()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    if os.name == "posix":  # elsewhere the parent's id never changes
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    with suppress(BrokenPipeError):
        serve(sys.stdin.buffer, sys.stdout.buffer)
