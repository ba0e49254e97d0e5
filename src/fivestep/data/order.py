"""The order of our own streams: a pure function of `(seed, epoch, position)`, in constant memory.

Owns a keyed permutation of `range(n)`, draws with replacement, an interleaving of sources, and a reader that serves
the first two a batch at a time. Knows nothing of tokens, windows or rows, and never of how many workers or processes
read. All of it is integer arithmetic on bit streams that numpy keeps stable, so an order outlives numpy's versions.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from fivestep.errors import UsageError

Int64Array = npt.NDArray[np.int64]
UInt64Array = npt.NDArray[np.uint64]

BLOCK = 4096  # positions computed at a time: numpy's cost per call, shared by many batches
ROUNDS = 8  # of the Feistel network
MIN_BITS = 6  # a network over fewer bits favours some permutations
_ADD_PRIME, _MIX_PRIME = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)  # from splitmix64


def permuted(positions: npt.NDArray[np.integer], n: int, seed: int, epoch: int) -> Int64Array:
    """Where a permutation of `range(n)`, keyed by `(seed, epoch)`, sends each of `positions`.

    A Feistel network permutes the smallest power of two that holds `n`; results of `n` or more walk on
    through it until they fall below `n` (cycle-walking; Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002). At most half of them do, so a position costs less than two passes on average.

    positions: any shape, each in [0, n). Returns int64 of that shape. Raises IndexError outside the range,
    UsageError when `n` is below 1 or the seed is negative.
    """
    keys = _keys(n, seed, epoch, ROUNDS)
    if positions.size and (positions.min() < 0 or positions.max() >= n):
        raise IndexError(f"positions must lie in [0, {n}); got {positions.min()} to {positions.max()}")
    if n == 1:
        return np.zeros(positions.shape, np.int64)
    bits = max(MIN_BITS, (n - 1).bit_length())
    values = _feistel(positions.astype(np.uint64).ravel(), bits, keys)
    outside = np.flatnonzero(values >= n)
    while outside.size:
        again = _feistel(values[outside], bits, keys)
        values[outside] = again
        outside = outside[again >= n]
    return values.astype(np.int64).reshape(positions.shape)


def interleaved(shares: Sequence[int], block: int, seed: int) -> Int64Array:
    """Which of several sources each position of a block takes: source i at exactly `shares[i]` of them.

    The positions of a block are permuted, keyed by `(seed, block)`; the first `shares[0]` of the permuted ones are
    source 0's, the next `shares[1]` source 1's, and so on. Returns int64 [sum(shares)]. Raises as `permuted`.
    """
    n = sum(shares)
    return np.searchsorted(np.cumsum(shares), permuted(np.arange(n), n, seed, block), side="right").astype(np.int64)


def drawn(start: int, stop: int, n: int, seed: int, epoch: int) -> Int64Array:
    """Uniform draws from `range(n)`, with replacement, for the positions start .. stop - 1.

    A draw depends on its own position alone: Philox, a counter-based generator, is set to the block of
    BLOCK positions that holds it (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
    The remainder's bias is n / 2**64, below 1e-7 for n up to 2**40. Returns int64 [stop - start].
    """
    key = _keys(n, seed, epoch, 2)
    first, last = start // BLOCK, -(-stop // BLOCK)
    if stop <= start:
        return np.empty(0, np.int64)
    # The second word of the 256-bit counter is the block's number, so no two blocks meet.
    blocks = [np.random.Philox(key=key, counter=[0, b, 0, 0]).random_raw(BLOCK) for b in range(first, last)]
    raw = np.concatenate(blocks)[start - first * BLOCK : stop - first * BLOCK]
    return (raw % np.uint64(n)).astype(np.int64)


def read(
    n: int,
    batch_size: int,
    seed: int,
    epoch: int,
    *,
    start: int = 0,
    stop: int | None = None,
    replacement: bool = False,
) -> Iterator[Int64Array]:
    """Indices below `n` for the positions start .. stop - 1 of an epoch: int64 [batch_size], the last short.

    `stop` defaults to `n`. Computes about BLOCK positions at once and hands out slices of them, so a batch
    of 32 costs about a microsecond, and a seek to any `start` costs the same as starting at 0.
    """
    stop = n if stop is None else stop
    stride = batch_size * max(1, BLOCK // batch_size)
    for begin in range(start, stop, stride):
        end = min(begin + stride, stop)
        if replacement:
            indices = drawn(begin, end, n, seed, epoch)
        else:
            indices = permuted(np.arange(begin, end), n, seed, epoch)
        for at in range(0, end - begin, batch_size):
            yield indices[at : at + batch_size]


def _keys(n: int, seed: int, epoch: int, count: int) -> UInt64Array:
    if n < 1:
        raise UsageError(f"an order needs at least 1 item, but there are {n}; give more data with --data")
    if seed < 0 or epoch < 0:
        raise UsageError(f"--seed and the epoch must be 0 or more; got seed {seed}, epoch {epoch}")
    return np.random.SeedSequence([seed, epoch]).generate_state(count, np.uint64).astype(np.uint64)


def _feistel(values: UInt64Array, bits: int, keys: UInt64Array) -> UInt64Array:
    """A permutation of the `bits`-bit numbers: each round XORs one half with a hash of the other."""
    low_bits = bits // 2
    high_bits = bits - low_bits
    high, low = values >> np.uint64(low_bits), values & np.uint64((1 << low_bits) - 1)
    for even_key, odd_key in zip(keys[::2], keys[1::2], strict=True):
        high = high ^ _hashed(low, even_key, high_bits)
        low = low ^ _hashed(high, odd_key, low_bits)
    return (high << np.uint64(low_bits)) | low


def _hashed(values: UInt64Array, key: np.uint64, bits: int) -> UInt64Array:
    """The top `bits` bits of a multiply-shift-multiply hash, after splitmix64 (Steele et al., 2014)."""
    mixed = (values ^ key) * _ADD_PRIME
    mixed ^= mixed >> np.uint64(32)
    mixed *= _MIX_PRIME
    return mixed >> np.uint64(64 - bits)
