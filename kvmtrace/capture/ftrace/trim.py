"""Making all CPUs' data begin and end at the same time.

A size limit deletes old segments CPU by CPU, and a full disk cuts the CPUs' data at different times. Where one
CPU's events are missing, the others' would tell half a story: a thread that moves between CPUs would seem to
leave the guest twice. At most about one segment per CPU is looked at.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from kvmtrace.capture.ftrace.raw_pages import cut_page, cut_tail, page_time
from kvmtrace.capture.spool import PAGE_SIZE

if TYPE_CHECKING:
    from kvmtrace.capture.ftrace.page_mover import Reader, Segment


def trim_head(reader: Reader) -> int | None:
    """Cut what some CPUs recorded before others' oldest kept event; counts it as discarded.

    Returns
    -------
    int or None, the time from which on the recording is complete; None if nothing was deleted
    """
    kept = {cpu: [s for s in parts if s.size] for cpu, parts in reader.segments.items()}
    firsts = [reader.start_ns(kept[cpu][0]) for cpu in reader.discarded if kept.get(cpu)]
    from_ns = max(firsts, default=None)
    if from_ns is not None:
        for cpu, parts in kept.items():
            _trim_head_of(reader, cpu, parts, from_ns)
    return from_ns


def trim_head_at(reader: Reader, from_ns: int) -> None:
    """Cut what was recorded before a time; what is cut was to be overwritten, and counts as nothing."""
    for cpu, parts in reader.segments.items():
        _trim_head_of(reader, cpu, [s for s in parts if s.size], from_ns)


def _trim_head_of(reader: Reader, cpu: int, parts: list[Segment], from_ns: int) -> None:
    skips: dict[str, int] = {}
    gone = 0
    for segment in parts:
        fd = reader.spool.open_old(segment.name)
        try:
            skip, count, done = _skip_pages(fd, segment.size, from_ns)
        finally:
            os.close(fd)
        skips[segment.name] = skip
        gone += count
        if done:
            break
    reader.spool.save({"skips": reader.spool.manifest.get("skips", {}) | skips})
    if gone:
        reader.discarded[cpu] = reader.discarded.get(cpu, 0) + gone


def _skip_pages(fd: int, size: int, from_ns: int) -> tuple[int, int, bool]:
    """Find where events from `from_ns` on begin in a segment, and cut the page they begin in.

    Returns
    -------
    int, int, bool : bytes before that page, events before that time, whether there is such a page
    """
    gone = 0
    for at in range(0, size // PAGE_SIZE * PAGE_SIZE, PAGE_SIZE):
        page = os.pread(fd, PAGE_SIZE, at)
        rest, count = cut_page(page, from_ns)
        gone += count
        if rest:
            if count:
                os.pwrite(fd, rest, at)
            return at, gone, True
    return size // PAGE_SIZE * PAGE_SIZE, gone, False


def trim_tail(reader: Reader) -> int | None:
    """Cut what some CPUs recorded after others' events could not be kept any more; counts it as dropped.

    Returns
    -------
    int or None, the time up to which the recording is complete; None if everything was kept
    """
    ends = list(reader.dropped_from_ns.values())
    ends += [oldest for cpu in reader.cpus if (oldest := reader.instance.oldest_ns(cpu)) is not None]
    until_ns = min(ends, default=None)
    if until_ns is not None:
        for cpu, parts in reader.segments.items():
            gone = sum(_trim_tail_of(reader, segment, until_ns) for segment in parts)
            if gone:
                reader.dropped[cpu] = reader.dropped.get(cpu, 0) + gone
    return until_ns


def _trim_tail_of(reader: Reader, segment: Segment, until_ns: int) -> int:
    """Shorten a segment to what was recorded before `until_ns`; return how many events go."""
    gone, at = 0, segment.size // PAGE_SIZE * PAGE_SIZE
    fd = reader.spool.open_old(segment.name)
    try:
        while at:
            page = os.pread(fd, PAGE_SIZE, at - PAGE_SIZE)
            rest, count = cut_tail(page, until_ns)
            gone += count
            if rest:
                if count:
                    os.pwrite(fd, rest, at - PAGE_SIZE)
                if page_time(page) < until_ns:  # all pages before it are older
                    break
            at -= PAGE_SIZE
        os.ftruncate(fd, at)
    finally:
        os.close(fd)
    segment.size = at
    return gone
