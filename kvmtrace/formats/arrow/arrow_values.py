"""Arrow columns as NumPy values, without a copy where there is none to make.

Their buffers are read as they are: Arrow's own conversions import pandas, its take() and cast() the compute functions,
which takes longer than reading a million rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kvmtrace.formats.arrow.arrow_claims import validate_values

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
    if not dtype.itemsize and dtype.shape:
        return np.zeros((len(column) if rows is None else len(rows), *dtype.shape), dtype.base)
    if not pa.types.is_fixed_size_binary(column.type) and dtype.kind in "SO":
        return _object_values(column, dtype, rows)
    values = number_values(column)
    if values.ndim > 1:
        values = values.reshape(-1).view(dtype.base).reshape(len(column), *dtype.shape)
    return (values if rows is None else values[rows]).astype(dtype.base, copy=False)


def number_values(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return numbers, booleans (uint8) or arrays of bytes (uint8, shape (n, size)); nulls have some value, too."""
    if pa.types.is_boolean(column.type):
        return _bits(column, 1)
    dtype, shape, size = _layout(column.type)
    parts = []
    for chunk in column.chunks:
        data, n = chunk.buffers()[1], len(chunk) * int(np.prod(shape, dtype=np.int64))
        parts.append(
            (np.zeros(n, dtype) if data is None else np.frombuffer(data, dtype, n, chunk.offset * size)).reshape(
                len(chunk), *shape
            )
        )
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


def _bits(column: pa.ChunkedArray, buffer: int) -> NDArray[np.uint8]:
    """Return each value's bit of a buffer: 0 validity (all ones where there is none), 1 booleans."""
    parts = [np.empty(0, np.uint8)]
    for chunk in column.chunks:
        data, end = chunk.buffers()[buffer], chunk.offset + len(chunk)
        parts.append(
            np.ones(len(chunk), np.uint8)
            if data is None
            else np.unpackbits(np.frombuffer(data, np.uint8, (end + 7) // 8), count=end, bitorder="little")[
                chunk.offset :
            ]
        )
    return np.concatenate(parts)


def _codes(chunk: pa.DictionaryArray) -> NDArray[Any]:
    """Return which text of its dictionary each value is."""
    return number_values(pa.chunked_array([chunk.indices]))


def _object_values(column: pa.ChunkedArray, dtype: np.dtype[Any], rows: NDArray[np.intp] | None) -> NDArray[Any]:
    """Return strings or bytes of any length as NumPy values."""
    wanted = slice(None) if rows is None else rows
    if column.null_count and not _bits(column, 0)[wanted].all():
        raise ValueError("an event without a value")
    begins, ends, texts = [np.empty(0, np.int64)], [np.empty(0, np.int64)], []
    base = 0
    for chunk in column.chunks:
        coded = pa.types.is_dictionary(chunk.type)  # each text once: a few may stand in a million rows
        own = chunk.dictionary if coded else chunk
        _, offsets, data = own.buffers()
        if offsets is None or not len(own):
            if len(chunk) and not chunk.null_count:
                raise ValueError("texts that are not there")
            begins.append(np.zeros(len(chunk), np.int64))
            ends.append(np.zeros(len(chunk), np.int64))
            continue
        offset = np.frombuffer(offsets, np.int32, len(own) + 1, own.offset * 4).astype(np.int64)
        texts.append(b"" if data is None else bytes(memoryview(data)[offset[0] : offset[-1]]))
        offset += base - offset[0]
        places = np.where(_bits(pa.chunked_array([chunk]), 0) > 0, _codes(chunk), 0) if coded else slice(None)
        begins.append(offset[:-1][places])
        ends.append(offset[1:][places])
        base += len(texts[-1])
    text = b"".join(texts)
    begin, end = np.concatenate(begins)[wanted], np.concatenate(ends)[wanted]
    found = [text[first:last] for first, last in zip(begin.tolist(), end.tolist(), strict=True)]
    if dtype.kind == "O":
        return np.array([*found, None], object)[:-1]
    if not text.isascii():
        for value in found:
            value.decode()
    validate_values(len(found), max(map(len, found), default=0), len(text))
    values = np.array(found or [b""], "S")[: len(found)]
    return values.astype(dtype) if dtype.itemsize else values
