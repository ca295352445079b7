"""A bounded reader over a byte buffer: every header of an untrusted file is read through it."""

from __future__ import annotations

import struct

from kvmtrace.errors import FormatError

_NUMBERS = {1: struct.Struct("<B"), 2: struct.Struct("<H"), 4: struct.Struct("<I"), 8: struct.Struct("<Q")}


def describe_bytes(data: bytes | memoryview) -> str:
    """Return a bounded hexdump for error messages."""
    head = bytes(data[:16])
    return head.hex(" ") + (" ..." if len(data) > 16 else "") if head else "end of file"


class Cursor:
    """A position in a buffer.

    Parameters
    ----------
    data : the bytes, a memoryview of bytes
    path : str, for messages
    pos : int, where to begin
    base : int, file offset of data[0], for messages
    """

    def __init__(self, data: memoryview, path: str, pos: int = 0, base: int = 0) -> None:
        self.data = data
        self.path = path
        self.pos = pos
        self.base = base

    @property
    def left(self) -> int:
        """Bytes that remain."""
        return len(self.data) - self.pos

    def fail(self, expected: str, found: str | None = None) -> FormatError:
        """Return (not raise) an error that locates the position."""
        if found is None:
            found = describe_bytes(self.data[self.pos : self.pos + 17])
        return FormatError(self.path, self.base + min(self.pos, len(self.data)), expected, found)

    def take(self, size: int, what: str) -> memoryview:
        """Return the next `size` bytes; nothing is allocated, so `size` may be untrusted."""
        if size > self.left:
            raise self.fail(f"{what} of {size} bytes", f"only {max(self.left, 0)} bytes to the end")
        part = self.data[self.pos : self.pos + size]
        self.pos += size
        return part

    def number(self, size: int, what: str) -> int:
        """Return the next little-endian unsigned number of `size` bytes."""
        value: int = _NUMBERS[size].unpack(self.take(size, what))[0]
        return value

    def string(self, what: str, limit: int = 4096) -> str:
        """Return the NUL-terminated string here, at most `limit` bytes long."""
        window = bytes(self.data[self.pos : self.pos + limit])
        end = window.find(b"\0")
        if end < 0:
            raise self.fail(f"a NUL-terminated {what}")
        self.pos += end + 1
        return window[:end].decode("utf-8", "replace")

    def expect(self, magic: bytes, what: str) -> None:
        """Step over `magic`; anything else is an error."""
        if bytes(self.data[self.pos : self.pos + len(magic)]) != magic:
            raise self.fail(f"{what} {magic!r}")
        self.pos += len(magic)
