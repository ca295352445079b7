"""Moves full pages from the kernel's per-CPU buffers to the spool; sleeps until there are some.

No event is looked at. splice(2) hands over whole pages; what is left in half-filled pages is read at the end.
With a limit the oldest segments are deleted while recording, and their events counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from kvmtrace.capture.ftrace.raw_pages import count_events, mark_gap, page_time
from kvmtrace.capture.spool import PAGE_SIZE, SEGMENT_BYTES, Spool, is_full
from kvmtrace.errors import UsageError
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvmtrace.capture.ftrace.instance import Instance

PIPE_BYTES = 1 << 20
SMALLEST_SEGMENT_BYTES = 128 << 10
SPLICE_FLAGS = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE


class DiskFullError(Exception):
    """The spool cannot grow any more; what it holds is intact."""


@dataclass
class Segment:
    """One spool file.

    Parameters
    ----------
    name : str
    fd : int, -1 once it is complete
    read_before : int, events of its CPU that the kernel had handed over before it (0 without a limit)
    size : int, bytes
    """

    name: str
    fd: int
    read_before: int
    size: int = 0


class Reader:
    """Reads the buffers of an instance into a spool.

    Parameters
    ----------
    instance : Instance
    spool : Spool
    max_bytes : int or None, keep about so much, the newest

    Raises
    ------
    UsageError
        max_bytes is too small for the number of CPUs.

    Attributes
    ----------
    dropped : CPU -> events taken from the kernel but not kept, for lack of room on the disk
    dropped_from_ns : CPU -> time stamp from which on events were not kept
    discarded : CPU -> events deleted because of max_bytes

    After a DiskFullError nothing more can be drained, and full_disk.finish_full() ends the recording.
    """

    def __init__(self, instance: Instance, spool: Spool, max_bytes: int | None = None) -> None:
        self.instance = instance
        self.spool = spool
        self.max_bytes = max_bytes
        self.cpus = instance.cpus()
        self.segment_bytes = SEGMENT_BYTES
        if max_bytes is not None:
            least = (len(self.cpus) + 2) * SMALLEST_SEGMENT_BYTES
            if max_bytes < least:
                raise UsageError(f"--max-size {max_bytes} is too small for {len(self.cpus)} CPUs; at least {least}")
            share = max_bytes // (4 * len(self.cpus)) // PAGE_SIZE * PAGE_SIZE
            self.segment_bytes = min(SEGMENT_BYTES, max(SMALLEST_SEGMENT_BYTES, share))
        self.dropped: dict[int, int] = {}
        self.dropped_from_ns: dict[int, int] = {}
        self._aside: dict[int, bytes] = {}  # CPU -> pages that came from the kernel when the disk was full
        self._gaps: set[int] = set()  # CPUs whose next page follows a gap
        kept = spool.manifest.get("discarded", {})
        self.discarded: dict[int, int] = {int(cpu): count for cpu, count in kept.items()}
        self.segments: dict[int, list[Segment]] = {cpu: [] for cpu in self.cpus}
        for cpu, names in spool.segments().items():  # of a dead recorder whose work is finished now
            self.segments[cpu] = [Segment(name, -1, 0, spool.size_of(name)) for name in names]
        self._number = 1 + max(
            (int(part.name.partition(".")[2]) for parts in self.segments.values() for part in parts), default=-1
        )
        self.raw: dict[int, int] = {}
        try:
            for cpu in self.cpus:
                self.raw[cpu] = self._open_raw(cpu)
            self._pipe_read, self._pipe_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:  # no more files may be opened: those that are open would keep the instance
            for fd in self.raw.values():
                os.close(fd)
            raise
        try:
            self._pipe_bytes = fcntl.fcntl(self._pipe_write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:  # more than an unprivileged user may have
            self._pipe_bytes = fcntl.fcntl(self._pipe_write, fcntl.F_GETPIPE_SZ)

    def _open_raw(self, cpu: int) -> int:
        path = self.instance.path / f"per_cpu/cpu{cpu}/trace_pipe_raw"
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def drain(self) -> int:
        """Move all full pages; return how many bytes.

        Raises
        ------
        DiskFullError
            The disk is full; what could not be kept is set aside for finish_full().
        """
        return sum(self._drain_cpu(cpu) for cpu in self.cpus)

    def _drain_cpu(self, cpu: int) -> int:
        moved = 0
        while True:
            segment = self._segment(cpu)
            room = min(self._pipe_bytes, self.segment_bytes - segment.size)
            try:
                size = os.splice(self.raw[cpu], self._pipe_write, room, flags=SPLICE_FLAGS)
            except BlockingIOError:
                return moved
            if not size:
                return moved
            self._store(cpu, segment, size)
            moved += size

    def finish(self, *, after_gap: Iterable[int] = ()) -> None:
        """Move everything, half-filled pages too. The instance must not be tracing any more.

        Parameters
        ----------
        after_gap : CPUs that may have lost events between what the spool holds and what comes now

        Raises
        ------
        DiskFullError
            As drain().
        """
        self._gaps = set(after_gap)
        for cpu in self.cpus:
            if cpu in self._gaps and (page := self.next_page(cpu)):
                self._append(cpu, page)
            self._drain_cpu(cpu)
            while page := self.next_page(cpu):
                self._append(cpu, page)

    def next_page(self, cpu: int) -> bytes:
        """Return the next page that was not stored, however full; b"" if there is none."""
        aside = self._aside.pop(cpu, b"")
        if len(aside) > PAGE_SIZE:
            self._aside[cpu] = aside[PAGE_SIZE:]
        page = aside[:PAGE_SIZE]
        if not page:
            with contextlib.suppress(BlockingIOError):
                page = os.read(self.raw[cpu], PAGE_SIZE)
        if page and cpu in self._gaps:
            self._gaps.discard(cpu)
            page = mark_gap(page)
        return page.ljust(PAGE_SIZE, b"\0") if page else b""

    def _segment(self, cpu: int) -> Segment:
        """Return the segment to write to, a new one if there is none or it is full."""
        segments = self.segments[cpu]
        usable = bool(segments) and segments[-1].fd >= 0
        if usable and segments[-1].size < self.segment_bytes:
            return segments[-1]
        if usable:
            os.close(segments[-1].fd)
            segments[-1].fd = -1
        read_before = 0
        if self.max_bytes is not None:
            self._rotate(self.max_bytes)
            read_before = self.instance.stats(cpu)["read events"]
        name = f"cpu{cpu}.{self._number}"
        self._number += 1
        try:
            segments.append(Segment(name, self.spool.open_new(name), read_before))
        except OSError as error:
            raise (DiskFullError() if is_full(error) else error) from error
        return segments[-1]

    def _store(self, cpu: int, segment: Segment, size: int) -> None:
        """Move `size` bytes from the pipe to the segment."""
        try:
            while size:
                done = os.splice(self._pipe_read, segment.fd, size, flags=os.SPLICE_F_MOVE)
                segment.size += done
                size -= done
        except OSError as error:
            if not is_full(error):
                raise
            self._set_aside(cpu, segment, os.read(self._pipe_read, size))
            raise DiskFullError from error

    def _append(self, cpu: int, page: bytes) -> None:
        """Write one page to the CPU's segment."""
        if not self.try_append(cpu, page):
            self._aside[cpu] = page + self._aside.get(cpu, b"")
            raise DiskFullError

    def try_append(self, cpu: int, page: bytes) -> bool:
        """Write one page to the CPU's segment; False, and nothing is written, if the disk is full."""
        try:
            segment = self._segment(cpu)
        except DiskFullError:
            return False
        try:
            done = os.write(segment.fd, page)
        except OSError as error:
            if not is_full(error):
                raise
            done = 0
        segment.size += done
        if done == len(page):
            return True
        self._cut(segment, segment.size - done)
        return False

    @staticmethod
    def _cut(segment: Segment, size: int) -> None:
        os.ftruncate(segment.fd, size)
        os.lseek(segment.fd, size, os.SEEK_SET)
        segment.size = size

    def _set_aside(self, cpu: int, segment: Segment, rest: bytes) -> None:
        """Hold what does not fit, beginning with a page that was written in part."""
        whole = segment.size // PAGE_SIZE * PAGE_SIZE
        self._aside[cpu] = os.pread(segment.fd, segment.size - whole, whole) + rest
        self._cut(segment, whole)

    def drop(self, cpu: int, pages: bytes) -> None:
        """Count the events of pages that are not kept."""
        from_ns = page_time(pages)
        self.dropped_from_ns[cpu] = min(from_ns, self.dropped_from_ns.get(cpu, from_ns))
        count = sum(count_events(pages[at : at + PAGE_SIZE]) for at in range(0, len(pages), PAGE_SIZE))
        self.dropped[cpu] = self.dropped.get(cpu, 0) + count

    def drop_rest(self) -> None:
        """Count what was set aside and is not kept."""
        for cpu, pages in self._aside.items():
            self.drop(cpu, pages)
        self._aside = {}

    def _rotate(self, limit: int) -> None:
        """Delete the segments that ended first until the rest leaves room for one more."""
        while True:
            sizes = [self.segment_bytes if s.fd >= 0 else s.size for parts in self.segments.values() for s in parts]
            if sum(sizes) + self.segment_bytes <= limit:  # even if all open ones fill up
                return
            # a segment ends where its successor begins
            candidates = [
                (self.start_ns(parts[1]), cpu)
                for cpu, parts in self.segments.items()
                if len(parts) > 1 and parts[1].size
            ]
            if not candidates:
                return
            cpu = min(candidates)[1]
            oldest = self.segments[cpu].pop(0)
            self.spool.unlink(oldest.name)
            events = self.segments[cpu][0].read_before - oldest.read_before
            self.discarded[cpu] = self.discarded.get(cpu, 0) + events
            self.spool.save({"discarded": self.discarded})

    def start_ns(self, segment: Segment) -> int:
        """Return the time stamp of a segment's first page."""
        fd = self.spool.open_old(segment.name, os.O_RDONLY)
        try:
            return page_time(os.pread(fd, 8, 0))
        finally:
            os.close(fd)

    def close(self) -> None:
        """Close all descriptors (the instance cannot be removed before)."""
        open_segments = [s.fd for parts in self.segments.values() for s in parts if s.fd >= 0]
        for fd in (*self.raw.values(), *open_segments, self._pipe_read, self._pipe_write):
            os.close(fd)
        self.raw = {}
        self.segments = {}
