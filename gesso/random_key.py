"""Chance without state: one integer hash, the same for Python integers, numpy arrays and torch tensors.

Every sample of a run has a key = ``fold(seed, global sample number)``, carried by ``ImageBatch.key``. Whoever needs
chance for a sample hashes that key with the name of a stream and an element index:

    uniform(batch.key[:, None], stream("anchor"), index[None, :])       # (B, N) float in [0, 1)

So a random choice depends on nothing but (seed, sample number, stream, element): not on the image id, the rank, the
number of workers, or the order in which things ran.

The mixing function is a 32-bit finaliser (two xor-shift-multiply rounds whose constants are below 2**31), computed in
64-bit integers; no product exceeds 2**63, so it is exact and equal in Python, numpy int64 and torch int64, on the CPU,
on a GPU and inside a compiled graph. This module needs no import: the operators do the work.
"""

import zlib
from typing import Any

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def _mix(x: Any) -> Any:
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def fold(key: Any, *words: Any) -> Any:
    """Hashes ``key`` with each of ``words`` in turn; all are integers, int64 arrays or int64 tensors, and broadcast.

    Returns values in [0, 2**32) of the broadcast type. Both halves of a 64-bit word count.
    """
    h = _mix((key ^ (key >> 32)) & _MASK)
    for word in words:
        low = word & _MASK
        high = (word >> 32) & _MASK
        h = _mix(((h ^ low) + _GOLDEN) & _MASK)
        h = _mix(((h + high) & _MASK) ^ 0x5BD1E995)
    return h


def stream(name: str) -> int:
    """The number of a named stream of chance: ``stream("flip")``; call it once, at import."""
    return zlib.crc32(name.encode())


def uniform(key: Any, *words: Any) -> Any:
    """Uniform numbers in [0, 1) with 24 bits, from the same arguments as ``fold``.

    float64 for Python and numpy, float32 for torch: the same numbers exactly, since 24 bits fit either.
    """
    return (fold(key, *words) >> 8) * (1.0 / (1 << 24))


def integer(key: Any, *words: Any, high: int) -> Any:
    """Integers in [0, high), from the same arguments as ``fold``; ``high`` is at most 2**31."""
    return (fold(key, *words) * high) >> 32
