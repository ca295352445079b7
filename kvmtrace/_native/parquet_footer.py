"""The column chunks that the footer of a Parquet file describes.

pyarrow gives them one by one as objects, and ends the whole process (std::terminate) over one that contradicts itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace._native._loops import lib
from kvmtrace._native.arrays import filled, given

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TAIL = 8  # bytes: the footer's length and PAR1


def column_chunks(data: memoryview, n_groups: int, n_columns: int) -> NDArray[np.int64]:
    """Return what a file's footer tells of its column chunks.

    Parameters
    ----------
    data : the file

    Returns
    -------
    int64, shape (n_groups, n_columns, 4): codec, bytes in the file, offset of the first data page, offset of the
    dictionary page; -1 for what is not told

    Raises
    ------
    ValueError
        It has no such footer.
    """
    end = len(data) - _TAIL
    size = int.from_bytes(data[end : end + 4], "little") if end >= 0 else 0
    if not 0 < size <= end:
        raise ValueError("no footer")
    if n_groups * n_columns > size:  # each takes a byte at least
        raise ValueError(f"{n_groups} row groups of {n_columns} columns in a footer of {size} bytes")
    chunks = np.empty((n_groups, n_columns, 4), np.int64)
    footer = np.frombuffer(data, np.uint8, size, end - size)
    if lib.read_column_chunks(given(footer), size, n_groups, n_columns, filled(chunks)):
        raise ValueError("a footer that contradicts itself")
    return chunks
