"""The bytes of one field of many records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native._loops import lib
from kvmtrace._native.arrays import filled, given, words_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_START_DTYPES = (np.dtype(np.uint32), np.dtype(np.int64))


def gather(
    words: NDArray[np.uint32],
    start: NDArray[Any],
    offset: int,
    size: int,
    *,
    unit: int = 4,
    by_word: bool = False,
) -> NDArray[np.uint8]:
    """Return `size` bytes at byte `start * unit + offset` of the buffer for each start, shape (n, size).

    Parameters
    ----------
    words : the buffer as little-endian u32; where it is empty there are only zeros
    start : integers, shape (n,)
    by_word : beyond the buffer's end its last word repeats, not its last byte
    """
    n = len(start)
    if not n or not size or not len(words):
        return np.zeros((n, size), np.uint8)
    if start.dtype not in _START_DTYPES:
        start = start.astype(np.int64)
    start = np.ascontiguousarray(start)
    out = np.empty((n, size), np.uint8)
    wide = start.itemsize == 8
    lib.gather_bytes(words_of(words), given(start), wide, n, unit, offset, size, by_word, filled(out))
    return out
