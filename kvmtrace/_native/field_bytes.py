"""The bytes of fields of many records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native._loops import ffi, lib
from kvmtrace._native.arrays import filled, given, words_of

if TYPE_CHECKING:
    from collections.abc import Sequence

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


def gather_many(
    words: NDArray[np.uint32], start: NDArray[Any], places: Sequence[tuple[int, int, bool]]
) -> list[NDArray[np.uint8]]:
    """Return what gather() does for several fields, looking at each record once.

    Parameters
    ----------
    places : (offset, size, by_word) of each field, none of no size
    """
    n = len(start)
    if not n or not len(words):
        return [np.zeros((n, size), np.uint8) for _, size, _ in places]
    if start.dtype not in _START_DTYPES:
        start = start.astype(np.int64)
    start = np.ascontiguousarray(start)
    out = [np.empty((n, size), np.uint8) for _, size, _ in places]
    fields = ffi.new("FieldPlace[]", len(places))
    for i, (offset, size, by_word) in enumerate(places):
        fields[i].offset, fields[i].size, fields[i].by_word = offset, size, by_word
        fields[i].out = filled(out[i])
    lib.gather_fields(words_of(words), given(start), start.itemsize == 8, n, fields, len(places))
    return out
