"""Where the ring-buffer pages of each CPU are, and how some of them are brought into memory.

Pages are handed out in units that can be loaded alone: single pages of a mapped file, or compressed chunks.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.errors import FormatError
from kvmtrace.formats.trace_dat.page_checks import ORDERED_CLOCKS, check_stamps
from kvmtrace.formats.trace_dat.ring_buffer import COMMIT_MASK, as_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvmtrace.formats.trace_dat.page_checks import PageChecks
    from kvmtrace.formats.trace_dat.trace_dat_layout import Buffer, CpuData, TraceDat
    from kvmtrace.table.format_text import PageLayout


MAX_CPU = 32767
KEPT_TABLES = 2  # of a mapped file: a second thread may still decode fields of them (events/beside.py)
META_BEGIN = b'{"schema"'
SCAN_BYTES = 32 << 20  # of a mapped file whose page headers are read before the pages are let go


def release_mapped(data: memoryview, first: int, last: int) -> None:
    """Let go of the memory of bytes first..last of a mapped file; they come back from the file if asked for."""
    if not isinstance(data.obj, mmap.mmap):
        return
    begin, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        data.obj.madvise(mmap.MADV_DONTNEED, begin, end - begin)


@dataclass(frozen=True)
class Fault:
    """Bytes of a CPU that cannot be read: what should be at file offset `offset`."""

    offset: int
    cpu: int | None
    expected: str
    found: str
    page: int | None = None  # in the stream; None: after its last page


@dataclass
class Stream:
    """The pages of one CPU of one buffer.

    Parameters
    ----------
    index : int, position among the streams; ties of time are broken by it
    buffer : str, instance name
    cpu : int
    layout : PageLayout
    offset : int64, shape (n_units,), file offset of each unit
    pages : int64, shape (n_units,), whole pages in each unit
    unit_ts : uint64, shape (n_units,), time stamp of each unit's first page; of pages that hold nothing, or
        whose commit word or time stamp is impossible, the unit's before
    packed : int64, shape (n_units,), bytes in the file of compressed units; None if they are not
    faults : parts that are missing
    checks : PageChecks of units that are single pages, None of others
    """

    index: int
    buffer: str
    cpu: int
    layout: PageLayout
    offset: NDArray[np.int64]
    pages: NDArray[np.int64]
    unit_ts: NDArray[np.uint64]
    packed: NDArray[np.int64] | None = None
    faults: list[Fault] = field(default_factory=list)
    checks: PageChecks | None = None

    @property
    def n_units(self) -> int:
        """How many units there are."""
        return len(self.offset)


@dataclass(frozen=True)
class Span:
    """Units first..last (exclusive) of a stream."""

    stream: Stream
    first: int
    last: int


@dataclass
class Loaded:
    """Pages in memory.

    Parameters
    ----------
    words : the buffer as little-endian u32
    pages : per span, int64, word index of each page
    offsets : per span, int64, file offset of each page (of its chunk, if compressed)
    units : per span, int64, unit of each page
    faults : units that could not be decompressed (their pages are zeros)
    """

    words: NDArray[np.uint32]
    pages: list[NDArray[np.int64]]
    offsets: list[NDArray[np.int64]]
    units: list[NDArray[np.int64]]
    faults: list[Fault]


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


def _read_heads(heads: NDArray[np.uint8], layout: PageLayout) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return the time stamps of units, and which of them are good, from the first 12 bytes of each, shape (n, 12)."""
    stamps = np.ascontiguousarray(heads[:, :8]).view("<u8").reshape(-1)
    size = np.ascontiguousarray(heads[:, 8:]).view("<u4").reshape(-1) & COMMIT_MASK
    return stamps, (size > 0) & (size <= layout.data_size) & (size % 4 == 0)


