"""What contradicts itself in a CPU's pages although every page can be decoded: flipped bits in time stamps and lengths.

Only what cannot occur in a healthy recording counts. Time stamps are held against their neighbours' where the
clock is one that never steps back on a CPU. Pages are held against the zeros behind their records in recordings of
kvmtrace's own: the kernel zeroes the rest of a page that it hands over (others may have mapped the buffer). Compressed
chunks are not looked into before they are read: of their pages only the lengths are checked.

Source: kernel/trace/ring_buffer.c, ring_buffer_read_page(); Documentation/trace/ftrace.rst, trace_clock
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.formats.trace_dat.ring_buffer import RB_MISSED_STORED, PageDamage
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.formats.trace_dat.ring_buffer import PageHeaders, Records
    from kvmtrace.table.format_text import PageLayout

ORDERED_CLOCKS = frozenset({"mono", "mono_raw", "global", "counter"})
SLACK = 1 << 16  # ns: "mono" may step back by less when the kernel corrects its speed
SPARE_NS = 1_000_000_000  # by which the recorder may have measured the recording too short, and besides, as its
SPARE_SHARE = 100  # clock may be another than the trace's (mono_raw is not slewed, at most 0.05 %), a hundredth of it
PAGE_HEADER_BYTES = 16
END_OF_TIME = np.iinfo(np.uint64).max


@dataclass(frozen=True)
class PageChecks:
    """What is known of some pages of a stream from the others.

    Parameters
    ----------
    misdated : bool, shape (n,), the page's time stamp is out of order
    latest : uint64, shape (n,), no record of the page can be later
    padded : bool, the rest of each page behind its records is zero, and every event that occurs is described: the
        recording is our recorder's
    """

    misdated: NDArray[np.bool_]
    latest: NDArray[np.uint64]
    padded: bool

    def of(self, units: NDArray[np.int64]) -> PageChecks:
        """Return the checks of some pages."""
        return PageChecks(self.misdated[units], self.latest[units], self.padded)


def check_stamps(
    ts: NDArray[np.uint64], good: NDArray[np.bool_], *, ordered: bool, padded: bool, duration_ns: float | None = None
) -> PageChecks:
    """Compare the time stamps of a stream's pages.

    Parameters
    ----------
    ts : uint64, shape (n,), of all pages in file order
    good : bool, shape (n,), which of them are pages
    ordered : bool, the clock never steps back
    padded : see PageChecks
    duration_ns : how long the recording took, if it is known
    """
    misdated = np.zeros(len(ts), np.bool_)
    latest = np.full(len(ts), END_OF_TIME)
    if ordered:
        at = np.flatnonzero(good)
        misdated[at] = _out_of_order(ts[at])
        if duration_ns is not None and duration_ns >= 0 and len(at) > 2:
            misdated[at] |= _beyond(ts[at], int(duration_ns) + int(duration_ns) // SPARE_SHARE + SPARE_NS)
        at = at[~misdated[at]]
        latest[at[:-1]] = np.minimum(ts[at[1:]], END_OF_TIME - SLACK) + np.uint64(SLACK)
    return PageChecks(misdated, latest, padded)


def _out_of_order(ts: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Say which time stamps must be wrong: those without which the rest is in order; both of a pair if in doubt."""
    wrong = np.zeros(len(ts), np.bool_)
    first = np.flatnonzero(_later(ts[:-1], ts[1:]))  # the earlier one of each pair that is not in order
    padded = np.concatenate((ts[:1] * 0, ts, ts[:1] * 0 + END_OF_TIME))
    without_first = ~_later(padded[first], ts[first + 1])
    without_second = ~_later(ts[first], padded[first + 3])
    wrong[first[without_first | ~without_second]] = True
    wrong[first[without_second | ~without_first] + 1] = True
    return wrong


def _beyond(ts: NDArray[np.uint64], longest: int) -> NDArray[np.bool_]:
    """Say which time stamps are further from the middle one than the recording was long."""
    middle = ts[np.argsort(ts, kind="stable")[len(ts) // 2]]
    distance: NDArray[np.uint64] = np.where(ts > middle, ts - middle, middle - ts)
    return distance > np.uint64(min(longest, END_OF_TIME))


def _later(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.bool_]:
    return (a > b) & (a - b > SLACK)


def wrong_times(
    pages: NDArray[np.int64], headers: PageHeaders, records: Records, checks: PageChecks
) -> list[PageDamage]:
    """Return pages whose time stamps cannot be: nothing in them has a time that is known.

    Parameters
    ----------
    pages : int64, shape (n,), word index of each page
    headers, records : of these pages
    checks : of these pages
    """
    ends = np.cumsum(records.page_counts)
    some = records.page_counts > 0
    last = headers.ts.copy()
    last[some] = records.ts[ends[some] - 1]
    late = (last > checks.latest) & (headers.size >= 0) & ~checks.misdated
    damage = [
        PageDamage(page, int(pages[page]), "a time stamp in order with the pages beside", str(headers.ts[page]))
        for page in np.flatnonzero(checks.misdated).tolist()
    ]
    return damage + [
        PageDamage(
            page, int(pages[page]), f"no event later than the next page, {checks.latest[page]}", f"one at {last[page]}"
        )
        for page in np.flatnonzero(late).tolist()
    ]


def undescribed(
    words: NDArray[np.uint32],
    pages: NDArray[np.int64],
    headers: PageHeaders,
    records: Records,
    unknown: NDArray[np.bool_],
) -> list[PageDamage]:
    """Return pages with an event that the recording does not describe: some length before it is wrong.

    Such a page is cut (in `headers`) before the event that precedes: the damage may begin in it.

    Parameters
    ----------
    words : the buffer as little-endian u32
    pages : int64, shape (n,), word index of each page
    headers, records : of these pages
    unknown : bool, which of the records are such events
    """
    rows = np.flatnonzero(unknown)
    if not len(rows):
        return []
    ends = np.cumsum(records.page_counts)
    broken, first = np.unique(np.searchsorted(ends, rows, side="right"), return_index=True)
    damage = []
    for page, row in zip(broken.tolist(), rows[first].tolist(), strict=True):
        begin = int(ends[page] - records.page_counts[page])
        head = int(records.start[max(row - 1, begin)]) - 1
        headers.size[page] = max(4 * (head - int(pages[page])) - PAGE_HEADER_BYTES, min(int(headers.size[page]), 0))
        at = int(records.start[row])
        damage.append(PageDamage(page, at, "an event that the recording describes", f"event {words[at] & 0xFFFF}"))
    return damage


def rest_not_empty(
    words: NDArray[np.uint32], pages: NDArray[np.int64], headers: PageHeaders, layout: PageLayout
) -> list[PageDamage]:
    """Return pages with something behind their records: their length is wrong, and records are missing.

    Parameters
    ----------
    words : the buffer as little-endian u32
    pages : int64, shape (n,), word index of each page
    headers : PageHeaders of these pages
    layout : PageLayout
    """
    stored = words[pages + 2] & np.uint32(RB_MISSED_STORED) != 0
    used = np.maximum(headers.size, 0) + stored * layout.commit_size
    room = (headers.size >= 0) & (used < layout.data_size)
    at = pages[room] + (layout.data_offset + used[room]) // 4
    more = np.flatnonzero(words[at])
    return [
        PageDamage(
            int(np.flatnonzero(room)[i]), int(at[i]), "nothing behind the page's records", f"{int(words[at[i]]):#x}"
        )
        for i in more.tolist()
    ]
