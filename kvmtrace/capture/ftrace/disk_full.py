"""The end of a recording on a full disk: the recording shall be complete as far as possible, on all CPUs.

A page is handed over when it is full, so a CPU with few events has old ones in its buffer when another CPU fills
the disk. Without them the recording would be complete only up to the oldest of them, perhaps minutes before. Room
for them is made by giving up the newest pages of the CPU whose data reach furthest.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvmtrace.capture.ftrace.raw_pages import page_time
from kvmtrace.capture.spool import PAGE_SIZE

if TYPE_CHECKING:
    from kvmtrace.capture.ftrace.page_mover import Reader, Segment

GIVEN_UP_BYTES = 64 * PAGE_SIZE  # at once


def finish_full(reader: Reader) -> None:
    """Keep of what the kernel still holds all that is older than the first event that cannot be kept."""
    for cpu in reader.cpus:
        while page := reader.next_page(cpu):
            if not _keep(reader, cpu, page):
                reader.drop(cpu, page)
                break
    reader.drop_rest()


def _keep(reader: Reader, cpu: int, page: bytes) -> bool:
    """Store a page if it is old enough, at the cost of newer ones."""
    while page_time(page) < min(reader.dropped_from_ns.values(), default=page_time(page) + 1):
        if reader.try_append(cpu, page):
            return True
        if not _give_up_newest(reader):
            return False
    return False


def _give_up_newest(reader: Reader) -> bool:
    """Drop some pages of the CPU whose data reach furthest; False if there are none."""
    lasts = {cpu: parts[-1] for cpu, parts in _stored(reader).items()}
    if not lasts:
        return False
    cpu = max(lasts, key=lambda cpu: _last_page_time(reader, lasts[cpu]))
    segment = lasts[cpu]
    kept = max(0, segment.size - GIVEN_UP_BYTES)
    fd = reader.spool.open_old(segment.name)
    try:
        gone = os.pread(fd, segment.size - kept, kept)
        os.ftruncate(fd, kept)
    finally:
        os.close(fd)
    segment.size = kept
    reader.drop(cpu, gone)
    return True


def _stored(reader: Reader) -> dict[int, list[Segment]]:
    """Return the segments that hold something, of the CPUs that have any."""
    kept = {cpu: [s for s in parts if s.size] for cpu, parts in reader.segments.items()}
    return {cpu: parts for cpu, parts in kept.items() if parts}


def _last_page_time(reader: Reader, segment: Segment) -> int:
    fd = reader.spool.open_old(segment.name, os.O_RDONLY)
    try:
        return page_time(os.pread(fd, 8, segment.size - PAGE_SIZE))
    finally:
        os.close(fd)
