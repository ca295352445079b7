"""The little that a recorder must know of a ring-buffer page: its time, its length, how many events.

Used for whole pages in rare moments (a full disk, a rotated file), never on the way of the data.

Source: include/linux/ring_buffer.h (enum ring_buffer_type),
kernel/trace/ring_buffer.c (struct buffer_data_page)
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER_SIZE = 16  # u64 time stamp, local_t commit
COMMIT_MASK = (1 << 27) - 1
MISSED_EVENTS = 1 << 31  # flag in `commit`: events were lost before this page

PADDING, TIME_EXTEND, TIME_STAMP = 29, 30, 31
TIME_BITS = 27  # of a time in an event header; the next word has the bits above
STAMP_KEEPS = ~((1 << 59) - 1)  # an absolute time stamp has 59 bits; those above are the page's
DATA_TYPES_MAX = 28  # a type_len of 1..28 is the length in words


def page_time(page: bytes) -> int:
    """Return the time stamp of a page's beginning."""
    return int(struct.unpack_from("<Q", page)[0])


def iter_events(page: bytes) -> Iterator[tuple[int, int]]:
    """Yield (offset of its header, time stamp) of each event of a page."""
    commit = struct.unpack_from("<Q", page, 8)[0] & COMMIT_MASK
    at, end, now = HEADER_SIZE, min(HEADER_SIZE + commit, len(page)), page_time(page)
    while at + 4 <= end:
        header = struct.unpack_from("<I", page, at)[0]
        kind, delta = header & 31, header >> 5
        if kind == PADDING and not delta:
            return  # the rest of the page is empty
        second = struct.unpack_from("<I", page, at + 4)[0] if at + 8 <= end else 0
        if kind == TIME_STAMP:
            now = now & STAMP_KEEPS | second << TIME_BITS | delta
            at += 8
        elif kind == TIME_EXTEND:
            now += second << TIME_BITS | delta
            at += 8
        else:
            now += delta
            if kind != PADDING:
                yield at, now
            at += 4 + (4 * kind if 0 < kind <= DATA_TYPES_MAX else second)


def count_events(page: bytes) -> int:
    """Return how many events a page holds."""
    return sum(1 for _ in iter_events(page))


def event_ids(page: bytes) -> Iterator[int]:
    """Yield the event id (`common_type`) of each event of a page."""
    for at, _ in iter_events(page):
        data = at + (4 if struct.unpack_from("<I", page, at)[0] & 31 else 8)
        if data + 2 <= len(page):
            yield struct.unpack_from("<H", page, data)[0]


def cut_page(page: bytes, from_ns: int) -> tuple[bytes, int]:
    """Return the page without the events before `from_ns` (b"" if none is left), and how many those were."""
    for before, (at, now) in enumerate(iter_events(page)):
        if now >= from_ns:
            if not before:
                return page, 0
            length = (struct.unpack_from("<Q", page, 8)[0] & COMMIT_MASK) - (at - HEADER_SIZE)
            first = struct.unpack_from("<I", page, at)[0] & 31  # its time is the page's now: delta 0
            rest = struct.pack("<I", first) + page[at + 4 : at + length]
            return (struct.pack("<QQ", now, length) + rest).ljust(len(page), b"\0"), before
    return b"", count_events(page)


def cut_tail(page: bytes, until_ns: int) -> tuple[bytes, int]:
    """Return the page without the events from `until_ns` on (b"" if none is left), and how many those were."""
    events = list(iter_events(page))
    kept = next((i for i, (_, now) in enumerate(events) if now >= until_ns), len(events))
    if kept == len(events):
        return page, 0
    if not kept:
        return b"", len(events)
    length = events[kept][0] - HEADER_SIZE
    # a stored count of missed events lies behind the data, and goes; that some were missed is still said
    flags = struct.unpack_from("<Q", page, 8)[0] & MISSED_EVENTS
    header = page[:8] + struct.pack("<Q", length | flags)
    return (header + page[HEADER_SIZE : HEADER_SIZE + length]).ljust(len(page), b"\0"), len(events) - kept


def mark_gap(page: bytes) -> bytes:
    """Return the page with the mark that events before it, nobody knows how many, were lost."""
    commit = struct.unpack_from("<Q", page, 8)[0] | MISSED_EVENTS
    return page[:8] + struct.pack("<Q", commit) + page[HEADER_SIZE:]
