"""A capture of the bpf back end as a Recording."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.decode.bpf_capture import FIELD_SHIFT, BpfCapture, Spans, walk_records
from kvmtrace.decode.pages import Fault
from kvmtrace.decode.payload import ColumnPayload, Payload, RawPayload
from kvmtrace.events.capture import capture_of
from kvmtrace.events.kinds import make_kind_table
from kvmtrace.events.loss import LossCounter
from kvmtrace.events.merge import Rows, concat_rows, merge_rows, order_keys
from kvmtrace.events.recording import Recording
from kvmtrace.events.ring_rows import loaded_count, stored_count
from kvmtrace.events.table import COMMON_DTYPES, EventTable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

RECORD_LIMIT = 1 << 20
START_OF_TIME = np.iinfo(np.int64).min
END_OF_TIME = np.iinfo(np.int64).max
TYPICAL_RECORD_BYTES = 56
WRAP = 1 << 32


@dataclass
class _Stream:
    """Where reading of one CPU has come to.

    Parameters
    ----------
    spans : indices of its spans, in file order
    next : int, the first of them that was not read
    floor : int, latest time so far
    lost : int, the record headers' counter so far
    position : int, in the ring, behind what was read; -1 before the first span
    rest : rows and keys that were read and not handed out, None if there are none
    """

    cpu: int
    spans: NDArray[np.int64]
    next: int = 0
    floor: int = START_OF_TIME
    lost: int = 0
    position: int = -1
    rest: tuple[Rows, NDArray[np.int64]] | None = None


class BpfRecording(Recording):
    """Events of a bpf capture.

    Parameters
    ----------
    source : BpfCapture
    """

    def __init__(self, source: BpfCapture) -> None:
        self._source = source
        self._kinds = make_kind_table(source.formats, RECORD_LIMIT)
        # a record must reach as far as its kind's fields, else it is none of that kind
        self._needed = np.array([max((f.offset + f.size for f in described.values()), default=8)
                                 for described in self._kinds.described], np.int64)
        self._events: EventTable | None = None
        # with this filter a kvm_exit is written, with its own time, when its kvm_entry has come
        filters = source.meta.get("filters")
        self._written_late = isinstance(filters, dict) and "slower_than_ns" in filters
        self.kinds = self._kinds.kinds
        self.comms, self.processes = _threads(source.meta)
        self.capture = capture_of(source.path, "kvmtrace-bpf", source.meta, n_cpus=source.n_cpus or None)
        self._loss = LossCounter(source.meta)
        self._loss.add_faults(source.faults)
        if source.truncated:
            size = len(source.words) * 4
            self._loss.add_faults([Fault(size, None, "the rest of a frame", "the end of the file")], truncated=True)
        self.loss = self._loss.loss()

    def events(self) -> EventTable:
        """Return all events (cached)."""
        if self._events is None:
            tables = list(self.iter_events(1 << 62))
            self._events = tables[0] if tables else self._table(_no_rows())
        return self._events

    def iter_events(self, max_events: int = 4_000_000) -> Iterator[EventTable]:
        """Yield tables of about `max_events` consecutive rows; memory is bounded by the largest of them."""
        self._loss.restart()
        spans = self._source.spans
        streams = [_Stream(cpu, np.flatnonzero(spans.cpu == cpu)) for cpu in np.unique(spans.cpu).tolist()]
        sizes = spans.end - spans.start
        batches = np.cumsum(sizes) // (min(max_events, 1 << 40) * TYPICAL_RECORD_BYTES) if len(sizes) else sizes
        for number in np.unique(batches).tolist():
            last_file_span = int(np.flatnonzero(batches == number)[-1])
            for stream in streams:
                self._load(stream, int(np.searchsorted(stream.spans, last_file_span, side="right")))
            rows = self._hand_out(streams)
            self.loss = self._loss.loss()
            if len(rows):
                yield self._table(rows)

    def _load(self, stream: _Stream, stop: int) -> None:
        """Read a CPU's spans up to the `stop`-th of them into `rest`."""
        chosen = stream.spans[stream.next:stop]
        stream.next = stop
        if not len(chosen):
            return
        spans = Spans(*(getattr(self._source.spans, name)[chosen] for name in ("cpu", "position", "start", "end")))
        walk = walk_records(self._source.words, spans, self._source.slots_of_kind)
        self._loss.add_faults(walk.faults)
        unfinished = int(walk.unfinished.sum())
        if unfinished:
            self._loss.add_faults([Fault(int(spans.start[0]), stream.cpu, "finished records",
                                         f"{unfinished} that were never finished")])
        rows = self._rows(stream.cpu, walk.at)
        rows = self._with_losses(stream, rows, walk.at, walk.span, spans)
        if self._written_late and len(rows):
            rows = _sorted(rows)
        keys = order_keys(rows.ts_ns, stream.floor) if len(rows) else rows.ts_ns
        stream.floor = int(keys[-1]) if len(keys) else stream.floor
        if stream.rest is not None:
            rows = concat_rows([stream.rest[0], rows])
            keys = np.concatenate((stream.rest[1], keys))
        stream.rest = rows, keys

    def _rows(self, cpu: int, at: NDArray[np.int64]) -> Rows:
        """Return the records at words 2 * `at`."""
        words = self._source.words
        n = len(at)
        ts = np.empty((n, 2), np.uint32)
        ts[:, 0] = words.take(2 * at + 2)
        ts[:, 1] = words.take(2 * at + 3)
        tid = words.take(2 * at + 4).view(np.int32)
        last = np.ascontiguousarray(words.take(2 * at + 7)).view(np.uint8).reshape(-1, 4)
        number = last[:, :2].copy().view(np.uint16).reshape(-1)
        kind = self._kinds.kind_of_id[number]
        length = (words.take(2 * at) & 0x3FFFFFFF).astype(np.int64)
        kind[length + 8 < self._needed[kind] + FIELD_SHIFT] = self._kinds.lost - 1  # the kind of unknown events
        start = (2 * at + FIELD_SHIFT // 4).astype(np.uint32 if len(words) < WRAP - 256 else np.int64)
        return Rows(np.minimum(ts.reshape(-1).view(np.uint64), END_OF_TIME).astype(np.int64),
                    np.full(n, cpu, np.int16), tid, kind, last[:, 2].copy(), last[:, 3].copy(), start)

    def _with_losses(self, stream: _Stream, rows: Rows, at: NDArray[np.int64], span: NDArray[np.int64],
                     spans: Spans) -> Rows:
        """Return rows with the lost events among them: where the counter grew, where a span is missing."""
        counter = self._source.words.take(2 * at + 6).astype(np.int64)
        steps = np.diff(counter, prepend=stream.lost % WRAP) % WRAP
        steps[steps >= WRAP // 2] -= WRAP  # an interrupt's record overtook, or was overtaken
        if len(steps) and stream.position < 0 and steps[0] < 0:  # none before it
            stream.lost, steps[0] = int(counter[0]), 0
        total = np.maximum.accumulate(np.cumsum(steps, dtype=np.int64))
        growth = np.diff(np.maximum(total, 0), prepend=0)
        if len(counter):
            stream.lost += int(growth.sum())
        before = np.concatenate(([stream.position], spans.position[:-1] + (spans.end - spans.start)[:-1]))
        stream.position = int(spans.position[-1] + spans.end[-1] - spans.start[-1])
        missing = np.flatnonzero((before >= 0) & (spans.position != before))
        holes = np.searchsorted(span, missing)
        growth[holes[holes < len(rows)]] = -1
        where = np.flatnonzero(growth)
        if not len(where):
            return rows
        fill: dict[str, Any] = {"ts_ns": rows.ts_ns[where], "cpu": stream.cpu, "tid": -1, "kind": self._kinds.lost,
                                "irq_flags": 0, "preempt_count": 0,
                                "start": stored_count(growth[where], rows.start.dtype)}
        return Rows(**{name: np.insert(getattr(rows, name), where, value) for name, value in fill.items()})

    def _hand_out(self, streams: list[_Stream]) -> Rows:
        """Merge and return the rows that nothing unread can precede."""
        limit = min((self._begin_of_next(stream) for stream in streams), default=END_OF_TIME)
        parts, all_keys = [], []
        for stream in streams:
            if stream.rest is None:
                continue
            rows, keys = stream.rest
            cut = len(keys) if limit == END_OF_TIME else int(np.searchsorted(keys, limit))
            parts.append(rows.slice(0, cut))
            all_keys.append(keys[:cut])
            stream.rest = (rows.slice(cut, len(rows)), keys[cut:]) if cut < len(keys) else None
        return merge_rows(parts, all_keys) if parts else _no_rows()

    def _begin_of_next(self, stream: _Stream) -> int:
        """Return the least key that unread spans of a CPU can have."""
        if stream.next >= len(stream.spans):
            return END_OF_TIME
        at = int(self._source.spans.start[stream.spans[stream.next]]) // 4
        if at + 4 > len(self._source.words):
            return max(stream.floor, 0)
        ts = int(self._source.words[at + 2]) | int(self._source.words[at + 3]) << 32
        return min(max(ts, stream.floor), END_OF_TIME)

    def _table(self, rows: Rows) -> EventTable:
        payloads: dict[int, Payload] = {}
        for index in np.flatnonzero(np.bincount(rows.kind, minlength=len(self.kinds))).tolist():
            payloads[index] = self._payload(rows, index)
        return EventTable({name: getattr(rows, name) for name in COMMON_DTYPES}, self.kinds, payloads)

    def _payload(self, rows: Rows, index: int) -> Payload:
        kind, start = rows.kind, rows.start
        if index == self._kinds.lost:
            mine = np.flatnonzero(kind == index)
            count = loaded_count(start[mine])
            self._loss.add_lost(rows.cpu[mine], count)
            self.loss = self._loss.loss()
            return ColumnPayload({"count": count})
        return RawPayload(self._source.words, lambda: start[np.flatnonzero(kind == index)],
                          self._kinds.described[index])


def _sorted(rows: Rows) -> Rows:
    order = np.argsort(rows.ts_ns, kind="stable")
    return Rows(**{field.name: getattr(rows, field.name)[order] for field in fields(rows)})


def _no_rows() -> Rows:
    return Rows(np.empty(0, np.int64), np.empty(0, np.int16), np.empty(0, np.int32), np.empty(0, np.uint16),
                np.empty(0, np.uint8), np.empty(0, np.uint8), np.empty(0, np.uint32))


def _threads(meta: dict[str, Any]) -> tuple[dict[int, str], dict[int, int]]:
    """Return tid -> name and tid -> process from the metadata's `threads`, which is untrusted."""
    comms, processes = {}, {}
    threads = meta.get("threads")
    for tid, row in threads.items() if isinstance(threads, dict) else ():
        if isinstance(row, list) and len(row) == 2 and str(tid).isdigit():
            pid, comm = row
            if isinstance(comm, str):
                comms[int(tid)] = comm
            if isinstance(pid, int) and pid > 0:
                processes[int(tid)] = pid
    return comms, processes
