"""What is left of buffers that overwrote their oldest events on purpose: what is older than was asked for is cut.

What went before that is no loss of the recording, whoever finishes it: the flight recorder, or the command after it was
killed.
"""

from __future__ import annotations

import os
import re
import struct
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.ftrace.raw_pages import MISSED_EVENTS, count_events
from kvmtrace.capture.ftrace.trim import trim_head_at
from kvmtrace.capture.spool import PAGE_SIZE
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmtrace.capture.ftrace.page_mover import Reader

ALL_READ = "all_read"  # in the spool's manifest: from now on pages are cut, and what is missing was not in flight
MISSED_STORED = 1 << 30  # flag in `commit`, beside MISSED_EVENTS: their number is stored
COUNTED_PAGES = 20_000  # of more, nobody counts the events


def keep_from(reader: Reader, from_ns: int, in_flight: Mapping[int, int | None] | None = None) -> dict[str, Any]:
    """Cut what is older than a time, and return what the metadata say of the rest.

    Parameters
    ----------
    reader : Reader that has finished
    from_ns : time on the recording's clock
    in_flight : CPU -> events lost between kernel and spool when the recorder was killed, None if unknown
    """
    reader.spool.save({ALL_READ: True})
    trim_head_at(reader, from_ns)
    counted = _count(reader)
    flying = in_flight or {}
    lost = {cpu: reader.dropped.get(cpu, 0) + (flying.get(cpu) or 0) for cpu in reader.cpus}
    known = None not in flying.values() and (not counted.gaps or any(flying.values()))
    return {
        "complete_from_ns": from_ns,
        "n_events": counted.events,
        "loss": {
            "events": sum(lost.values()) if known else None,
            "by_cpu": {str(cpu): count for cpu, count in lost.items() if count},
        },
        "duration_ns": max(counted.last_ns, counted.first_ns) - counted.first_ns,
    }


@dataclass
class _Counted:
    events: int | None = 0
    gaps: int = 0
    first_ns: int = 0
    last_ns: int = 0


def _count(reader: Reader) -> _Counted:
    """Look through the pages that are kept; the first of each CPU follows what was overwritten on purpose: no gap."""
    found = _Counted()
    skips = reader.spool.manifest.get("skips", {})
    n_pages = sum(part.size for parts in reader.segments.values() for part in parts) // PAGE_SIZE
    for parts in reader.segments.values():
        is_first = True
        for segment in parts:
            fd = reader.spool.open_old(segment.name)
            try:
                for at in range(skips.get(segment.name, 0), segment.size // PAGE_SIZE * PAGE_SIZE, PAGE_SIZE):
                    page = os.pread(fd, PAGE_SIZE, at)
                    is_first = _count_page(found, page, fd, at, is_first=is_first, count=n_pages <= COUNTED_PAGES)
            finally:
                os.close(fd)
    return found


def _count_page(found: _Counted, page: bytes, fd: int, at: int, *, is_first: bool, count: bool) -> bool:
    """Take in a page; return whether the next one is still the first of its CPU."""
    stamp, commit = struct.unpack_from("<QQ", page)
    if commit & MISSED_EVENTS and is_first:
        length = commit & (MISSED_STORED - 1)  # the kernel adds a negative number: bits above 31 are set as well
        os.pwrite(fd, struct.pack("<QQ", stamp, length), at)
        if commit & MISSED_STORED and 16 + length + 8 <= PAGE_SIZE:  # their number stands behind the records
            os.pwrite(fd, bytes(8), at + 16 + length)
    elif commit & MISSED_EVENTS:
        found.gaps += 1
    found.first_ns = min(found.first_ns or stamp, stamp)
    found.last_ns = max(found.last_ns, stamp)
    found.events = found.events + count_events(page) if count and found.events is not None else None
    return False


def without_overruns(stats: str) -> str:
    """Return a CPU's counters without what was overwritten: that is older than the recording, and no loss of it."""
    return re.sub(r"^overrun: \d+$", "overrun: 0", stats, flags=re.MULTILINE)
