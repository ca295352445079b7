"""A perf.data as a Recording.

Its rows are in the order of their time stamps, at equal times in file order, as perf orders them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native import perf_samples
from kvmtrace._native.perf_samples import PerfSamples
from kvmtrace._native.ring_records import RecordColumns
from kvmtrace.formats.common.capture_of_file import capture_of
from kvmtrace.formats.common.cursor import Cursor
from kvmtrace.formats.common.loss import LossCounter
from kvmtrace.formats.perf_data.perf_compressed import decompress_records
from kvmtrace.formats.perf_data.perf_layout import (
    FEAT_COMPRESSED,
    FEAT_CPUDESC,
    FEAT_HOSTNAME,
    FEAT_NRCPUS,
    FEAT_OSRELEASE,
    SAMPLE_IDENTIFIER,
    TYPE_TRACEPOINT,
    PerfData,
)
from kvmtrace.formats.perf_data.perf_records import (
    RECORD_COMM,
    RECORD_FINISHED_ROUND,
    RECORD_FORK,
    RECORD_LOST,
    RECORD_LOST_SAMPLES,
    SampleLayout,
    sample_id_places,
    sample_layout,
)
from kvmtrace.formats.perf_data.perf_rounds import Rounds
from kvmtrace.formats.trace_dat.page_streams import Fault
from kvmtrace.formats.trace_dat.pages import KEPT_TABLES, MAX_CPU, prepare_mapped, release_mapped
from kvmtrace.formats.trace_dat.ring_rows import loaded_count, stored_count
from kvmtrace.table.common_fields import gather_common, has_usual_common
from kvmtrace.table.distinct import distinct, within
from kvmtrace.table.event_table import EventTable
from kvmtrace.table.kinds import make_kind_table
from kvmtrace.table.merge import Rows, RowsBuilder, concat_rows, no_rows, occurring
from kvmtrace.table.payload import ColumnPayload, Payload, RawPayload
from kvmtrace.table.recording import Recording

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


MAX_RECORD = 1 << 16
MAX_COARSE = 100  # of so many samples one may have the time of another of its CPU, or the clock is coarse
SAMPLE_BYTES = 100  # typical
SMALLEST_SAMPLE_BYTES = 32
WINDOW_WORDS = 1 << 18  # 2 MiB: what is counted is still in the cache when it is read


def _cpu_numbers(words: NDArray[np.uint64]) -> NDArray[np.int16]:
    """Return the CPU numbers in the low halves of words; -1 (unknown) where there can be no such CPU."""
    numbers = words.astype(np.uint32)
    return np.where(numbers <= MAX_CPU, numbers, -1).astype(np.int16)


class PerfDataRecording(Recording):
    """Tracepoint samples of a perf.data.

    Parameters
    ----------
    perf : PerfData
    """

    def __init__(self, perf: PerfData) -> None:
        self._perf = perf
        self._kinds = make_kind_table(perf.formats, MAX_RECORD)
        self.kinds = self._kinds.kinds
        self.comms = dict(perf.comms)
        self.processes: dict[int, int] = {}
        self._loss = LossCounter()
        self._repeated = 0  # of the latest pass
        self._layouts = self._make_layouts()
        self._words, self._first, self._last = self._record_words()
        self._start_dtype = np.dtype(np.uint32 if len(self._words) < 0x7FFFFF00 else np.int64)
        self._events: EventTable | None = None
        self.capture = capture_of(
            perf.path,
            "perf.data",
            {},
            host=perf.feature_text(FEAT_HOSTNAME),
            kernel=perf.feature_text(FEAT_OSRELEASE),
            cpu_model=perf.feature_text(FEAT_CPUDESC),
            clock=perf.attrs[0].clock,
            n_cpus=perf.feature_number(FEAT_NRCPUS),
            events=self._event_names(),
        )
        self.loss = replace(self._loss.loss(), repeated=self._repeated)

    def _event_names(self) -> tuple[str, ...]:
        wanted = {a.config & 0xFFFF for a in self._perf.attrs if a.type_ == TYPE_TRACEPOINT}
        return tuple(f"{f.system}:{f.name}" for f in self._perf.formats if f.event_id in wanted)

    def _make_layouts(self) -> list[tuple[NDArray[np.uint64] | None, SampleLayout | None]]:
        """Return (ids, layout) of the events whose samples differ; ids None: of all samples."""
        by_layout: dict[SampleLayout | None, list[int]] = {}
        for attr in self._perf.attrs:
            by_layout.setdefault(sample_layout(attr), []).extend(attr.ids)
        if len(by_layout) == 1:
            return [(None, next(iter(by_layout)))]
        if not all(a.sample_type & SAMPLE_IDENTIFIER for a in self._perf.attrs):
            at = Cursor(self._perf.data, self._perf.path)
            raise at.fail("samples of one layout, or led by an identifier", "several layouts without one")
        return [(np.array(ids, np.uint64), layout) for layout, ids in by_layout.items()]

    def _record_words(self) -> tuple[NDArray[np.uint64], int, int]:
        """Return (words, first, last) of the records, decompressed if they are; note what the file lacks."""
        perf, total = self._perf, len(self._perf.data)
        size = perf.data_size or max(total - perf.data_offset, 0)
        end = perf.data_offset + size
        if perf.data_offset % 8 or perf.data_offset > total:
            raise Cursor(perf.data, perf.path, 40).fail("an offset of the data within the file", hex(perf.data_offset))
        if end > total or not perf.data_size:
            self._loss.add_faults(
                [Fault(min(end, total), -1, f"{size} bytes of records", f"the end of the file at {total:#x}")],
                truncated=True,
            )
        words = np.frombuffer(perf.data, np.dtype("<u8"), total // 8)
        first, last = perf.data_offset // 8, min(end, total) // 8
        if FEAT_COMPRESSED in perf.features:
            words = decompress_records(perf, perf.data_offset, min(end, total), self._loss)
            return words, 0, len(words)
        return words, first, last

    def events(self) -> EventTable:
        """Return all events (cached)."""
        if self._events is None:
            self._events = next(iter(self._tables(1 << 62)), self._table(no_rows(self._start_dtype)))
        return self._events

    def iter_events(self, max_events: int = 4_000_000) -> Iterator[EventTable]:
        """Yield tables of about `max_events` consecutive rows."""
        yield from self._tables(max(max_events, 1) * SAMPLE_BYTES)

    def _tables(self, n_bytes: int) -> Iterator[EventTable]:
        """Read parts of the file; what later parts may precede is kept back.

        perf writes rounds: what a round holds is not older than the newest of the round before the last.
        """
        self._loss.restart()
        self._repeated = 0
        at, carried = self._first, no_rows(self._start_dtype)
        read = deque([at])
        rounds = Rounds()
        is_mapped = FEAT_COMPRESSED not in self._perf.features
        while at < self._last:
            stop = min(at + n_bytes // 8, self._last)
            if is_mapped:
                prepare_mapped(self._perf.data, at * 8, stop * 8)
            rows, late, at, sound = self._read_part(carried, at, stop, rounds)
            if not sound:
                self._note_damage(at)
            done = at >= self._last or not sound
            self.read_share = (at - self._first) / max(self._last - self._first, 1)
            rows = self._in_order(rows, late)
            n_out = len(rows) if done else int(np.searchsorted(rows.ts_ns, rounds.flush))
            carried = rows.slice(n_out, len(rows))
            if n_out:
                table = self._table(rows.slice(0, n_out))
                self.loss = replace(self._loss.loss(), repeated=self._repeated)
                yield table
            if done:
                break
            read.append(at)
            if len(read) > KEPT_TABLES + 1 and is_mapped:
                release_mapped(self._perf.data, read.popleft() * 8, read[0] * 8)
        self.loss = replace(self._loss.loss(), repeated=self._repeated)

    def _read_part(
        self, carried: Rows, at: int, stop: int, rounds: Rounds
    ) -> tuple[Rows, NDArray[np.unsignedinteger | np.int64], int, bool]:
        """Return carried rows and those of words at..stop, where the data of samples are that come too late ...

        It goes window by window, so that a window's words are still in the cache when they are gathered.
        """
        builder = RowsBuilder((stop - at) * 8 // SMALLEST_SAMPLE_BYTES + WINDOW_WORDS)
        builder.add(carried)
        ends: list[int] = []
        sound = True
        while at < stop and sound:
            ended, at, sound = self._read_window(builder, at, min(at + WINDOW_WORDS, stop))
            ends += ended
        rows, n_carried = builder.finish(), len(carried)
        late = n_carried + rounds.take_in(rows.ts_ns[n_carried:], np.array(ends, np.int64) - n_carried)
        return rows, rows.start[late[rows.kind[late] != self._kinds.lost]], at, sound

    @cached_property
    def _samples(self) -> PerfSamples:
        """Which samples count, and where their parts lie."""
        useful = [(ids, layout) for ids, layout in self._layouts if layout is not None]
        layouts = np.array([(p.time, p.cpu, p.raw, p.chain) for _, p in useful], np.int64).reshape(-1, 4)
        known = [(distinct(ids), i) for i, (ids, _) in enumerate(useful) if ids is not None]
        ids = np.concatenate([np.empty(0, np.uint64), *(ids for ids, _ in known)])
        of = np.repeat(np.array([i for _, i in known], np.int32), [len(ids) for ids, _ in known])
        order = np.argsort(ids, kind="stable")
        ids, of = ids[order], of[order]
        last = np.append(ids[1:] != ids[:-1], True)[: len(ids)]  # an identifier of several events is damage
        return PerfSamples(layouts, ids[last], of[last])

    def _read_window(self, builder: RowsBuilder, at: int, stop: int) -> tuple[list[int], int, bool]:
        """Take in the records that begin in words at..stop; return rounds, where it ended and whether soundly."""
        usual = has_usual_common(self._kinds.common)
        room: list[Rows] = []

        def take_room(n: int) -> tuple[RecordColumns, NDArray[np.int16]]:
            rows = builder.room(n, no_rows(self._start_dtype))
            room.append(rows)
            ts, flags, preempt = rows.ts_ns.view(np.uint64), rows.irq_flags, rows.preempt_count
            return RecordColumns(rows.start, ts, rows.kind, flags, preempt, rows.tid), rows.cpu

        kinds = self._kinds.kind_of_id if usual else None
        found = perf_samples.read_perf_records(self._words, (at, stop, self._last), self._samples, kinds, take_room)
        n, others, before = len(found.cpu), found.others, len(builder)
        rows = room[0].slice(0, n)
        if not usual:
            kind_id, flags, preempt, tid = gather_common(self._words.view(np.uint32), rows.start, self._kinds.common)
            rows.kind[:], rows.irq_flags[:] = self._kinds.kind_of_id[kind_id], flags
            rows.preempt_count[:], rows.tid[:] = preempt, tid
        types = self._words[others].astype(np.uint32)
        ends = others[types == RECORD_FINISHED_ROUND]
        rounds = before + np.searchsorted(rows.start, ends * 2)
        lost = others[(types == RECORD_LOST) | (types == RECORD_LOST_SAMPLES)]
        self._read_threads(others[(types == RECORD_COMM) | (types == RECORD_FORK)])
        if len(lost):
            builder.add(self._in_file_order(rows, self._lost_rows(lost), lost))
            rounds += np.searchsorted(lost, ends)
        else:
            builder.take_in(n)
        return rounds.tolist(), found.stop, found.sound

    @staticmethod
    def _in_file_order(samples: Rows, lost: Rows, at: NDArray[np.int64]) -> Rows:
        """Put the rows of lost events among the samples: their records stand at words `at`."""
        before = np.searchsorted(samples.start, at * 2)  # a sample's data lies behind its record's head
        order = np.argsort(np.concatenate([np.arange(len(samples)) * 2, before * 2 - 1]), kind="stable")
        return concat_rows([samples.slice(0, len(samples)), lost]).take(order)

    def _in_order(self, rows: Rows, late: NDArray[Any]) -> Rows:
        """Sort rows by time, at equal times in file order, without the samples that perf wrote twice.

        perf 6.1 was seen to do that: copies are of one CPU, time, thread and content. Where the clock is so coarse that
        different samples of a CPU often have one time, equal ones say nothing; nor do those that come too late, whose
        like may have been given out.
        """
        if (rows.ts_ns[1:] < rows.ts_ns[:-1]).any():
            rows.sort_by(np.argsort(rows.ts_ns, kind="stable"))
        at = self._with_equal_times(rows)
        if not len(at) or self._is_coarse:
            return rows
        if len(late):
            at = at[~within(rows.start[at], late)]
        copied, _ = self._copies(rows, at)
        n_copies = int(np.count_nonzero(copied))
        if not n_copies:
            return rows
        self._repeated += n_copies
        kept = np.ones(len(rows), bool)
        kept[at[copied]] = False
        return rows.take(np.flatnonzero(kept))

    @staticmethod
    def _with_equal_times(rows: Rows) -> NDArray[np.intp]:
        """Return which of the rows in order have the time of a neighbour: only those may be copies."""
        equal = rows.ts_ns[1:] == rows.ts_ns[:-1]
        if not equal.any():
            return np.empty(0, np.intp)
        return np.flatnonzero(np.append(equal, False) | np.append(False, equal))

    def _copies(self, rows: Rows, at: NDArray[np.intp]) -> tuple[NDArray[np.bool_], int]:
        return perf_samples.mark_copies(
            self._words.view(np.uint32), rows.take(at), np.arange(len(at)), self._kinds.lost
        )

    @cached_property
    def _is_coarse(self) -> bool:
        """Do different samples of a CPU often have one time? The file's beginning tells, for every piece of it."""
        builder = RowsBuilder(WINDOW_WORDS * 8 // SMALLEST_SAMPLE_BYTES)
        self._read_window(builder, self._first, min(self._first + WINDOW_WORDS, self._last))
        rows = builder.finish()
        rows.sort_by(np.argsort(rows.ts_ns, kind="stable"))
        copied, n_same = self._copies(rows, self._with_equal_times(rows))
        return (n_same - int(np.count_nonzero(copied))) * MAX_COARSE > len(rows)

    def _note_damage(self, word: int) -> None:
        head = int(self._words[word]) if word < len(self._words) else 0
        found = f"size {head >> 48} of type {head & 0xFFFFFFFF}"
        self._loss.add_faults([Fault(word * 8, -1, "a record with a size that fits", found)], truncated=True)

    def _lost_rows(self, at: NDArray[np.int64]) -> Rows:
        """Return rows of lost events; a LOST record counts them behind an id, LOST_SAMPLES at once."""
        words = self._words
        time_back, cpu_back = sample_id_places(self._perf.attrs[0])
        end = at + (words[at] >> np.uint64(51)).astype(np.int64)
        has_id = words[at].astype(np.uint32) == RECORD_LOST
        count = words.take(np.where(has_id, at + 2, at + 1), mode="clip").astype(np.int64)
        n = len(at)
        ts = words[end - time_back].astype(np.int64) if time_back else np.zeros(n, np.int64)
        cpu = _cpu_numbers(words[end - cpu_back]) if cpu_back else np.full(n, -1, np.int16)
        zeros = np.zeros(n, np.uint8)
        return Rows(
            ts,
            cpu,
            np.full(n, -1, np.int32),
            np.full(n, self._kinds.lost, np.uint16),
            zeros,
            zeros.copy(),
            stored_count(np.maximum(count, -1), self._start_dtype),
        )

    def _read_threads(self, at: NDArray[np.int64]) -> None:
        """Read names and processes of threads (COMM, FORK)."""
        data = self._words.view(np.uint8)
        for word in at.tolist():
            head = int(self._words[word])
            body = data[word * 8 + 8 : word * 8 + (head >> 48)].tobytes()
            if len(body) < 16:
                continue
            pid, other, tid = (int.from_bytes(body[i : i + 4], "little", signed=True) for i in (0, 4, 8))
            if head & 0xFFFFFFFF == RECORD_FORK:
                self.processes[tid] = pid
            else:
                self.processes[other] = pid
                self.comms[other] = body[8:].split(b"\0")[0].decode("utf-8", "replace")

    def _table(self, rows: Rows) -> EventTable:
        payloads: dict[int, Payload] = {}
        for index in occurring(rows.kind, len(self.kinds)):
            payloads[index] = self._payload(rows, index)
        columns: dict[str, Any] = {
            name: getattr(rows, name) for name in ("ts_ns", "cpu", "tid", "kind", "irq_flags", "preempt_count")
        }
        return EventTable(columns, self.kinds, payloads)

    def _payload(self, rows: Rows, index: int) -> Payload:
        kind, start = rows.kind, rows.start
        if index == self._kinds.lost:
            mine = np.flatnonzero(kind == index)
            count = loaded_count(start[mine])
            self._loss.add_lost(rows.cpu[mine], count)
            return ColumnPayload({"count": count})
        return RawPayload(
            self._words.view(np.uint32), lambda: start[np.flatnonzero(kind == index)], self._kinds.described[index]
        )
