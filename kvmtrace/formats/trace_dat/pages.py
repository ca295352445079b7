"""Where the ring-buffer pages of each CPU are, and how some of them are brought into memory.

Pages are handed out in units that can be loaded alone: single pages of a mapped file, or compressed chunks.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.errors import FormatError
from kvmtrace.formats.trace_dat.areas import overlapping
from kvmtrace.formats.trace_dat.chunks import KeptPages, chunked_stream, read_begins, unpack
from kvmtrace.formats.trace_dat.page_checks import ORDERED_CLOCKS, check_stamps
from kvmtrace.formats.trace_dat.page_streams import HEAD_BYTES, Fault, Loaded, Span, Stream, read_heads, unit_stamps
from kvmtrace.formats.trace_dat.ring_buffer import as_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvmtrace.formats.trace_dat.trace_dat_sections import Buffer, CpuData, TraceDat
    from kvmtrace.table.format_text import PageLayout


MAX_CPU = 32767
MADV_POPULATE_READ = 22  # include/uapi/asm-generic/mman-common.h; Python does not name it yet
KEPT_TABLES = 2  # of a mapped file: a second thread may still decode fields of them (events/beside.py)
META_BEGIN = b'{"schema"'
SCAN_BYTES = 32 << 20  # of a mapped file whose page headers are read before the pages are let go


def prepare_mapped(data: memoryview, first: int, last: int) -> None:
    """Have bytes first..last of a mapped file in memory, at once and not page by page as they are read."""
    if not isinstance(data.obj, mmap.mmap):
        return
    begin = first // mmap.PAGESIZE * mmap.PAGESIZE
    with contextlib.suppress(OSError):  # before Linux 5.14; a file that somebody has cut off is read to its end
        data.obj.madvise(MADV_POPULATE_READ, begin, last - begin)


def release_mapped(data: memoryview, first: int, last: int) -> None:
    """Let go of the memory of bytes first..last of a mapped file; they come back from the file if asked for."""
    if not isinstance(data.obj, mmap.mmap):
        return
    begin, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        data.obj.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _clip_range(trace: TraceDat, cpu: CpuData, page_size: int, stream_faults: list[Fault]) -> tuple[int, int]:
    """Return (offset, whole pages) of a CPU's data that the file really holds, noting what it lacks."""
    total = len(trace.data)
    present = max(min(cpu.size, total - cpu.offset), 0) if cpu.offset <= total else 0
    if present < cpu.size:
        stream_faults.append(
            Fault(
                min(cpu.offset + present, total),
                cpu.cpu,
                f"{cpu.size} bytes of pages of CPU {cpu.cpu} from {cpu.offset:#x}",
                f"the end of the file at {total:#x}",
            )
        )
    elif cpu.size % page_size:
        stream_faults.append(
            Fault(
                cpu.offset + cpu.size - cpu.size % page_size,
                cpu.cpu,
                f"pages of {page_size} bytes",
                f"{cpu.size % page_size} bytes left over",
            )
        )
    return min(cpu.offset, total), present // page_size


