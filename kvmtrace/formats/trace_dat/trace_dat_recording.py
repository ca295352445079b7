"""A trace.dat as a Recording."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.formats.common.capture_of_file import capture_of, processes_of_meta
from kvmtrace.formats.common.loss import LossCounter, lost_by_cpu_stats
from kvmtrace.formats.trace_dat.chunks import drop_simultaneous
from kvmtrace.formats.trace_dat.clock import read_time_converter
from kvmtrace.formats.trace_dat.page_streams import Span, Stream
from kvmtrace.formats.trace_dat.pages import KEPT_TABLES, PageSource
from kvmtrace.formats.trace_dat.ring_rows import StreamDecoder, StreamRows, loaded_count
from kvmtrace.formats.trace_dat.trace_dat_sections import OPTION_CPUSTAT, OPTION_UNAME, TraceDat
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.table.event_table import EventTable, RowsByKind
from kvmtrace.table.kinds import KindTable, make_kind_table
from kvmtrace.table.merge import Rows, RowsBuilder, merge_rows, no_rows, occurring
from kvmtrace.table.payload import ColumnPayload, Payload, RawPayload
from kvmtrace.table.recording import Recording

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

START_OF_TIME = np.iinfo(np.int64).min
END_OF_TIME = np.iinfo(np.int64).max
TYPICAL_EVENT_BYTES = 40
SMALLEST_EVENT_BYTES = 16  # head, common fields and one more
WINDOW_BYTES = 16 << 20  # pages decoded and merged at once
_HEAD_WORDS = 2  # of an event at most: time and length


@dataclass
class _Position:
    """Where reading of a stream has come to.

    Parameters
    ----------
    unit : int, the first unit with rows that were not handed out yet
    floor : int, latest time before that unit
    """

    unit: int = 0
    floor: int = START_OF_TIME


class TraceDatRecording(Recording):
    """Events of a trace.dat.

    Parameters
    ----------
    trace : TraceDat
    """

    def __init__(self, trace: TraceDat) -> None:
        self._source = PageSource(trace)
        self._converter = read_time_converter(trace)
        self._kinds: KindTable = make_kind_table(trace.formats, trace.page_size)
        self._events: EventTable | None = None
        self._begins = True  # no event of this pass was read yet
        self.kinds = self._kinds.kinds
        self.comms = dict(trace.comms)
        self.processes = processes_of_meta(trace.meta)
        uname = trace.option_text(OPTION_UNAME)
        self.capture = capture_of(
            trace.path,
            "trace.dat",
            trace.meta,
            kernel=_kernel_of(uname),
            host=_host_of(uname),
            clock=trace.clock or None,
            n_cpus=trace.n_cpus or None,
        )
        stats = [data for number, data in trace.options if number == OPTION_CPUSTAT]
        # per stream, when each unit begins, ascending
        self._unit_ns = [_ascending(self._converter.to_ns(s.unit_ts, s.cpu)) for s in self._source.streams]
        if self._source.packed:
            drop_simultaneous(self._unit_ns, self._source.streams)
        self._loss = LossCounter(trace.meta, lost_by_cpu_stats(stats))
        for stream in self._source.streams:
            self._loss.add_faults(stream.faults, truncated=True)
        self._loss.add_faults(self._source.faults, truncated=True)
        self.loss = self._loss.loss()
        self._units: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None

    def _restart(self) -> None:
        """Begin another pass."""
        self._loss.restart()
        self._begins = True

    def events(self) -> EventTable:
        """Return all events (cached)."""
        if self._events is None:
            self._restart()
            positions = [_Position() for _ in self._source.streams]
            words, rows = self._read_windows(positions, START_OF_TIME, END_OF_TIME)
            self._events = self._table(words, rows)
            self.loss = self._loss.loss()
        return self._events

    def _read_windows(self, positions: list[_Position], low: int, high: int) -> tuple[NDArray[np.uint32], Rows]:
        """Do what _read does: window by window where all pages share a buffer, so that what is made stays small."""
        if not self._source.shared:
            return self._read(positions, low, high)
        n_bytes = sum(
            int(s.pages[p.unit : _first_at(unit_ns, high)].sum()) * s.layout.page_size
            for s, unit_ns, p in zip(self._source.streams, self._unit_ns, positions, strict=True)
        )
        builder = RowsBuilder(n_bytes // SMALLEST_EVENT_BYTES)
        while True:
            limit = min(self._next_limit(low, WINDOW_BYTES), high)
            words, rows = self._read(positions, low, limit)
            if limit == high and not builder:
                return words, rows
            builder.add(rows)
            low = limit
            if low == high:
                return words, builder.finish()

    def iter_events(self, max_events: int = 4_000_000) -> Iterator[EventTable]:
        """Yield tables of about `max_events` consecutive rows; memory is bounded by the largest of them."""
        self._restart()
        positions = [_Position() for _ in self._source.streams]
        low, event_bytes = START_OF_TIME, float(TYPICAL_EVENT_BYTES)
        begin, total = self._unit_order()
        read: deque[list[tuple[Stream, int, int]]] = deque()
        while low < END_OF_TIME:
            high = self._next_limit(low, int(max_events * event_bytes))
            before = [p.unit for p in positions]
            words, rows = self._read_windows(positions, low, high)
            event_bytes = self._measure(before, positions, len(rows)) or event_bytes
            low = high
            before_high = int(np.searchsorted(begin, high))
            self.read_share = int(total[before_high - 1]) / max(int(total[-1]), 1) if before_high else 0.0
            table = self._table(words, rows)
            self.loss = self._loss.loss()
            if len(table):
                yield table
            read.append(
                [
                    (stream, first, position.unit)
                    for stream, first, position in zip(self._source.streams, before, positions, strict=True)
                ]
            )
            for stream, first, last in read.popleft() if len(read) > KEPT_TABLES else ():
                self._source.release(stream, first, last)

    def _measure(self, before: list[int], positions: list[_Position], n_rows: int) -> float | None:
        """Return the bytes that a row took, None where there are too few to tell."""
        size = sum(
            int(s.pages[a : p.unit].sum()) * s.layout.page_size
            for s, a, p in zip(self._source.streams, before, positions, strict=True)
        )
        return max(size / n_rows, 16.0) if n_rows > 100 and size else None

    def _next_limit(self, low: int, n_bytes: int) -> int:
        """Return the time up to which some `n_bytes` of pages reach that begin at `low` or later."""
        begin, total = self._unit_order()
        first = int(np.searchsorted(begin, low))
        before = int(total[first - 1]) if first else 0
        # the unit that exceeds the budget is left to the next table, unless it is the first one
        after = max(int(np.searchsorted(total, before + n_bytes, "right")), int(np.searchsorted(begin, low, "right")))
        return int(begin[after]) if after < len(begin) else END_OF_TIME

    def _unit_order(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (begin, bytes so far) of the units of all streams by the time they begin."""
        if self._units is None:
            begin = np.concatenate([*self._unit_ns, np.empty(0, np.int64)])
            size = np.concatenate(
                [*(s.pages * s.layout.page_size for s in self._source.streams), np.empty(0, np.int64)]
            )
            order = np.argsort(begin, kind="stable")
            self._units = begin[order], np.cumsum(size[order])
        return self._units

    def _read(self, positions: list[_Position], low: int, high: int) -> tuple[NDArray[np.uint32], Rows]:
        """Return the rows whose time to merge by is in low..high and their buffer, and move the positions on."""
        spans = [
            Span(stream, position.unit, _first_at(unit_ns, high))
            for stream, unit_ns, position in zip(self._source.streams, self._unit_ns, positions, strict=True)
        ]
        loaded = self._source.load(spans)
        self._loss.add_faults(loaded.faults)
        parts, keys = [], []
        for i, (span, position) in enumerate(zip(spans, positions, strict=True)):
            stream = span.stream
            decoder = StreamDecoder(
                loaded.words, stream.layout, self._kinds, self._converter, stream.cpu, holes=self._source.holes
            )
            begins = self._unit_ns[i][loaded.units[i]]
            checks = stream.checks.of(loaded.units[i]) if stream.checks else None
            got = decoder.decode(loaded.pages[i], loaded.offsets[i], begins, position.floor, checks)
            self._loss.add_faults(got.faults)
            first, last = _first_at(got.keys, low), _first_at(got.keys, high)
            _advance(position, span, got, last)
            parts.append(got.rows.slice(first, last))
            keys.append(got.keys[first:last])
        if not parts:
            return loaded.words, no_rows(np.dtype(np.uint32))
        rows = merge_rows(parts, keys)
        if self._begins and len(rows):
            self._begins = False
            if _first_is_doubled(loaded.words, rows):
                self._loss.add_repeated(1)
                rows = rows.slice(1, len(rows))
        return loaded.words, rows

    def _table(self, words: NDArray[np.uint32], rows: Rows) -> EventTable:
        by_kind = RowsByKind(rows.kind, len(self.kinds))
        payloads: dict[int, Payload] = {}
        for index in occurring(rows.kind, len(self.kinds)):
            payloads[index] = self._payload(words, rows, index, by_kind)
        columns = {name: getattr(rows, name) for name in ("ts_ns", "cpu", "tid", "kind", "irq_flags", "preempt_count")}
        return EventTable(columns, self.kinds, payloads, by_kind)

    def _payload(self, words: NDArray[np.uint32], rows: Rows, index: int, by_kind: RowsByKind) -> Payload:
        kind, start = rows.kind, rows.start
        if index == self._kinds.lost:
            mine = np.flatnonzero(kind == index)
            count = loaded_count(start[mine])
            self._loss.add_lost(rows.cpu[mine], count)
            return ColumnPayload({"count": count})
        return RawPayload(words, lambda: start[by_kind.of(index)], self._kinds.described[index])


