"""Ring-buffer pages -> records, all pages of a batch in lockstep (step k of every page at once).

A page is a time stamp, a commit word and records, each led by a word with a 5-bit type_len and a 27-bit
time delta. Only the walk from record to record is done in steps; the rest is one pass over all records. The compiled
kernel, where it was built, does both in one loop (kernel.c); the results are the same.

Source: include/linux/ring_buffer.h, enum ring_buffer_type; kernel/trace/ring_buffer.c; events/header_event
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native import RecordColumns, loaded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace._native import Kernel
    from kvmtrace.table.format_text import PageLayout

TYPE_PADDING, TYPE_TIME_EXTEND, TYPE_TIME_STAMP = 29, 30, 31
TS_SHIFT = 27  # bits of a time delta
TS_MSB = np.uint64(0xF8 << 56)  # absolute stamps lack these bits: they are the page's
RB_MISSED_EVENTS = 1 << 31  # in the commit word: events were lost before this page
RB_MISSED_STORED = 1 << 30  # ... and their number stands behind the last record
COMMIT_MASK = (1 << 27) - 1
SMALLEST_BIG_BYTES = 8  # of a big record: its length word, which counts itself, and one more
LOST_UNKNOWN = -1
NARROW_WORDS = 0xFFFFFF00  # in a buffer of fewer words a word index fits 32 bits, special values left over

# words from record to record by type_len; 0: look at the record (big records, padding)
_STEP = np.array([0, *range(2, 30), 0, 2, 2], np.int64)


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
    columns : the records' common fields, where they were asked for and the compiled kernel read them at once
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


def _odd_steps(
    words: NDArray[np.uint32], pos: NDArray[np.int64], heads: NDArray[np.uint32], left: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the words that big records (type_len 0) and padding occupy; `left` to the end of the page.

    The word behind the head is a length in bytes; of a big record it counts itself.
    """
    length = words.take(pos + 1, mode="clip").astype(np.int64)
    step = 1 + (length + 3) // 4
    padding = heads & 31 == TYPE_PADDING
    # padding without a time delta is the rest of the page; a big record that holds nothing is none
    step = np.where(padding & (heads >> 5 == 0), left, step)
    return np.where(~padding & (length < SMALLEST_BIG_BYTES), left + 1, step)


def _walk(
    words: NDArray[np.uint32], first: NDArray[np.int64], end: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_], list[PageDamage]]:
    """Follow the records of all pages; return (positions (steps, pages), which are records, damage).

    Every step advances each unfinished page by at least one word, so it ends after at most a page's words.
    """
    pos, steps, damage = first.copy(), [], []
    while True:
        live = pos < end
        n_live = np.count_nonzero(live)
        if not n_live:
            break
        steps.append(pos)
        heads = words.take(pos, mode="clip")
        step = _STEP.take(heads & 31)
        step *= live
        if np.count_nonzero(step) < n_live:
            odd = np.flatnonzero(live & (step == 0))
            step[odd] = _odd_steps(words, pos[odd], heads[odd], end[odd] - pos[odd])
        pos = pos + step
        over = pos > end
        if np.count_nonzero(over):
            for page in np.flatnonzero(over):
                damage.append(_overrun(words, int(page), int(steps[-1][page]), int(pos[page]), int(end[page])))
                end[page] = steps[-1][page]
            np.minimum(pos, end, out=pos)
    table = np.array(steps) if steps else np.empty((0, len(first)), np.int64)
    return table, table < end, damage


def _overrun(words: NDArray[np.uint32], page: int, word: int, stop: int, end: int) -> PageDamage:
    room = (end - word) * 4
    if word + 1 < len(words) and words[word] & 31 == 0 and words[word + 1] < SMALLEST_BIG_BYTES:
        return PageDamage(page, word, f"a record of at least {SMALLEST_BIG_BYTES} bytes", f"{words[word + 1]} bytes")
    return PageDamage(page, word, f"a record of at most {room} bytes", f"{(stop - word) * 4} bytes")


def _time_stamps(
    words: NDArray[np.uint32],
    at: NDArray[np.int64],
    heads: NDArray[np.uint32],
    counts: NDArray[np.int64],
    page_ts: NDArray[np.uint64],
) -> NDArray[np.uint64]:
    """Return the time stamp at every record: the page's, plus the deltas so far, or the last absolute one."""
    types = heads & 31
    delta = (heads >> 5).astype(np.uint64)
    long = np.flatnonzero(types >= TYPE_TIME_EXTEND)
    if len(long):
        delta[long] += words.take(at[long] + 1, mode="clip").astype(np.uint64) << np.uint64(TS_SHIFT)
    begins = np.cumsum(counts) - counts  # of each page; pages without records share their successor's
    absolute = np.flatnonzero(types == TYPE_TIME_STAMP)
    if not len(absolute):
        total: NDArray[np.uint64] = np.cumsum(delta)
        some = counts > 0
        base = page_ts[some] - (total[begins[some]] - delta[begins[some]])
        total += np.repeat(base, counts[some])
        return total
    some = counts > 0
    page_of = np.repeat(page_ts, counts)
    segment = np.union1d(begins[some], absolute)
    is_absolute = np.isin(segment, absolute, assume_unique=True)
    start_ts = np.where(is_absolute, delta[segment] | (page_of[segment] & TS_MSB), page_of[segment])
    delta[absolute] = 0
    total = np.cumsum(delta)
    base = start_ts - (total[segment] - delta[segment])
    total += np.repeat(base, np.diff(np.append(segment, len(at))))
    return total


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
    kernel = loaded()
    if kernel is None or not len(words):
        records = _decode_in_lockstep(words, first, end, headers)
    else:
        records = _decode_compiled(kernel, words, (first, end), headers, kind_of_id)
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


def _decode_compiled(
    kernel: Kernel,
    words: NDArray[np.uint32],
    span: tuple[NDArray[np.int64], NDArray[np.int64]],
    headers: PageHeaders,
    kind_of_id: NDArray[np.uint16] | None,
) -> Records:
    first, end = span
    whole = end.copy()
    counts, overruns = kernel.count_records(words, first, end)
    wide = np.dtype(np.uint32 if len(words) < NARROW_WORDS else np.int64)
    out = RecordColumns.empty(int(counts.sum()), wide, common=kind_of_id is not None)
    kernel.fill_records(words, first, end, headers.ts, kind_of_id=kind_of_id, out=out)
    damage = [_overrun(words, o.page, o.at, o.stop, int(whole[o.page])) for o in overruns]
    return Records(out.start, out.ts, counts, damage, None if kind_of_id is None else out)


def _decode_in_lockstep(
    words: NDArray[np.uint32], first: NDArray[np.int64], end: NDArray[np.int64], headers: PageHeaders
) -> Records:
    table, valid, damage = _walk(words, first, end)
    counts = valid.sum(axis=0)
    at = table.T[valid.T]
    heads = words[at]
    ts = _time_stamps(words, at, heads, counts, headers.ts)
    types = heads & 31
    data = types < TYPE_PADDING
    start = at + 1 + (types == 0)
    if data.all():
        return Records(start, ts, counts, damage)
    totals = np.concatenate(([0], np.cumsum(data)))
    ends = np.cumsum(counts)
    return Records(start[data], ts[data], totals[ends] - totals[ends - counts], damage)


def as_words(data: Any) -> NDArray[np.uint32]:
    """Return a buffer as little-endian u32 words; up to three odd bytes at the end are left out."""
    return np.frombuffer(data, np.dtype("<u4"), len(data) // 4)
