"""The ring-buffer pages of each CPU of a trace.dat: where they are, and what of them is in memory."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.formats.trace_dat.ring_buffer import COMMIT_MASK
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.formats.trace_dat.page_checks import PageChecks
    from kvmtrace.table.format_text import PageLayout

HEAD_BYTES = 12  # of a page: what says when it begins and how much it holds


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
        whose commit word or time stamp is impossible, the unit's before, of the first ones the one after
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
    pages: list[NDArray[np.int64]] = field(default_factory=list)
    offsets: list[NDArray[np.int64]] = field(default_factory=list)
    units: list[NDArray[np.int64]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def add_pages(self, span: Span, at: int) -> None:
        """Take in the pages of a span, which stand one behind the other from byte `at` on."""
        stream = span.stream
        counts = stream.pages[span.first : span.last]
        self.pages.append((at + np.arange(int(counts.sum())) * stream.layout.page_size) // 4)
        self.offsets.append(np.repeat(stream.offset[span.first : span.last], counts))
        self.units.append(np.repeat(np.arange(span.first, span.last), counts))


def read_heads(heads: NDArray[np.uint8], layout: PageLayout) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Return the time stamps of units, and which of them are good, from the first 12 bytes of each, shape (n, 12)."""
    stamps = np.ascontiguousarray(heads[:, :8]).view("<u8").reshape(-1)
    size = np.ascontiguousarray(heads[:, 8:]).view("<u4").reshape(-1) & COMMIT_MASK
    return stamps, (size > 0) & (size <= layout.data_size) & (size % 4 == 0)


def unit_stamps(stamps: NDArray[np.uint64], good: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Return the time stamps; in place of one that is not good the one before, of the first ones the one after."""
    if not good.any():
        return np.zeros(len(good), np.uint64)
    last_good = np.maximum.accumulate(np.where(good, np.arange(len(good)), -1))
    return stamps[np.where(last_good >= 0, last_good, np.argmax(good))].astype(np.uint64)
