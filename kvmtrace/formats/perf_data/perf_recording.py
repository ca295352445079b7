"""A perf.data as a Recording.

Its rows are in the order of their time stamps, at equal times in file order, as perf orders them.
"""

from __future__ import annotations

from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native import PerfSamples, RecordColumns, loaded
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
    MAX_TABLE,
    RECORD_COMM,
    RECORD_FINISHED_ROUND,
    RECORD_FORK,
    RECORD_LOST,
    RECORD_LOST_SAMPLES,
    RECORD_SAMPLE,
    SampleLayout,
    is_one_of,
    sample_id_places,
    sample_layout,
    walk_records,
)
from kvmtrace.formats.trace_dat.pages import KEPT_TABLES, MAX_CPU, Fault, release_mapped
from kvmtrace.formats.trace_dat.ring_rows import loaded_count, stored_count
from kvmtrace.table.common_fields import gather_common, has_usual_common
from kvmtrace.table.event_table import EventTable
from kvmtrace.table.kinds import make_kind_table
from kvmtrace.table.merge import Rows, RowsBuilder, concat_rows, no_rows, occurring
from kvmtrace.table.payload import ColumnPayload, Payload, RawPayload
from kvmtrace.table.recording import Recording

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

MAX_RECORD = 1 << 16
SAMPLE_BYTES = 100  # typical
SMALLEST_SAMPLE_BYTES = 32
WINDOW_WORDS = 1 << 18  # 2 MiB: what is counted is still in the cache when it is read
MAX_LAYOUTS = 255  # that the compiled kernel tells apart
END_OF_TIME = np.iinfo(np.int64).max


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
        self.loss = self._loss.loss()

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
        at, carried = self._first, no_rows(self._start_dtype)
        read = deque([at])
        flush = previous = np.iinfo(np.int64).min
        while at < self._last:
            stop = min(at + n_bytes // 8, self._last)
            rows, rounds, at, sound = self._read_part(at, stop)
            if not sound:
                self._note_damage(at)
            done = at >= self._last or not sound
            if not done:
                flush, previous = self._flush_limit(rounds, rows, flush, previous)
            rows = self._drop_copies(concat_rows([carried, rows]))
            if (rows.ts_ns[1:] < rows.ts_ns[:-1]).any():
                rows = rows.take(np.argsort(rows.ts_ns, kind="stable").astype(np.uint32))
            n_out = len(rows) if done else int(np.searchsorted(rows.ts_ns, flush, "right"))
            carried = rows.slice(n_out, len(rows))
            if n_out:
                table = self._table(rows.slice(0, n_out))
                self.loss = self._loss.loss()
                yield table
            if done:
                break
            read.append(at)
            if len(read) > KEPT_TABLES + 1 and FEAT_COMPRESSED not in self._perf.features:
                release_mapped(self._perf.data, read.popleft() * 8, read[0] * 8)
        self.loss = self._loss.loss()

    def _read_part(self, at: int, stop: int) -> tuple[Rows, list[int], int, bool]:
        """Return the rows of records that begin in words at..stop, where rounds end, and where and how reading ended.

        It goes window by window, so that a window's words are still in the cache when they are gathered.
        """
        builder = RowsBuilder((stop - at) * 8 // SMALLEST_SAMPLE_BYTES)
        builder.add(no_rows(self._start_dtype))
        rounds: list[int] = []
        read = self._read_compiled if self._compiled_samples is not None else self._read_window
        while at < stop:
            rows, others, at, sound = read(at, min(at + WINDOW_WORDS, stop))
            builder.add(rows)
            rounds += others[self._words[others].astype(np.uint32) == RECORD_FINISHED_ROUND].tolist()
            if not sound:
                return builder.finish(), rounds, at, False
        return builder.finish(), rounds, at, True

    def _read_window(self, at: int, stop: int) -> tuple[Rows, NDArray[np.int64], int, bool]:
        """Return the rows of records that begin in words at..stop, all records, and where and how reading ended."""
        walk = walk_records(self._words, at, stop, self._ids(), self._last)
        return self._rows(walk.at, self._words[walk.at].astype(np.uint32)), walk.at, walk.stop, walk.sound

    @cached_property
    def _compiled_samples(self) -> PerfSamples | None:
        """Say which samples the compiled kernel shall read; None where NumPy must do it."""
        useful = [(ids, layout) for ids, layout in self._layouts if layout is not None]
        if loaded() is None or not useful or not has_usual_common(self._kinds.common):
            return None
        layouts = np.array([(layout.time, layout.cpu, layout.raw, layout.chain) for _, layout in useful], np.int64)
        if useful[0][0] is None:
            return PerfSamples(layouts)
        top = max(int(ids.max(initial=0)) for ids, _ in useful if ids is not None)
        if top >= MAX_TABLE or len(useful) > MAX_LAYOUTS:
            return None
        numbers = np.zeros(top + 1, np.uint8)
        for i, (ids, _) in enumerate(useful):
            numbers[ids] = i + 1
        return PerfSamples(layouts, numbers)

    def _read_compiled(self, at: int, stop: int) -> tuple[Rows, NDArray[np.int64], int, bool]:
        """Do what _read_window does, but for the records: only those that are no samples are returned."""
        kernel, samples = loaded(), self._compiled_samples
        assert kernel is not None
        assert samples is not None
        n_samples, n_others, stop, sound = kernel.count_perf_records(self._words, at, stop, self._last)
        out, cpu = RecordColumns.empty(n_samples, self._start_dtype), np.empty(n_samples, np.int16)
        others = np.empty(n_others, np.int64)
        n = kernel.fill_perf_records(
            self._words, at, stop, samples, kind_of_id=self._kinds.kind_of_id, out=out, cpu=cpu, others=others
        )
        rows = Rows(out.ts.view(np.int64), cpu, out.tid, out.kind, out.irq_flags, out.preempt_count, out.start)
        rows = rows.slice(0, n)
        more = self._rows(others, self._words[others].astype(np.uint32)) if n_others else no_rows(self._start_dtype)
        return self._in_file_order(rows, more, others) if len(more) else rows, others, stop, sound

    def _in_file_order(self, samples: Rows, lost: Rows, others: NDArray[np.int64]) -> Rows:
        """Put the rows of lost events among the samples, where their records stand."""
        types = self._words[others].astype(np.uint32)
        at = others[(types == RECORD_LOST) | (types == RECORD_LOST_SAMPLES)]
        before = np.searchsorted(samples.start, at * 2)  # a sample's data lies behind its record's head
        order = np.argsort(np.concatenate([np.arange(len(samples)) * 2, before * 2 - 1]), kind="stable")
        return concat_rows([samples, lost]).take(order)

    def _ids(self) -> NDArray[np.uint64] | None:
        if not all(a.sample_type & SAMPLE_IDENTIFIER for a in self._perf.attrs):
            return None
        return np.array([i for a in self._perf.attrs for i in a.ids], np.uint64)

    def _flush_limit(self, rounds: list[int], rows: Rows, flush: int, previous: int) -> tuple[int, int]:
        """Return up to which time all events were read, and the newest time of finished rounds."""
        if not rounds or not len(rows):
            return flush, previous
        where = rows.start.astype(np.int64) // 2  # u64 words
        newest = [int(rows.ts_ns[where < r].max(initial=previous)) for r in rounds[-2:]]
        if len(newest) == 1:
            newest.insert(0, previous)
        return max(newest[0], flush), newest[1]

    def _drop_copies(self, rows: Rows) -> Rows:
        """Leave out records that perf wrote twice, as perf 6.1 was seen to do.

        The time of a CPU steps back, and what follows equals, byte for byte, what was there already.
        """
        if (rows.ts_ns[1:] >= rows.ts_ns[:-1]).all():
            return rows
        cpus = np.flatnonzero(np.bincount(rows.cpu.view(np.uint16))).astype(np.uint16).view(np.int16)
        copies = [copy for cpu in cpus.tolist() for copy in self._copies_of_cpu(rows, np.flatnonzero(rows.cpu == cpu))]
        if not copies:
            return rows
        notes = self.capture.meta.setdefault("notes", [])
        note = f"perf wrote {len(copies)} records twice; the copies are left out"
        if note not in notes:
            notes.append(note)
        return rows.take(np.setdiff1d(np.arange(len(rows)), copies))

    def _copies_of_cpu(self, rows: Rows, mine: NDArray[np.intp]) -> list[int]:
        """Return those of a CPU's rows that are copies of earlier ones."""
        ts = rows.ts_ns[mine]
        late = np.flatnonzero(ts < np.maximum.accumulate(ts))
        if not len(late):
            return []
        late = np.union1d(late, late + 1)  # the last copy stands level with the newest record
        suspects = mine[np.isin(ts, ts[late[late < len(ts)]])]
        seen: set[tuple[int, bytes]] = set()
        copies = []
        for row in suspects.tolist():
            key = (int(rows.ts_ns[row]), self._record_bytes(rows, row))
            if key in seen:
                copies.append(row)
            seen.add(key)
        return copies

    def _record_bytes(self, rows: Rows, row: int) -> bytes:
        """Return the raw data of a sample: its length stands before it."""
        half, start = self._words.view(np.uint32), int(rows.start[row])
        if rows.kind[row] == self._kinds.lost:
            return row.to_bytes(8, "little")  # no two are copies
        return half[start - 1 : start + min(int(half[start - 1]), MAX_RECORD) // 4].tobytes()

    def _note_damage(self, word: int) -> None:
        head = int(self._words[word]) if word < len(self._words) else 0
        found = f"size {head >> 48} of type {head & 0xFFFFFFFF}"
        self._loss.add_faults([Fault(word * 8, -1, "a record with a size that fits", found)], truncated=True)

    def _rows(self, at: NDArray[np.int64], types: NDArray[np.uint32]) -> Rows:
        """Return the rows of records in file order, and remember threads."""
        samples = at[types == RECORD_SAMPLE]
        parts = [self._sample_rows(samples, ids, layout) for ids, layout in self._layouts if layout is not None]
        lost = at[(types == RECORD_LOST) | (types == RECORD_LOST_SAMPLES)]
        if len(lost):
            parts.append(self._lost_rows(lost))
        self._read_threads(at[(types == RECORD_COMM) | (types == RECORD_FORK)])
        rows = concat_rows([part for part, _ in parts]) if parts else no_rows(self._start_dtype)
        if len(parts) > 1:
            rows = rows.take(np.argsort(np.concatenate([where for _, where in parts]), kind="stable"))
        return rows

    def _sample_rows(
        self, at: NDArray[np.int64], ids: NDArray[np.uint64] | None, layout: SampleLayout
    ) -> tuple[Rows, NDArray[np.int64]]:
        words = self._words
        if ids is not None:
            at = at[is_one_of(words.take(at + 1, mode="clip"), ids)]
        raw = at + layout.raw
        if layout.chain >= 0:
            raw = raw + np.minimum(words.take(at + layout.chain, mode="clip"), MAX_RECORD).astype(np.int64)
        inside = raw < at + (words[at] >> np.uint64(51)).astype(np.int64)
        if not inside.all():
            at, raw = at[inside], raw[inside]
        half = words.view(np.uint32)
        start = raw * 2 + 1
        kind_id, flags, preempt, tid = gather_common(half, start, self._kinds.common)
        cpu = _cpu_numbers(words[at + layout.cpu]) if layout.cpu >= 0 else np.full(len(at), -1, np.int16)
        rows = Rows(
            words[at + layout.time].astype(np.int64),
            cpu,
            tid,
            self._kinds.kind_of_id[kind_id],
            flags,
            preempt,
            start.astype(self._start_dtype),
        )
        return rows, at

    def _lost_rows(self, at: NDArray[np.int64]) -> tuple[Rows, NDArray[np.int64]]:
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
        ), at

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