def _unit_stamps(stamps: NDArray[np.uint64], good: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Return the time stamps with those that are not good replaced by the one before."""
    last_good = np.maximum.accumulate(np.where(good, np.arange(len(good)), -1)) if len(good) else good
    return np.where(last_good >= 0, stamps[last_good], 0).astype(np.uint64)


def _mapped_stream(trace: TraceDat, buffer: Buffer, cpu: CpuData, layout: PageLayout, index: int) -> Stream:
    faults: list[Fault] = []
    start, count = _clip_range(trace, cpu, layout.page_size, faults)
    offset = start + np.arange(count, dtype=np.int64) * layout.page_size
    heads = np.zeros((count, 12), np.uint8)
    block = max(SCAN_BYTES // layout.page_size, 1)
    for first in range(0, count, block):
        size, at = min(block, count - first) * layout.page_size, start + first * layout.page_size
        part = np.frombuffer(trace.data, np.uint8, size, at).reshape(-1, layout.page_size)
        heads[first : first + block] = part[:, :12]
        release_mapped(trace.data, at, at + size)
    stamps, good = _read_heads(heads, layout)
    checks = check_stamps(
        stamps,
        good,
        ordered=(buffer.clock or trace.clock) in ORDERED_CLOCKS,
        padded=trace.meta_at is not None,
        duration_ns=trace.meta.get("duration_ns"),
    )
    unit_ts = _unit_stamps(stamps, good & ~checks.misdated)
    pages = np.ones(count, np.int64)
    return Stream(index, buffer.name, cpu.cpu, layout, offset, pages, unit_ts, None, faults, checks)


def _chunk_list(trace: TraceDat, cpu: CpuData, layout: PageLayout, faults: list[Fault]) -> list[tuple[int, int, int]]:
    """Return (offset, packed size, pages) of each chunk of a CPU, up to the first impossible one."""
    assert trace.decompressor is not None
    total, at = len(trace.data), cpu.offset + 4
    if at > total:
        faults.append(Fault(min(cpu.offset, total), cpu.cpu, "compressed pages", "the end of the file"))
        return []
    count = int.from_bytes(trace.data[cpu.offset : at], "little")
    chunks: list[tuple[int, int, int]] = []
    for _ in range(count):
        packed, size = (int.from_bytes(trace.data[at + i : at + i + 4], "little") for i in (0, 4))
        if at + 8 + packed > total:
            faults.append(Fault(at, cpu.cpu, f"a compressed chunk of {packed} bytes", "the end of the file"))
            break
        try:
            trace.decompressor.validate_size(packed, size, at)
        except FormatError as error:
            faults.append(Fault(at, cpu.cpu, error.expected, error.found))
            break
        chunks.append((at + 8, packed, size // layout.page_size))
        at += 8 + packed
    return chunks


def _chunked_stream(trace: TraceDat, buffer: Buffer, cpu: CpuData, layout: PageLayout, index: int) -> Stream:
    faults: list[Fault] = []
    chunks = _chunk_list(trace, cpu, layout, faults) if cpu.size else []
    offset, packed, pages = (
        np.array(column, np.int64) for column in (zip(*chunks, strict=True) if chunks else ([], [], []))
    )
    heads = np.zeros((len(offset), 12), np.uint8)
    assert trace.decompressor is not None
    for i, (at, size) in enumerate(zip(offset.tolist(), packed.tolist(), strict=True)):
        head = trace.decompressor.first_bytes(trace.data[at : at + size], 12)
        # a chunk that cannot be decompressed is found again, and named, when its pages are wanted
        heads[i, : len(head)] = np.frombuffer(head, np.uint8)
    unit_ts = _unit_stamps(*_read_heads(heads, layout))
    return Stream(index, buffer.name, cpu.cpu, layout, offset, pages, unit_ts, packed, faults)


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
    mapped : bool, pages are used where they stand in the file, nothing is copied
    faults : what is wrong with the file as a whole
    holes : bool, bytes are missing nobody knows where: any page may lack its predecessor
    """

    def __init__(self, trace: TraceDat) -> None:
        self._trace = trace
        self._words = as_words(trace.data)
        self.streams: list[Stream] = []
        for buffer in trace.buffers:
            layout = self._layout(buffer)
            for cpu in buffer.cpus:
                if cpu.cpu > MAX_CPU:
                    raise FormatError(trace.path, None, f"a CPU number up to {MAX_CPU}", str(cpu.cpu))
                make = _chunked_stream if buffer.compressed else _mapped_stream
                self.streams.append(make(trace, buffer, cpu, layout, len(self.streams)))
        self.faults = _end_faults(trace)
        self.holes = bool(self.faults) and trace.meta_at is not None and not trace.meta_broken
        self.mapped = not any(s.packed is not None or (s.n_units and s.offset[0] % 4) for s in self.streams)

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
        return self._copy(spans)

    def release(self, stream: Stream, first: int, last: int) -> None:
        """Let go of the memory of units first..last; they are read from the file again if asked for."""
        if self.mapped and last > first:
            end = int(stream.offset[last - 1]) + stream.layout.page_size
            release_mapped(self._trace.data, int(stream.offset[first]), end)

    def _copy(self, spans: Sequence[Span]) -> Loaded:
        sizes = [int(s.stream.pages[s.first : s.last].sum()) * s.stream.layout.page_size for s in spans]
        buffer = bytearray(sum(sizes))
        loaded = Loaded(as_words(buffer), [], [], [], [])
        at = 0
        for span in spans:
            pages: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
            offsets = [np.empty(0, np.int64)]
            units = [np.empty(0, np.int64)]
            page = int(span.stream.pages[: span.first].sum())
            for unit in range(span.first, span.last):
                count = int(span.stream.pages[unit])
                part = self._unit(span.stream, unit, page, loaded.faults)
                size = count * span.stream.layout.page_size
                if part is not None:  # else pages of zeros: events are missing here, and are said to be
                    buffer[at : at + size] = part
                pages.append((at + np.arange(count) * span.stream.layout.page_size) // 4)
                offsets.append(np.full(count, span.stream.offset[unit]))
                units.append(np.full(count, unit))
                at += size
                page += count
            loaded.pages.append(np.concatenate(pages))
            loaded.offsets.append(np.concatenate(offsets))
            loaded.units.append(np.concatenate(units))
        return loaded

    def _unit(self, stream: Stream, unit: int, page: int, faults: list[Fault]) -> bytes | memoryview | None:
        """Return the bytes of one unit, None (and a fault) where it cannot be decompressed."""
        offset, size = int(stream.offset[unit]), int(stream.pages[unit]) * stream.layout.page_size
        if stream.packed is None:
            return self._trace.data[offset : offset + size]
        assert self._trace.decompressor is not None
        packed = self._trace.data[offset : offset + int(stream.packed[unit])]
        try:
            return self._trace.decompressor.decompress(packed, size, offset)
        except FormatError as error:
            faults.append(Fault(offset, stream.cpu, error.expected, error.found, page))
            return None
