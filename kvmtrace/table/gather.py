"""Columns out of records: one field of many records, gathered from the buffer by NumPy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native import loaded
from kvmtrace.table.format_text import DATA_LOC, REL_LOC, STATIC, Field

if TYPE_CHECKING:
    from numpy.typing import NDArray

_START_DTYPES = (np.dtype(np.uint32), np.dtype(np.int64))  # what the compiled kernel takes
MAX_STRING = 4096  # of a dynamic string; longer ones are cut (PATH_MAX of the kernel)
MAX_DYNAMIC_BYTES = 1 << 28  # of one column of dynamic strings: the limit shrinks when there are many


def _gather_bytes(
    words: NDArray[np.uint32], start: NDArray[Any], offset: int, size: int, unit: int = 4
) -> NDArray[np.uint8]:
    """Return `size` bytes at byte `start * unit + offset`, shape (n, size); beyond the buffer its last byte repeats."""
    if size == 0 or not len(start):
        return np.zeros((len(start), size), np.uint8)
    kernel = loaded()
    if kernel is not None and len(words) and start.dtype in _START_DTYPES:
        return kernel.gather(words, start, offset, size, unit=unit)
    at = start.astype(np.int64, copy=False) * unit + offset
    out: NDArray[np.uint8] = words.view(np.uint8).take(at[:, None] + np.arange(size), mode="clip")
    return out


def _gather_words(words: NDArray[np.uint32], start: NDArray[Any], field: Field) -> NDArray[Any]:
    """Return a field of 4 or 8 bytes that begins at a multiple of 4; beyond the buffer its last word repeats."""
    kernel = loaded()
    if kernel is not None and len(words) and start.dtype in _START_DTYPES:
        return kernel.gather(words, start, field.offset, field.size, by_word=True).reshape(-1).view(field.dtype)
    at = start + (field.offset // 4)
    low: NDArray[Any] = words.take(at, mode="clip")
    if field.size == 4:
        return low.view(field.dtype)
    out = np.empty((len(start), 2), np.uint32)
    out[:, 0] = low
    at += 1
    out[:, 1] = words.take(at, mode="clip")
    return out.reshape(-1).view(field.dtype)


def _cut_strings(raw: NDArray[np.uint8]) -> NDArray[Any]:
    """Return rows of bytes as NUL-terminated strings: what stands behind the NUL is old memory."""
    size = raw.shape[1]
    if not size:
        return np.zeros(len(raw), "S1")
    ended = np.logical_or.accumulate(raw == 0, axis=1)
    raw[ended] = 0
    return np.ascontiguousarray(raw).reshape(-1).view(f"S{size}")


def _dynamic_range(
    words: NDArray[np.uint32], start: NDArray[np.int64], field: Field
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (byte position, length) of a dynamic array in each record."""
    where = _gather_bytes(words, start, field.offset, 4).reshape(-1).view("<u4").astype(np.int64)
    offset, length = where & 0xFFFF, where >> 16
    if field.place == REL_LOC:
        offset = offset + field.offset + field.size
    at = start * 4 + offset
    return at, np.clip(length, 0, np.maximum(len(words) * 4 - at, 0))


def _gather_dynamic(words: NDArray[np.uint32], start: NDArray[np.int64], field: Field) -> NDArray[Any]:
    """Return a dynamic array: strings as S, anything else as an object array of bytes."""
    at, length = _dynamic_range(words, start, field)
    if field.dtype.kind == "O":
        data = words.view(np.uint8)
        out = np.empty(len(start), object)
        out[:] = [data[a : a + n].tobytes() for a, n in zip(at.tolist(), length.tolist(), strict=True)]
        return out
    size = int(min(length.max(initial=1), MAX_STRING, max(MAX_DYNAMIC_BYTES // max(len(start), 1), 1)))
    raw = _gather_bytes(words, at, 0, size, unit=1)
    raw[np.arange(size) >= length[:, None]] = 0
    return _cut_strings(raw)


def _gather_to_end(words: NDArray[np.uint32], start: NDArray[np.int64], field: Field) -> NDArray[Any]:
    """Return strings that run to the end of their record (trace_marker text); they end with a NUL there."""
    size = int(min(1024, max(MAX_DYNAMIC_BYTES // max(len(start), 1), 1)))
    text = _cut_strings(_gather_bytes(words, start, field.offset, size))
    longest = int(np.char.str_len(text).max(initial=1))
    return text.astype(f"S{max(longest, 1)}")


def _as_values(raw: NDArray[np.uint8], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return rows of bytes, shape (n, size), as values."""
    if dtype.kind == "S":
        return _cut_strings(raw)
    if dtype.kind == "b":
        return np.not_equal(raw.reshape(-1), 0)
    values: NDArray[Any] = raw.reshape(-1).view(dtype.base)
    return values.reshape(len(raw), *dtype.shape)


def gather_field(words: NDArray[np.uint32], start: NDArray[Any], field: Field) -> NDArray[Any]:
    """Return one field of many records.

    Parameters
    ----------
    words : the buffer as little-endian u32
    start : shape (n,), word index of each record's first byte
    field : Field; its place may be nonsense, then the values are too, but nothing outside the buffer is read

    Returns
    -------
    ndarray, shape (n,) or (n, items) of the field's dtype
    """
    if (
        field.place == STATIC
        and field.size in (4, 8)
        and field.offset % 4 == 0
        and not field.dtype.shape
        and field.dtype.kind in "iu"
    ):
        return _gather_words(words, start, field)
    if field.place == STATIC:
        return _as_values(_gather_bytes(words, start, field.offset, field.size), field.dtype)
    start = start.astype(np.int64, copy=False)
    return (_gather_dynamic if field.place in (DATA_LOC, REL_LOC) else _gather_to_end)(words, start, field)
