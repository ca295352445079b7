"""Encode ring-buffer pages, record by record (include/linux/ring_buffer.h)."""

from __future__ import annotations

import struct

PAGE_SIZE = 4096
DATA_SIZE = 4080


def record(data: bytes, delta: int = 0, *, big: bool = False) -> bytes:
    """A data record; a delta of more than 27 bits gets a time extend before it. `big` forces type_len 0."""
    head = b""
    if delta >= 1 << 27:
        head, delta = time_extend(delta), 0
    data += bytes(-len(data) % 4)
    if big or len(data) > 28 * 4:
        return head + struct.pack("<II", delta << 5, len(data) + 4) + data
    return head + struct.pack("<I", len(data) // 4 | delta << 5) + data


def time_extend(delta: int) -> bytes:
    return struct.pack("<II", 30 | (delta & (1 << 27) - 1) << 5, delta >> 27)


def time_stamp(ts: int) -> bytes:
    """An absolute time stamp: 59 bits."""
    return struct.pack("<II", 31 | (ts & (1 << 27) - 1) << 5, ts >> 27 & 0xFFFFFFFF)


def discarded(size: int, delta: int = 1) -> bytes:
    """A discarded event of `size` bytes behind its head (at least 4)."""
    return struct.pack("<II", 29 | delta << 5, size) + b"\xaa" * (size - 4)


def null_padding() -> bytes:
    """Padding to the end of the page: no length."""
    return struct.pack("<I", 29)


def page(ts: int, records: list[bytes], *, lost: int | None = None, page_size: int = PAGE_SIZE) -> bytes:
    """A page; `lost` events before it: -1 flags them without a number."""
    data = b"".join(records)
    assert len(data) <= page_size - 16, len(data)
    commit = len(data)
    if lost is not None:
        commit |= 1 << 31
        if lost >= 0:
            commit |= 1 << 30
            data += struct.pack("<Q", lost)
    return (struct.pack("<QQ", ts, commit) + data).ljust(page_size, b"\0")


def event(kind: int, payload: bytes = b"", *, tid: int = 1, flags: int = 0, preempt: int = 0) -> bytes:
    """The bytes of an event: the common fields and the rest."""
    return struct.pack("<HBBi", kind, flags, preempt, tid) + payload
