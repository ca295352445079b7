"""The little that a recorder must know of a ring-buffer page: its time, its length, how many events.

Used for whole pages in rare moments (a full disk, a rotated file), never on the way of the data.

Source: include/linux/ring_buffer.h (enum ring_buffer_type),
kernel/trace/ring_buffer.c (struct buffer_data_page)
"""

from __future__ import annotations

import struct

HEADER_SIZE = 16  # u64 time stamp, local_t commit
COMMIT_MASK = (1 << 27) - 1
MISSED_EVENTS = 1 << 31  # flag in `commit`: events were lost before this page

PADDING, TIME_EXTEND, TIME_STAMP = 29, 30, 31
DATA_TYPES_MAX = 28  # a type_len of 1..28 is the length in words


def page_time(page: bytes) -> int:
    """Return the time stamp of a page's beginning."""
    return int(struct.unpack_from("<Q", page)[0])


def count_events(page: bytes) -> int:
    """Return how many events a page holds."""
    commit = struct.unpack_from("<Q", page, 8)[0] & COMMIT_MASK
    at, end, count = HEADER_SIZE, min(HEADER_SIZE + commit, len(page)), 0
    while at + 4 <= end:
        header = struct.unpack_from("<I", page, at)[0]
        kind, delta = header & 31, header >> 5
        if kind == PADDING and not delta:
            break  # the rest of the page is empty
        if kind in (TIME_EXTEND, TIME_STAMP):
            at += 8
        elif 0 < kind <= DATA_TYPES_MAX:
            at += 4 + 4 * kind
            count += 1
        else:  # length in the next word: long data (0) or a discarded event (padding)
            at += 4 + (struct.unpack_from("<I", page, at + 4)[0] if at + 8 <= end else end)
            count += kind == 0
    return count


def mark_gap(page: bytes) -> bytes:
    """Return the page with the mark that events before it, nobody knows how many, were lost."""
    commit = struct.unpack_from("<Q", page, 8)[0] | MISSED_EVENTS
    return page[:8] + struct.pack("<Q", commit) + page[HEADER_SIZE:]
