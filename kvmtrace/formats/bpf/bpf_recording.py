"""A capture of the bpf back end as a Recording."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.formats.bpf.bpf_layout import FIELD_SHIFT, BpfCapture, Spans, Walk, walk_records
from kvmtrace.formats.common.capture_of_file import capture_of
from kvmtrace.formats.common.loss import LossCounter
from kvmtrace.formats.trace_dat.page_streams import Fault
from kvmtrace.formats.trace_dat.ring_rows import loaded_count, stored_count
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.table.event_table import COMMON_DTYPES, EventTable
from kvmtrace.table.kinds import make_kind_table
from kvmtrace.table.merge import Rows, concat_rows, merge_rows, order_keys
from kvmtrace.table.payload import ColumnPayload, Payload, RawPayload
from kvmtrace.table.recording import Recording

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
    gap : bool, events are missing before the next row, and there was no row yet to say it behind
    """

    cpu: int
    spans: NDArray[np.int64]
    next: int = 0
    floor: int = START_OF_TIME
    lost: int = 0
    position: int = -1
    rest: tuple[Rows, NDArray[np.int64]] | None = None
    gap: bool = False


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
        self._needed = np.array(
            [max((f.offset + f.size for f in described.values()), default=8) for described in self._kinds.described],
            np.int64,
        )
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
            self.read_share = (last_file_span + 1) / len(sizes)
            self.loss = self._loss.loss()
            if len(rows):
                yield self._table(rows)

    def _load(self, stream: _Stream, stop: int) -> None:
        """Read a CPU's spans up to the `stop`-th of them into `rest`."""
        chosen = stream.spans[stream.next : stop]
        stream.next = stop
        if not len(chosen):
            return
        spans = Spans(*(getattr(self._source.spans, name)[chosen] for name in ("cpu", "position", "start", "end")))
        walk = walk_records(self._source.words, spans, self._source.slots_of_kind)
        self._loss.add_faults(walk.faults)
        unfinished = int(walk.unfinished.sum())
        if unfinished:
            self._loss.add_faults(
                [Fault(int(spans.start[0]), stream.cpu, "finished records", f"{unfinished} that were never finished")]
            )
        walk, breaks = _without_doubtful(walk, spans)
        if stream.next == len(stream.spans) and self._may_lack_end(stream):
            breaks = np.append(breaks, len(walk.at))
        rows = self._with_losses(stream, self._rows(stream.cpu, walk.at), walk, spans, breaks)
        if self._written_late and len(rows):
            rows = _sorted(rows)
        keys = order_keys(rows.ts_ns, stream.floor) if len(rows) else rows.ts_ns
        stream.floor = int(keys[-1]) if len(keys) else stream.floor
        if stream.rest is not None:
            rows = concat_rows([stream.rest[0], rows])
            keys = np.concatenate((stream.rest[1], keys))
        stream.rest = rows, keys

    def _may_lack_end(self, stream: _Stream) -> bool:
        """Say whether nobody knows if a CPU's last span is the last: no later one tells by its position."""
        end = int(self._source.spans.end[stream.spans[-1]])
        meta = self._source.meta
        killed = "started" in meta and meta.get("duration_ns") is None  # between two CPUs' spans, perhaps
        return self._source.truncated or killed or any(fault.offset >= end for fault in self._source.faults)

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
        return Rows(
            np.minimum(ts.reshape(-1).view(np.uint64), END_OF_TIME).astype(np.int64),
            np.full(n, cpu, np.int16),
            tid,
            kind,
            last[:, 2].copy(),
            last[:, 3].copy(),
            start,
        )

    def _with_losses(self, stream: _Stream, rows: Rows, walk: Walk, spans: Spans, breaks: NDArray[np.int64]) -> Rows:
        """Return rows with the lost events among them: where the counter grew, spans are missing or their chain breaks.

        What a break has cost stands before row number `breaks`, with the time of the row before that.
        """
        counter = self._source.words.take(2 * walk.at + 6).astype(np.int64)
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
        holes = np.searchsorted(walk.span, missing)
        growth[holes[holes < len(rows)]] = -1
        if len(rows) and (stream.gap or (breaks == 0).any()):
            growth[0] = -1
        stream.gap = not len(rows) and bool(stream.gap or len(breaks))
        breaks = breaks[breaks > 0]
        grown = np.flatnonzero(growth)
        where = np.concatenate((breaks, grown))
        if not len(where):
            return rows
        order = np.argsort(where, kind="stable")
        where, ts = where[order], np.concatenate((rows.ts_ns[breaks - 1], rows.ts_ns[grown]))[order]
        count = np.concatenate((np.full(len(breaks), -1), growth[grown]))[order]
        fill: dict[str, Any] = {
            "ts_ns": ts,
            "cpu": stream.cpu,
            "tid": -1,
            "kind": self._kinds.lost,
            "irq_flags": 0,
            "preempt_count": 0,
            "start": stored_count(count, rows.start.dtype),
        }
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
        return RawPayload(
            self._source.words, lambda: start[np.flatnonzero(kind == index)], self._kinds.described[index]
        )


def _without_doubtful(walk: Walk, spans: Spans) -> tuple[Walk, NDArray[np.int64]]:
    """Return the walk without the record before each break: the damage may begin in it; and the rows after breaks."""
    if not walk.faults:
        return walk, np.empty(0, np.int64)
    offsets = np.unique([fault.offset for fault in walk.faults])
    last = np.searchsorted(walk.at, offsets >> 3) - 1
    same = (last >= 0) & (
        walk.span.take(last, mode="clip") == np.searchsorted(spans.start, offsets, side="right") - 1
        if len(walk.span)
        else False
    )
    doubtful = np.unique(last[same])
    kept = replace(walk, at=np.delete(walk.at, doubtful), span=np.delete(walk.span, doubtful))
    return kept, np.unique(np.searchsorted(kept.at, offsets >> 3))


def _sorted(rows: Rows) -> Rows:
    order = np.argsort(rows.ts_ns, kind="stable")
    return Rows(**{field.name: getattr(rows, field.name)[order] for field in fields(rows)})


def _no_rows() -> Rows:
    return Rows(
        np.empty(0, np.int64),
        np.empty(0, np.int16),
        np.empty(0, np.int32),
        np.empty(0, np.uint16),
        np.empty(0, np.uint8),
        np.empty(0, np.uint8),
        np.empty(0, np.uint32),
    )


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
