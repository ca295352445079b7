"""Ring-buffer pages -> rows of the event table, lost events among them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.formats.trace_dat.page_checks import rest_not_empty, undescribed, wrong_times
from kvmtrace.formats.trace_dat.page_streams import Fault
from kvmtrace.formats.trace_dat.ring_buffer import (
    LOST_UNKNOWN,
    NARROW_WORDS,
    PageDamage,
    PageHeaders,
    Records,
    decode_pages,
    read_page_headers,
)
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.table.common_fields import gather_common, has_usual_common
from kvmtrace.table.merge import Rows, order_keys

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.formats.trace_dat.clock import TimeConverter
    from kvmtrace.formats.trace_dat.page_checks import PageChecks
    from kvmtrace.table.format_text import PageLayout
    from kvmtrace.table.kinds import KindTable


@dataclass
class StreamRows:
    """What the pages of one CPU gave.

    Parameters
    ----------
    rows : Rows in buffer order
    keys : int64, shape (n,), times to merge by
    page_rows : int64, shape (n_pages,), rows per page, lost events included
    page_floor : int64, shape (n_pages,), the least key of each page's rows
    faults : pages that could not be read to their end
    """

    rows: Rows
    keys: NDArray[np.int64]
    page_rows: NDArray[np.int64]
    page_floor: NDArray[np.int64]
    faults: list[Fault]


@dataclass(frozen=True)
class _Losses:
    """Lost events of a batch: `before` row number `at` stands one of `count` events."""

    at: NDArray[np.int64]
    page: NDArray[np.int64]
    count: NDArray[np.int64]


def _find_losses(headers: PageHeaders, records: Records) -> _Losses:
    """Return losses before pages (the kernel's flags) and within pages (damage)."""
    ends = np.cumsum(records.page_counts)
    flagged = np.flatnonzero(headers.lost)
    broken = np.array(sorted({d.page for d in records.damage}), np.int64)
    at = np.concatenate((ends[flagged] - records.page_counts[flagged], ends[broken]))
    page = np.concatenate((flagged, broken))
    count = np.concatenate((headers.lost[flagged], np.full(len(broken), LOST_UNKNOWN)))
    order = np.lexsort((page, at))
    return _Losses(at[order], page[order], count[order])


def _insert_losses(
    rows: Rows,
    losses: _Losses,
    records: Records,
    lost_kind: int,
    page_ns: NDArray[np.int64],
    *,
    readable: NDArray[np.bool_],
) -> Rows:
    """Return rows with the lost events among them, stamped like the event beside them on their page.

    The header of a page that is not `readable` says nothing of its time: `page_ns` has the earliest possible one, so
    that it does not depend on how many of the pages before are in this batch.
    """
    ends = np.cumsum(records.page_counts)
    before = losses.at < ends[losses.page]
    near = np.clip(np.where(before, losses.at, losses.at - 1), 0, max(len(rows) - 1, 0))
    some = records.page_counts[losses.page] > 0
    ts = np.where(some, rows.ts_ns[near] if len(rows) else 0, page_ns[losses.page])
    earliest = page_ns[losses.page]
    if len(rows):
        event_before = rows.ts_ns[np.clip(losses.at - 1, 0, len(rows) - 1)]
        earliest = np.where(losses.at > 0, np.maximum(event_before, earliest), earliest)
    ts = np.where(readable[losses.page], ts, earliest)
    fill: dict[str, Any] = {
        "ts_ns": ts,
        "tid": -1,
        "kind": lost_kind,
        "irq_flags": 0,
        "preempt_count": 0,
        "start": stored_count(losses.count, rows.start.dtype),
    }
    columns = {name: np.insert(getattr(rows, name), losses.at, value) for name, value in fill.items()}
    return Rows(cpu=np.insert(rows.cpu, losses.at, rows.cpu[0] if len(rows) else -1), **columns)


def stored_count(count: NDArray[np.int64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return numbers of lost events as the start column keeps them: the largest value means unknown."""
    top = np.iinfo(dtype).max
    return np.where(count < 0, top, np.minimum(count, top - 1)).astype(dtype)


def loaded_count(start: NDArray[Any]) -> NDArray[np.int64]:
    """Undo stored_count."""
    top = np.iinfo(start.dtype).max
    return np.where(start == top, np.int64(-1), start.astype(np.int64))


class StreamDecoder:
    """Decodes pages of one CPU.

    Parameters
    ----------
    words : the buffer as little-endian u32
    layout : PageLayout
    kinds : KindTable
    converter : TimeConverter
    cpu : int
    holes : bool, events may be missing before any page
    """

    def __init__(
        self,
        words: NDArray[np.uint32],
        layout: PageLayout,
        kinds: KindTable,
        converter: TimeConverter,
        cpu: int,
        *,
        holes: bool = False,
    ) -> None:
        self._words = words
        self._layout = layout
        self._kinds = kinds
        self._converter = converter
        self._cpu = cpu
        self._holes = holes
        self._start_dtype = np.dtype(np.uint32 if len(words) < NARROW_WORDS else np.int64)
        self._kind_of_id = kinds.kind_of_id if has_usual_common(kinds.common) else None

    def decode(
        self,
        pages: NDArray[np.int64],
        offsets: NDArray[np.int64],
        begins: NDArray[np.int64],
        floor: int,
        checks: PageChecks | None = None,
    ) -> StreamRows:
        """Decode pages into rows.

        Parameters
        ----------
        pages : int64, shape (n,), word index of each page
        offsets : int64, shape (n,), file offset of each page, to say where damage is
        begins : int64, shape (n,), ascending, the least time to merge each page by
        floor : int, the least time to merge by: the latest of the CPU's events before these pages
        checks : PageChecks of these pages, or None
        """
        headers = read_page_headers(self._words, pages, self._layout)
        if self._holes:
            headers.lost[(headers.lost == 0) & (headers.size >= 0)] = LOST_UNKNOWN
        records = self._records(pages, headers, checks)
        page_floor = np.maximum(begins, floor)
        page_ns = np.where(headers.size >= 0, self._converter.to_ns(headers.ts, self._cpu), page_floor)
        rows, page_rows = self._rows(headers, records, page_ns)
        key = order_keys(rows.ts_ns, floor) if len(rows) else rows.ts_ns
        some = page_rows > 0
        if not (key[(np.cumsum(page_rows) - page_rows)[some]] >= page_floor[some]).all():  # of each page's first row
            key = np.maximum(key, np.repeat(page_floor, page_rows))
        faults = [
            Fault(
                int(offsets[damage.page]) + (damage.word - int(pages[damage.page])) * 4,
                self._cpu,
                damage.expected,
                damage.found,
                damage.page,
            )
            for damage in records.damage
        ]
        return StreamRows(
            rows,
            rows.ts_ns if key is rows.ts_ns or np.array_equal(key, rows.ts_ns) else key,
            page_rows,
            page_floor,
            faults,
        )

    def _records(self, pages: NDArray[np.int64], headers: PageHeaders, checks: PageChecks | None) -> Records:
        """Decode a batch; what contradicts itself is damage, and pages without a time are left out."""
        records = decode_pages(self._words, pages, headers, self._layout, self._kind_of_id)
        if checks is None:
            return records
        wrong = wrong_times(pages, headers, records, checks)
        if wrong:
            timeless = [damage.page for damage in wrong]
            headers.size[timeless], headers.lost[timeless] = -1, 0
        if checks.padded:
            wrong += undescribed(self._words, pages, headers, records, self._is_unknown(records))
        if wrong:
            records = decode_pages(self._words, pages, headers, self._layout, self._kind_of_id)
        more = rest_not_empty(self._words, pages, headers, self._layout) if checks.padded else []
        first: dict[int, PageDamage] = {}
        for damage in (*wrong, *records.damage, *more):  # of each page what it began with
            first.setdefault(damage.page, damage)
        return replace(records, damage=[first[page] for page in sorted(first)])

    def _is_unknown(self, records: Records) -> NDArray[np.bool_]:
        """Say which records are of no event that the recording describes."""
        columns = records.columns
        kind: NDArray[np.uint16] = (
            self._kinds.kind_of_id[self._words.take(records.start, mode="clip") & 0xFFFF]
            if columns is None
            else columns.kind
        )
        return np.equal(kind, self._kinds.lost - 1)

    def _rows(
        self, headers: PageHeaders, records: Records, page_ns: NDArray[np.int64]
    ) -> tuple[Rows, NDArray[np.int64]]:
        """Return rows of a batch and how many each page has."""
        n, of = len(records.start), records.columns
        if of is not None:
            kind, flags, preempt, tid = of.kind, of.irq_flags, of.preempt_count, of.tid
        else:
            kind_id, flags, preempt, tid = gather_common(self._words, records.start, self._kinds.common)
            kind = self._kinds.kind_of_id[kind_id]
        rows = Rows(
            self._converter.to_ns(records.ts, self._cpu),
            np.full(n, self._cpu, np.int16),
            tid,
            kind,
            flags,
            preempt,
            records.start.astype(self._start_dtype, copy=False),
        )
        losses = _find_losses(headers, records)
        if not len(losses.at):
            return rows, records.page_counts
        rows = _insert_losses(rows, losses, records, self._kinds.lost, page_ns, readable=headers.size >= 0)
        rows.cpu[:] = self._cpu
        return rows, records.page_counts + np.bincount(losses.page, minlength=len(headers.ts))
