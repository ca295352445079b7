"""Arrow columns as NumPy values, without a copy where there is none to make.

Their buffers are read as they are: Arrow's own conversions import pandas, which takes longer than reading a million
rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


def field_values(column: pa.ChunkedArray, dtype: np.dtype[Any], rows: NDArray[np.intp] | None) -> NDArray[Any]:
    """Return a field's column at these rows (None: all of them) as NumPy values.

    Parameters
    ----------
    column : of the type that arrow_type(dtype) gives

    Raises
    ------
    ValueError, pyarrow.ArrowException
        The column does not hold such values, or not as many.
    """
    if not pa.types.is_fixed_size_binary(column.type) and dtype.kind in "SO":
        return _object_values(column if rows is None else column.take(_indices(rows)), dtype)
    values = number_values(column)
    if values.ndim > 1:
        values = values.reshape(-1).view(dtype.base).reshape(len(column), *dtype.shape)
    return (values if rows is None else values[rows]).astype(dtype.base, copy=False)


def number_values(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return numbers, booleans (uint8) or arrays of bytes (uint8, shape (n, size)); nulls have some value, too."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    dtype, shape, size = _layout(column.type)
    parts = []
    for chunk in column.chunks:
        data, n = chunk.buffers()[1], len(chunk) * int(np.prod(shape, dtype=np.int64))
        parts.append((np.zeros(n, dtype) if data is None else np.frombuffer(data, dtype, n, chunk.offset * size))
                     .reshape(len(chunk), *shape))
    return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty((0, *shape), dtype)])


def _layout(kind: pa.DataType) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """Return (dtype, shape, bytes) of a value as it stands in the buffer."""
    size = kind.bit_width // 8
    if pa.types.is_fixed_size_binary(kind):
        return np.dtype(np.uint8), (size,), size
    return np.dtype(kind.to_pandas_dtype()), (), size


def kind_numbers(column: pa.ChunkedArray, index: Mapping[str, int]) -> NDArray[np.uint16]:
    """Return the number of each event's kind.

    Parameters
    ----------
    column : strings, or a dictionary of them
    index : name -> number

    Raises
    ------
    LookupError
        There are names that the file does not describe.
    """
    parts = [np.empty(0, np.uint16)]
    for chunk in column.chunks:
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        numbers = np.array([index[n] for n in encoded.dictionary.to_pylist()] or [0], np.uint16)
        parts.append(numbers[number_values(pa.chunked_array([encoded.indices]))])
    return np.concatenate(parts)


def _indices(rows: NDArray[np.intp]) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows, np.int64))])


def _object_values(column: pa.ChunkedArray, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return strings or bytes of any length as NumPy values."""
    if column.null_count:
        raise ValueError("an event without a value")
    n = len(column)
    if dtype.kind == "O":
        return np.array([*column.to_pylist(), None], object)[:-1]
    values = np.array([v.encode() for v in column.to_pylist()] or [b""], "S")[:n]
    return values.astype(dtype) if dtype.itemsize else values
