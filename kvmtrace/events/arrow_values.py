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

    Raises
    ------
    ValueError, TypeError, AttributeError, pyarrow.ArrowException
        The column does not hold such values.
    """
    if pa.types.is_fixed_size_binary(column.type):
        arrays = _array_values(column, dtype)
        return arrays if rows is None else arrays[rows]
    if dtype.kind in "SO" or dtype.shape or dtype.kind == "V":
        return _object_values(column if rows is None else column.take(_indices(rows)), dtype)
    values = number_values(column)
    return (values if rows is None else values[rows]).astype(dtype, copy=False)


def number_values(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return numbers or booleans of the column's own type; values stand in place also where they are null."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    dtype, size = np.dtype(column.type.to_pandas_dtype()), column.type.bit_width // 8
    parts = []
    for chunk in column.chunks:
        data = chunk.buffers()[1]
        parts.append(np.zeros(len(chunk), dtype) if data is None
                     else np.frombuffer(data, dtype, len(chunk), chunk.offset * size))
    return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, dtype)])


def kind_numbers(column: pa.ChunkedArray, index: Mapping[str, int]) -> NDArray[np.uint16]:
    """Return the number of each event's kind.

    Parameters
    ----------
    index : name -> number

    Raises
    ------
    KeyError, ValueError, pyarrow.ArrowException
        There are names that the file does not describe, or something else than names.
    """
    parts = [np.empty(0, np.uint16)]
    for chunk in column.chunks:
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        numbers = np.array([index[n] for n in encoded.dictionary.to_pylist()] or [0], np.uint16)
        parts.append(numbers[number_values(pa.chunked_array([encoded.indices]))])
    return np.concatenate(parts)


def _indices(rows: NDArray[np.intp]) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), len(rows), [None, pa.py_buffer(np.ascontiguousarray(rows, np.int64))])


def _array_values(column: pa.ChunkedArray, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return arrays of one size; like numbers they stand in place also where they are null."""
    size = column.type.bit_width // 8
    parts = []
    for chunk in column.chunks:
        data = chunk.buffers()[1]
        parts.append(np.zeros(len(chunk) * size, np.uint8) if data is None
                     else np.frombuffer(data, np.uint8, len(chunk) * size, chunk.offset * size))
    values = parts[0] if len(parts) == 1 else np.concatenate([*parts, np.zeros(0, np.uint8)])
    return values.view(dtype.base).reshape(len(column), *dtype.shape)


def _object_values(column: pa.ChunkedArray, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return strings, arrays and bytes as NumPy values."""
    n = len(column)
    if dtype.kind == "S":
        values = np.array([v.encode() for v in column.to_pylist()] or [b""], "S")[:n]
        return values.astype(dtype) if dtype.itemsize else values
    if dtype.kind == "O":
        return np.array([*column.to_pylist(), None], object)[:-1]
    return np.frombuffer(b"".join(column.to_pylist()), dtype.base).reshape(n, *dtype.shape)
