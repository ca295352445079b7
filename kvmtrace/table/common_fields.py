"""The fields every ftrace record begins with: type, flags, preempt count, pid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.table.format_text import STATIC
from kvmtrace.table.gather import gather_field

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kvmtrace.table.format_text import Field

# the layout of every kernel of the last fifteen years: two words
_USUAL = {"common_type": (0, 2), "common_flags": (2, 1), "common_preempt_count": (3, 1), "common_pid": (4, 4)}
_DTYPES = {"common_type": np.uint16, "common_flags": np.uint8, "common_preempt_count": np.uint8, "common_pid": np.int32}


def has_usual_common(common: Mapping[str, Field]) -> bool:
    """Say whether the common fields lie where every kernel puts them ({}: nothing else is known)."""
    return all(n not in common or (common[n].offset, common[n].size) == place for n, place in _USUAL.items())


def _is_number(field: Field) -> bool:
    return field.dtype.kind in "iub" and not field.dtype.shape and field.place == STATIC


def gather_common(
    words: NDArray[np.uint32], start: NDArray[Any], common: Mapping[str, Field]
) -> tuple[NDArray[np.uint16], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int32]]:
    """Return (type, flags, preempt count, pid) of records.

    Parameters
    ----------
    words : the buffer as little-endian u32
    start : shape (n,), word index of each record
    common : the common fields as a format file gives them; {} for the usual layout
    """
    if has_usual_common(common):
        first = np.ascontiguousarray(words.take(start, mode="clip")).view(np.uint8).reshape(-1, 4)
        pid = words.take(start + 1, mode="clip").view(np.int32)
        return first[:, :2].copy().view(np.uint16).reshape(-1), first[:, 2].copy(), first[:, 3].copy(), pid
    columns = [
        gather_field(words, start, common[n]).astype(dtype)
        if n in common and _is_number(common[n])
        else np.zeros(len(start), dtype)
        for n, dtype in _DTYPES.items()
    ]
    return columns[0], columns[1], columns[2], columns[3]
