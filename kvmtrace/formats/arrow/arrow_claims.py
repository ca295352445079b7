"""What a Parquet or Arrow file says that its compressed parts become, held against what they are.

pyarrow takes as much memory as a page or buffer claims before it looks at the data, and a page of zeros shrinks to a
ten thousandth. What is to be read is therefore looked at first: the headers of a column's pages, and the sizes in front
of a record batch's buffers.

Source: parquet-format, parquet.thrift (PageHeader) and thrift-compact-protocol.md; Arrow's Message.fbs, File.fbs and
the FlatBuffers' internals
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from kvmtrace.formats.common.compression import MAX_KEPT, MAX_RATIO, USUAL_RATIO

if TYPE_CHECKING:
    from collections.abc import Sequence

FREE_BYTES = 16 << 20  # a column of a million equal numbers shrinks to almost nothing
MAX_BYTES = 256 << 20  # of one page or buffer
MAX_VALUES_BYTES = 256 << 20  # of a column once its values are side by side, beside what the file's size allows
MAX_VALUE = 1 << 16  # bytes: a record of the ring buffer is not longer

_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)
_MAX_DEPTH = 16
_PARTS = {_I16: 1, _I32: 1, _I64: 1}
_UNCOMPRESSED = 0  # of CompressionCodec
_FOOTER_TAIL = 10  # bytes of an Arrow file: the footer's length and ARROW1
_RECORD_BATCH = 3  # of Message.header


def _credible(packed: int, size: int) -> None:
    if not 0 <= size <= min(max(packed * MAX_RATIO, FREE_BYTES), MAX_BYTES):
        raise ValueError(f"{packed} bytes that become {size}")


def validate_values(n_rows: int, itemsize: int, file_bytes: int) -> None:
    """Raise ValueError where values side by side would take more than such a file holds."""
    if itemsize > MAX_VALUE or n_rows * itemsize > MAX_VALUES_BYTES + USUAL_RATIO * file_bytes:
        raise ValueError(f"{n_rows} values of up to {itemsize} bytes in a file of {file_bytes}")


class _Thrift:
    """Reads the compact protocol, as far as page headers need it.

    Parameters
    ----------
    data : memoryview
    at : where to begin; behind the struct afterwards
    """

    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self.at = data, at

    def _varint(self) -> int:
        value = shift = 0
        while shift < 70:
            byte = self._data[self.at]
            self.at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("a number of more than 10 bytes")

    def numbers(self) -> dict[int, int]:
        """Read a struct; return field id -> value of its integers."""
        found: dict[int, int] = {}
        field = 0
        while head := self._data[self.at]:
            self.at += 1
            if head >> 4:
                field += head >> 4
            else:
                field = self._signed()
            kind = head & 15
            if kind in _PARTS:
                found[field] = self._signed()
            else:
                self._skip(kind, 0)
        self.at += 1
        return found

    def _signed(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

    def _skip(self, kind: int, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("a page header that is nested too deeply")
        if kind in (_TRUE, _FALSE):
            return
        if kind in _PARTS:
            self._varint()
        elif kind in (_BYTE, _DOUBLE):
            self.at += 1 if kind == _BYTE else 8
        elif kind == _BINARY:
            size = self._varint()
            self.at += size
        elif kind == _STRUCT:
            while head := self._data[self.at]:
                self.at += 1
                if not head >> 4:
                    self._varint()
                self._skip(head & 15, depth + 1)
            self.at += 1
        else:  # lists, sets and maps: no page header has any
            raise ValueError("a page header with a list")


def validate_pages(data: memoryview, chunk: Sequence[int]) -> None:
    """Raise ValueError where the pages of a column of a row group claim to become incredibly large.

    Parameters
    ----------
    data : the file
    chunk : codec, bytes in the file, offset of the first data page, offset of the dictionary page (0 or -1: none)
    """
    codec, packed_bytes, at, dictionary = chunk
    if codec == _UNCOMPRESSED:
        return
    if dictionary > 0:
        at = min(at, dictionary)
    end, total = at + packed_bytes, 0
    if not 0 <= at <= end <= len(data):
        raise ValueError("a column outside the file")
    try:
        while at < end:
            header = _Thrift(data, at)
            numbers = header.numbers()
            size, packed = numbers.get(2, -1), numbers.get(3, -1)
            if packed < 0:
                raise ValueError("a page without a size")
            _credible(packed, size)
            total += size
            at = header.at + packed
    except IndexError:
        raise ValueError("a page header that goes on behind the file") from None
    if total > MAX_KEPT + USUAL_RATIO * packed_bytes:
        raise ValueError(f"a column of {packed_bytes} bytes that become {total}")


class _Table:
    """A table of a FlatBuffer.

    Parameters
    ----------
    data : memoryview
    at : where it begins
    """

    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self._at = data, at
        self._fields = at - _number("<i", data, at)
        self._size = _number("<H", data, self._fields)

    def place(self, field: int) -> int | None:
        """Return where a field's value is, None if it is not there."""
        slot = 4 + 2 * field
        offset = _number("<H", self._data, self._fields + slot) if slot + 2 <= self._size else 0
        return self._at + offset if offset else None

    def follow(self, field: int) -> int | None:
        """Return where what a field refers to is."""
        at = self.place(field)
        return None if at is None else at + _number("<I", self._data, at)

    def structs(self, field: int, form: str) -> list[tuple[Any, ...]]:
        """Return a vector of structs."""
        at = self.follow(field)
        if at is None:
            return []
        count, size = _number("<I", self._data, at), struct.calcsize(form)
        if at + 4 + count * size > len(self._data):
            raise ValueError("a list that goes on behind the file")
        return list(struct.iter_unpack(form, self._data[at + 4 : at + 4 + count * size]))


def _number(form: str, data: memoryview, at: int) -> int:
    if not 0 <= at <= len(data) - struct.calcsize(form):
        raise ValueError("an offset outside the file")
    value: int = struct.unpack_from(form, data, at)[0]
    return value


def validate_buffers(data: memoryview) -> None:
    """Raise ValueError where a compressed buffer of an Arrow file claims to become incredibly large.

    Parameters
    ----------
    data : the file
    """
    end = len(data) - _FOOTER_TAIL
    start = end - _number("<i", data, end)
    footer = _Table(data, start + _number("<I", data, start))
    for field in (2, 3):  # dictionaries, record batches
        for offset, meta_bytes, _ in footer.structs(field, "<qi4xq"):
            _validate_batch(data, offset, meta_bytes)


def _validate_batch(data: memoryview, offset: int, meta_bytes: int) -> None:
    start = offset + (8 if _number("<I", data, offset) == 0xFFFFFFFF else 4)
    message = _Table(data, start + _number("<I", data, start))
    kind, header = message.place(1), message.follow(2)
    if kind is None or header is None:
        raise ValueError("a message without a header")
    batch = _Table(data, header)
    if _number("<B", data, kind) != _RECORD_BATCH:  # a dictionary's batch is inside
        inner = batch.follow(1)
        if inner is None:
            raise ValueError("a dictionary without values")
        batch = _Table(data, inner)
    if batch.place(3) is None:  # not compressed: the buffers are the file's bytes
        return
    body = offset + meta_bytes
    for at, size in batch.structs(2, "<qq"):
        if size > 8:
            claimed = _number("<q", data, body + at)
            if claimed != -1:  # a buffer that did not shrink
                _credible(size - 8, claimed)