def _first_is_doubled(words: NDArray[np.uint32], rows: Rows) -> bool:
    """Say whether the second event is the first one again, word by word.

    `trace-cmd split` writes it twice where it begins before the first event: it has read that event already as it sets
    the CPUs to the time from which on they are read (parse_cpu, tracecmd/trace-split.c).
    """
    if len(rows) < 2:
        return False
    columns = (rows.ts_ns, rows.cpu, rows.kind, rows.tid, rows.irq_flags, rows.preempt_count)
    first, second = int(rows.start[0]), int(rows.start[1])
    n_words = second - first - _HEAD_WORDS
    if n_words <= 0 or any(column[0] != column[1] for column in columns):
        return False
    return bool((words[first : first + n_words] == words[second : second + n_words]).all())


def _first_at(ascending: NDArray[np.int64], time: int) -> int:
    """Return the position of the first value that is `time` or later; of none before the end of time."""
    return int(np.searchsorted(ascending, time)) if time < END_OF_TIME else len(ascending)


def _ascending(values: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.maximum.accumulate(values) if len(values) else values


def _advance(position: _Position, span: Span, got: StreamRows, last: int) -> None:
    """Move a position to the unit of the first row that was not handed out, or behind the span."""
    page_ends = np.cumsum(got.page_rows)
    page = int(np.searchsorted(page_ends, last, side="right"))  # pages before it are handed out
    unit_ends = np.cumsum(span.stream.pages[span.first : span.last])
    unit = int(np.searchsorted(unit_ends, page, side="right"))
    page = int(unit_ends[unit - 1]) if unit else 0  # the first page of that unit
    if page:
        rows_before = int(page_ends[page - 1])
        latest = int(got.keys[rows_before - 1]) if rows_before else START_OF_TIME
        position.floor = max(position.floor, latest, int(got.page_floor[page - 1]))
    position.unit = span.first + unit


def _host_of(uname: str | None) -> str | None:
    words = (uname or "").split()
    return words[1] if len(words) > 2 else None


def _kernel_of(uname: str | None) -> str | None:
    words = (uname or "").split()
    return words[2] if len(words) > 2 else None
