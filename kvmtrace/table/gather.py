"""Columns out of records: one field of many records, gathered from the buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native import field_bytes
from kvmtrace.table.format_text import DATA_LOC, REL_LOC, STATIC, Field

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

MAX_STRING = 4096  # of a dynamic string; longer ones are cut (PATH_MAX of the kernel)
MAX_DYNAMIC_BYTES = 1 << 28  # of one column of dynamic strings: the limit shrinks when there are many


def _gather_words(words: NDArray[np.uint32], start: NDArray[Any], field: Field) -> NDArray[Any]:
    """Return a field of 4 or 8 bytes that begins at a multiple of 4."""
    found: NDArray[Any] = field_bytes.gather(words, start, field.offset, field.size, by_word=True)
    return found.reshape(-1).view(field.dtype)


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
    where = field_bytes.gather(words, start, field.offset, 4).reshape(-1).view("<u4").astype(np.int64)
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
    raw = field_bytes.gather(words, at, 0, size, unit=1)
    raw[np.arange(size) >= length[:, None]] = 0
    return _cut_strings(raw)


def _gather_to_end(words: NDArray[np.uint32], start: NDArray[np.int64], field: Field) -> NDArray[Any]:
    """Return strings that run to the end of their record (trace_marker text); they end with a NUL there.

    Of arguments in binary form (bprint) nothing says where they end: they are left out.
    """
    if field.dtype.kind == "O":
        return np.array([b""] * len(start), object)
    size = int(min(1024, max(MAX_DYNAMIC_BYTES // max(len(start), 1), 1)))
    text = _cut_strings(field_bytes.gather(words, start, field.offset, size))
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


def _is_words(field: Field) -> bool:
    """Say whether a field is a number of 4 or 8 bytes at a multiple of 4."""
    aligned = field.place == STATIC and field.size in (4, 8) and field.offset % 4 == 0
    return aligned and not field.dtype.shape and field.dtype.kind in "iu"


def gather_fields(words: NDArray[np.uint32], start: NDArray[Any], fields: Sequence[Field]) -> list[NDArray[Any]]:
    """Return what gather_field() does of each of several fields; those of a fixed place are read together."""
    together = [field for field in fields if field.place == STATIC and field.size]
    places = [(field.offset, field.size, _is_words(field)) for field in together]
    raw = dict(zip((field.name for field in together), field_bytes.gather_many(words, start, places), strict=True))
    return [
        gather_field(words, start, field)
        if field.name not in raw
        else raw[field.name].reshape(-1).view(field.dtype)
        if _is_words(field)
        else _as_values(raw[field.name], field.dtype)
        for field in fields
    ]


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
    if _is_words(field):
        return _gather_words(words, start, field)
    if field.place == STATIC:
        return _as_values(field_bytes.gather(words, start, field.offset, field.size), field.dtype)
    start = start.astype(np.int64, copy=False)
    return (_gather_dynamic if field.place in (DATA_LOC, REL_LOC) else _gather_to_end)(words, start, field)
