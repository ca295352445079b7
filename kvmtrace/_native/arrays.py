"""Arrays as C sees them: a pointer of the type that the prototype asks for, or an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native._loops import ffi

if TYPE_CHECKING:
    from numpy.typing import NDArray

_C_TYPES = {
    np.dtype(dtype): f"{name}[]"
    for dtype, name in (
        (np.bool_, "uint8_t"),
        (np.uint8, "uint8_t"),
        (np.int16, "int16_t"),
        (np.uint16, "uint16_t"),
        (np.int32, "int32_t"),
        (np.uint32, "uint32_t"),
        (np.int64, "int64_t"),
        (np.uint64, "uint64_t"),
        (np.float64, "double"),
    )
}


def given(array: NDArray[Any]) -> Any:
    """Return a pointer to an array that C reads; its values must lie one behind the other."""
    return ffi.from_buffer(_C_TYPES[array.dtype], array)


def filled(array: NDArray[Any]) -> Any:
    """Return a pointer to an array that C writes to."""
    return ffi.from_buffer(_C_TYPES[array.dtype], array, require_writable=True)


def words_of(words: NDArray[np.uint32]) -> Any:
    """Return a buffer of little-endian u32 as C's `Words`; the array must outlive it."""
    found = ffi.new("Words *")
    found.words, found.n_words = given(words), len(words)
    return found[0]
