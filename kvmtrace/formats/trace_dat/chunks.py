"""Compressed pages of a trace.dat 7: chunks of some pages each, decompressed many at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.errors import FormatError
from kvmtrace.formats.trace_dat.page_streams import HEAD_BYTES, Fault, Span, Stream, read_heads, unit_stamps

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from kvmtrace.formats.trace_dat.trace_dat_sections import Buffer, CpuData, TraceDat
    from kvmtrace.table.format_text import PageLayout

KEPT_BYTES = 32 << 20  # of pages: a file of no more is decompressed once and kept
BATCH_BYTES = 8 << 20  # of pages that are decompressed in one call
AT_ONCE_BYTES = 32 << 20  # of chunks that begin at the same time, which are loaded together


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
            trace.decompressor.validate_chunk(packed, size, at)
        except FormatError as error:
            faults.append(Fault(at, cpu.cpu, error.expected, error.found))
            break
        chunks.append((at + 8, packed, size // layout.page_size))
        at += 8 + packed
    return chunks


def chunked_stream(trace: TraceDat, buffer: Buffer, cpu: CpuData, layout: PageLayout, index: int) -> Stream:
    """Return the chunks of one CPU; when they begin is not known yet, see KeptPages and read_begins."""
    faults: list[Fault] = []
    chunks = _chunk_list(trace, cpu, layout, faults) if cpu.size else []
    offset, packed, pages = (
        np.array(column, np.int64) for column in (zip(*chunks, strict=True) if chunks else ([], [], []))
    )
    return Stream(index, buffer.name, cpu.cpu, layout, offset, pages, np.zeros(len(pages), np.uint64), packed, faults)


def _batches(stream: Stream) -> Iterator[Span]:
    """Cut a stream into spans that are decompressed in one call each."""
    ends = np.cumsum(stream.pages) * stream.layout.page_size
    first = 0
    while first < stream.n_units:
        before = int(ends[first - 1]) if first else 0
        last = max(int(np.searchsorted(ends, before + BATCH_BYTES, "right")), first + 1)
        yield Span(stream, first, last)
        first = last


def unpack(trace: TraceDat, span: Span, out: NDArray[np.uint8]) -> list[Fault]:
    """Decompress the chunks of a span, one behind the other.

    Parameters
    ----------
    out : uint8, zeros; what cannot be decompressed leaves them

    Returns
    -------
    what could not be decompressed
    """
    faults: list[Fault] = []
    at = 0
    for batch in _batches(_part(span)):
        size = int(batch.stream.pages[batch.first : batch.last].sum()) * batch.stream.layout.page_size
        faults += _unpack_batch(trace, batch, out[at : at + size], int(span.stream.pages[: span.first].sum()))
        at += size
    return faults


def _part(span: Span) -> Stream:
    """Return the units of a span as a stream of their own."""
    stream, part = span.stream, slice(span.first, span.last)
    assert stream.packed is not None
    return Stream(
        stream.index,
        stream.buffer,
        stream.cpu,
        stream.layout,
        stream.offset[part],
        stream.pages[part],
        stream.unit_ts[part],
        stream.packed[part],
    )


def _unpack_batch(trace: TraceDat, batch: Span, out: NDArray[np.uint8], page: int) -> list[Fault]:
    """Decompress a batch; `page`: how many pages there are before its stream's first."""
    stream, part = batch.stream, slice(batch.first, batch.last)
    assert stream.packed is not None
    assert trace.decompressor is not None
    sizes = stream.pages[part] * stream.layout.page_size
    places = np.column_stack((stream.offset[part], stream.packed[part]))
    ends = np.cumsum(sizes)
    some = np.flatnonzero(sizes > 0)
    found = trace.decompressor.decompress_many(trace.data, places[some], sizes[some])
    if found is not None:
        for content, end in zip(found, ends[some].tolist(), strict=True):
            out[end - len(content) : end] = np.frombuffer(content, np.uint8)
        return []
    faults: list[Fault] = []
    first_pages = page + np.cumsum(stream.pages) - stream.pages
    for i, (offset, packed) in enumerate(places.tolist()):
        try:
            content = trace.decompressor.decompress(trace.data[offset : offset + packed], int(sizes[i]), offset)
        except FormatError as error:
            number = int(first_pages[batch.first + i])
            faults.append(Fault(offset, stream.cpu, error.expected, error.found, number))
        else:
            out[int(ends[i] - sizes[i]) : int(ends[i])] = np.frombuffer(content, np.uint8)
    return faults


