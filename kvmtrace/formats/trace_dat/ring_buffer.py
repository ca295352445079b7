"""Ring-buffer pages -> records.

A page is a time stamp, a commit word and records, each led by a word with a 5-bit type_len and a 27-bit time delta. The
walk from record to record is compiled (_native/ring_records.c).

Source: include/linux/ring_buffer.h, enum ring_buffer_type; kernel/trace/ring_buffer.c; events/header_event
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native import ring_records
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace._native.ring_records import RecordColumns
    from kvmtrace.table.format_text import PageLayout

RB_MISSED_EVENTS = 1 << 31  # in the commit word: events were lost before this page
RB_MISSED_STORED = 1 << 30  # ... and their number stands behind the last record
COMMIT_MASK = (1 << 27) - 1
SMALLEST_BIG_BYTES = 8  # of a big record: its length word, which counts itself, and one more
LOST_UNKNOWN = -1
NARROW_WORDS = 0xFFFFFF00  # in a buffer of fewer words a word index fits 32 bits, special values left over


@dataclass(frozen=True)
class PageHeaders:
    """The headers of n pages.

    Parameters
    ----------
    ts : uint64, shape (n,), the clock's unit, of the page's first record's base
    size : int64, shape (n,), bytes of records; -1 where the commit word is impossible or the page is none
    lost : int64, shape (n,), events lost before the page, LOST_UNKNOWN if not counted
    """

    ts: NDArray[np.uint64]
    size: NDArray[np.int64]
    lost: NDArray[np.int64]


@dataclass(frozen=True)
class PageDamage:
    """Where page `page` of a batch stops making sense: word index `word` of the buffer."""

    page: int
    word: int
    expected: str
    found: str


@dataclass(frozen=True)
class Records:
    """Data records of a batch of pages, in page order and within it in recorded order.

    Parameters
    ----------
    start : shape (n,), word index of each record's data in the buffer
    ts : uint64, shape (n,), time stamp in the clock's unit
    page_counts : int64, shape (n_pages,), records per page
    damage : what could not be read, by page; the rest of such a page is left out
    columns : the records' common fields, where they were asked for
    """

    start: NDArray[Any]
    ts: NDArray[np.uint64]
    page_counts: NDArray[np.int64]
    damage: list[PageDamage]
    columns: RecordColumns | None = None


def read_page_headers(words: NDArray[np.uint32], pages: NDArray[np.int64], layout: PageLayout) -> PageHeaders:
    """Read the headers of pages.

    Parameters
    ----------
    words : the buffer as little-endian u32
    pages : int64, shape (n,), word index of each page; whole pages lie in the buffer
    layout : PageLayout
    """
    ts = words[pages].astype(np.uint64) | words[pages + 1].astype(np.uint64) << np.uint64(32)
    commit = words[pages + 2].astype(np.int64)
    size = commit & COMMIT_MASK
    lost = np.where(commit & (RB_MISSED_EVENTS | RB_MISSED_STORED), LOST_UNKNOWN, 0)
    # no page is written without events: one of zeros is a hole in the file
    impossible = (size > layout.data_size) | (size & 3 != 0) | ((size == 0) & (ts == 0))
    size[impossible] = -1
    lost[impossible] = 0  # the flags are as wrong
    stored = np.flatnonzero(
        (commit & RB_MISSED_STORED != 0) & (lost != 0) & (size >= 0) & (size + layout.commit_size <= layout.data_size)
    )
    if len(stored):
        at = pages[stored] + (layout.data_offset + size[stored]) // 4
        count = words[at].astype(np.int64)
        if layout.commit_size == 8:
            count |= (words[at + 1].astype(np.int64) & 0x7FFFFFFF) << 32
        lost[stored] = np.where(count, count, LOST_UNKNOWN)
    return PageHeaders(ts, size, lost)


def _overrun(words: NDArray[np.uint32], page: int, word: int, stop: int, end: int) -> PageDamage:
    room = (end - word) * 4
    if word + 1 < len(words) and words[word] & 31 == 0 and words[word + 1] < SMALLEST_BIG_BYTES:
        return PageDamage(page, word, f"a record of at least {SMALLEST_BIG_BYTES} bytes", f"{words[word + 1]} bytes")
    return PageDamage(page, word, f"a record of at most {room} bytes", f"{(stop - word) * 4} bytes")


def decode_pages(
    words: NDArray[np.uint32],
    pages: NDArray[np.int64],
    headers: PageHeaders,
    layout: PageLayout,
    kind_of_id: NDArray[np.uint16] | None = None,
) -> Records:
    """Decode pages into records.

    Parameters
    ----------
    words : the buffer as little-endian u32
    pages : int64, shape (n,), word index of each page
    headers : PageHeaders of these pages
    layout : PageLayout
    kind_of_id : uint16, shape (65536,), where the common fields are wanted and lie where they usually do

    Returns
    -------
    Records; time extends, time stamps, padding and discarded events are taken in and left out
    """
    first = pages + layout.data_offset // 4
    end = first + np.maximum(headers.size, 0) // 4
    wide = np.dtype(np.uint32 if len(words) < NARROW_WORDS else np.int64)
    out, counts, overruns = ring_records.decode_records(words, (first, end), headers.ts, kind_of_id, wide)
    damage = [_overrun(words, o.page, o.at, o.stop, int(end[o.page])) for o in overruns]
    records = Records(out.start, out.ts, counts, damage, None if kind_of_id is None else out)
    for page in np.flatnonzero(headers.size < 0).tolist():
        word = int(pages[page]) + 2
        commit = int(words[word])
        records.damage.append(
            PageDamage(
                page,
                word,
                f"a commit of at most {layout.data_size} bytes",
                f"the commit word {commit:#x}" if commit else "a page of zeros",
            )
        )
    records.damage.sort(key=lambda damage: damage.page)
    return records


def as_words(data: Any) -> NDArray[np.uint32]:
    """Return a buffer as little-endian u32 words; up to three odd bytes at the end are left out."""
    return np.frombuffer(data, np.dtype("<u4"), len(data) // 4)