def _mapped_stream(trace: TraceDat, buffer: Buffer, cpu: CpuData, layout: PageLayout, index: int) -> Stream:
    faults: list[Fault] = []
    start, count = _clip_range(trace, cpu, layout.page_size, faults)
    offset = start + np.arange(count, dtype=np.int64) * layout.page_size
    heads = np.zeros((count, HEAD_BYTES), np.uint8)
    block = max(SCAN_BYTES // layout.page_size, 1)
    for first in range(0, count, block):
        size, at = min(block, count - first) * layout.page_size, start + first * layout.page_size
        part = np.frombuffer(trace.data, np.uint8, size, at).reshape(-1, layout.page_size)
        heads[first : first + block] = part[:, :HEAD_BYTES]
        release_mapped(trace.data, at, at + size)
    stamps, good = read_heads(heads, layout)
    checks = check_stamps(
        stamps,
        good,
        ordered=(buffer.clock or trace.clock) in ORDERED_CLOCKS,
        padded=trace.meta_at is not None,
        duration_ns=trace.meta.get("duration_ns"),
    )
    unit_ts = unit_stamps(stamps, good & ~checks.misdated)
    pages = np.ones(count, np.int64)
    return Stream(index, buffer.name, cpu.cpu, layout, offset, pages, unit_ts, None, faults, checks)


def _end_faults(trace: TraceDat) -> list[Fault]:
    """Return what contradicts itself at the end of the file, where our recorder's metadata stand behind all pages."""
    end = max((cpu.offset + cpu.size for buffer in trace.buffers for cpu in buffer.cpus if cpu.size), default=0)
    if trace.meta_at is None:
        cut = bytes(trace.data[end : end + len(META_BEGIN)]) == META_BEGIN
        found = f"their first {len(trace.data) - end} bytes"
        return [Fault(end, None, "the recorder's metadata", found)] if cut else []
    if trace.meta_broken:
        return [Fault(trace.meta_at, None, "the recorder's metadata", "no JSON object")]
    if end > trace.meta_at:
        return [
            Fault(trace.meta_at, None, f"pages up to {end:#x}", "the recorder's metadata: bytes are missing before")
        ]
    return []


class PageSource:
    """All streams of a trace.dat.

    Parameters
    ----------
    trace : TraceDat

    Attributes
    ----------
    streams : list of Stream
    packed : bool, some are compressed
    mapped : bool, pages are used where they stand in the file, nothing is copied
    shared : bool, all that is loaded lies in one buffer
    faults : what is wrong with the file as a whole
    holes : bool, bytes are missing nobody knows where: any page may lack its predecessor
    """

    def __init__(self, trace: TraceDat) -> None:
        self._trace = trace
        self._words = as_words(trace.data)
        self.streams: list[Stream] = []
        taken = overlapping(trace)
        for number, buffer in enumerate(trace.buffers):
            layout = self._layout(buffer)
            for position, cpu in enumerate(buffer.cpus):
                if cpu.cpu > MAX_CPU:
                    raise FormatError(trace.path, None, f"a CPU number up to {MAX_CPU}", str(cpu.cpu))
                make = chunked_stream if buffer.compressed else _mapped_stream
                other = taken.get((number, position))
                own = cpu if other is None else replace(cpu, size=0)
                self.streams.append(make(trace, buffer, own, layout, len(self.streams)))
                if other is not None:
                    found = f"those of CPU {other.cpu} from {other.offset:#x}"
                    self.streams[-1].faults.append(Fault(cpu.offset, cpu.cpu, f"pages of CPU {cpu.cpu} alone", found))
        self.faults = _end_faults(trace)
        self.holes = bool(self.faults) and trace.meta_at is not None and not trace.meta_broken
        self.packed = any(s.packed is not None for s in self.streams)
        self.mapped = not any(s.packed is not None or (s.n_units and s.offset[0] % 4) for s in self.streams)
        self._kept = KeptPages(trace, self.streams) if KeptPages.fit(self.streams) else None
        if self._kept is not None:
            self._words = as_words(self._kept.content)
        else:
            for stream in self.streams:
                if stream.packed is not None:
                    read_begins(trace, stream)
        self.shared = self.mapped or self._kept is not None

    def _layout(self, buffer: Buffer) -> PageLayout:
        """Return the layout of a buffer's pages; version 7 states a page size for each buffer."""
        layout, size = self._trace.layout, buffer.page_size
        if size == layout.page_size:
            return layout
        if not layout.data_offset < size <= 1 << 20 or size % 4:
            raise FormatError(self._trace.path, None, f"a page size for buffer {buffer.name!r}", str(size))
        return type(layout)(layout.commit_size, layout.data_offset, size - layout.data_offset)

    def load(self, spans: Sequence[Span]) -> Loaded:
        """Return the pages of some units; of an uncompressed file nothing is copied."""
        if self.mapped:
            offsets = [span.stream.offset[span.first : span.last] for span in spans]
            units = [np.arange(span.first, span.last) for span in spans]
            return Loaded(self._words, [offset // 4 for offset in offsets], offsets, units, [])
        if self._kept is None:
            return self._copy(spans)
        loaded = Loaded(self._words)
        for span in spans:
            loaded.add_pages(span, self._kept.place(span))
            loaded.faults += self._kept.faults(span)
        return loaded

    def release(self, stream: Stream, first: int, last: int) -> None:
        """Let go of the memory of units first..last; they are read from the file again if asked for."""
        if self.mapped and last > first:
            end = int(stream.offset[last - 1]) + stream.layout.page_size
            release_mapped(self._trace.data, int(stream.offset[first]), end)

    def _copy(self, spans: Sequence[Span]) -> Loaded:
        sizes = [int(s.stream.pages[s.first : s.last].sum()) * s.stream.layout.page_size for s in spans]
        buffer = np.zeros(sum(sizes), np.uint8)  # what cannot be decompressed: events are missing, and are said to be
        loaded = Loaded(as_words(buffer))
        at = 0
        for span, size in zip(spans, sizes, strict=True):
            loaded.faults += self._fill(span, buffer[at : at + size])
            loaded.add_pages(span, at)
            at += size
        return loaded

    def _fill(self, span: Span, out: NDArray[np.uint8]) -> list[Fault]:
        """Put the pages of a span where they are wanted."""
        stream = span.stream
        if stream.packed is not None:
            return unpack(self._trace, span, out)
        begin = int(stream.offset[span.first]) if span.last > span.first else 0
        out[:] = np.frombuffer(self._trace.data, np.uint8, len(out), begin)
        return []