def _set_begins(stream: Stream, span: Span, pages: NDArray[np.uint8], heads: NDArray[np.uint8]) -> None:
    """Keep the heads of the units of a span, whose pages these are."""
    counts = stream.pages[span.first : span.last]
    size = stream.layout.page_size
    starts = (np.cumsum(counts) - counts) * size
    some = np.flatnonzero(counts > 0)
    heads[span.first + some] = pages[starts[some, None] + np.arange(HEAD_BYTES)]


def read_begins(trace: TraceDat, stream: Stream) -> None:
    """Read when each chunk of a stream begins, which means to decompress them all.

    A chunk that cannot be decompressed is found again, and named, when its pages are wanted.
    """
    heads = np.zeros((stream.n_units, HEAD_BYTES), np.uint8)
    for batch in _batches(stream):
        size = int(stream.pages[batch.first : batch.last].sum()) * stream.layout.page_size
        pages = np.zeros(size, np.uint8)
        _unpack_batch(trace, batch, pages, 0)
        _set_begins(stream, batch, pages, heads)
    stream.unit_ts = unit_stamps(*read_heads(heads, stream.layout))


def drop_simultaneous(begins: Sequence[NDArray[np.int64]], streams: Sequence[Stream]) -> None:
    """Let go of chunks that begin at the same time as so many others that they could not be loaded together.

    Time goes on in a recording; where it does not, or goes back, chunks were made to become large at once.

    Parameters
    ----------
    begins : int64, of each stream, when each unit begins, ascending
    """
    pages = np.concatenate([stream.pages * stream.layout.page_size for stream in streams])
    if not len(pages) or pages.sum() <= AT_ONCE_BYTES:
        return
    _, group = np.unique(np.concatenate(begins), return_inverse=True)
    if np.bincount(group, pages).max() <= AT_ONCE_BYTES:
        return
    order = np.argsort(group, kind="stable")
    total = np.cumsum(pages[order])
    first = np.searchsorted(group[order], group[order])
    so_far = np.empty_like(total)
    so_far[order] = total - (total - pages[order])[first]
    bounds = np.cumsum([0, *(stream.n_units for stream in streams)]).tolist()
    for stream, start, stop in zip(streams, bounds[:-1], bounds[1:], strict=True):
        gone = np.flatnonzero(so_far[start:stop] > AT_ONCE_BYTES)
        if len(gone) and stream.packed is not None:
            stream.pages[gone] = 0
            offset, found = int(stream.offset[gone[0]]), f"{len(gone)} that begin at the same time as many others"
            stream.faults.append(Fault(offset, stream.cpu, "chunks that begin one after the other", found))


class KeptPages:
    """All pages of a small file, decompressed once.

    Parameters
    ----------
    trace : TraceDat
    streams : all of them compressed
    """

    def __init__(self, trace: TraceDat, streams: Sequence[Stream]) -> None:
        sizes = [int(stream.pages.sum()) * stream.layout.page_size for stream in streams]
        self.content = np.zeros(sum(sizes), np.uint8)
        self._begins = np.cumsum([0, *sizes])
        self._faults: list[list[Fault]] = []
        for stream, begin, size in zip(streams, self._begins.tolist(), sizes, strict=False):
            pages, whole = self.content[begin : begin + size], Span(stream, 0, stream.n_units)
            self._faults.append(unpack(trace, whole, pages))
            heads = np.zeros((stream.n_units, HEAD_BYTES), np.uint8)
            _set_begins(stream, whole, pages, heads)
            stream.unit_ts = unit_stamps(*read_heads(heads, stream.layout))

    @staticmethod
    def fit(streams: Sequence[Stream]) -> bool:
        """Say whether these are few enough pages, all compressed."""
        total = sum(int(stream.pages.sum()) * stream.layout.page_size for stream in streams)
        return total <= KEPT_BYTES and bool(streams) and all(stream.packed is not None for stream in streams)

    def place(self, span: Span) -> int:
        """Return the byte where the pages of a span begin."""
        before = int(span.stream.pages[: span.first].sum()) * span.stream.layout.page_size
        return int(self._begins[span.stream.index]) + before

    def faults(self, span: Span) -> list[Fault]:
        """Return what could not be decompressed of a span."""
        first, last = (int(span.stream.pages[:unit].sum()) for unit in (span.first, span.last))
        return [
            fault for fault in self._faults[span.stream.index] if fault.page is not None and first <= fault.page < last
        ]
