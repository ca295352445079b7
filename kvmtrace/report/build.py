"""A recording in, the report document out: one pass over the events, in bounded memory."""

from __future__ import annotations

import json
from dataclasses import field, replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.errors import UsageError
from kvmtrace.isa.registry import isa_name, run_functions
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.report.beginning import Beginning
from kvmtrace.report.document import CaptureInfo, DamagedPlace, LossInfo, Report
from kvmtrace.report.exit_numbers import with_numbers
from kvmtrace.report.selection import Selection, describe_empty
from kvmtrace.report.triggers_told import with_triggers
from kvmtrace.report.vms import vm_rows, with_names
from kvmtrace.spans.levels import pairs_of_level
from kvmtrace.spans.span_builder import SpanBuilder
from kvmtrace.spans.time_parts import EXIT_PARTS, ReasonSplit
from kvmtrace.stats.detail import DetailAccumulator
from kvmtrace.stats.exits import ExitAccumulator
from kvmtrace.stats.nested import NestedAccumulator
from kvmtrace.stats.perf_kvm_stat import PerfAccumulator
from kvmtrace.stats.rate import RateAccumulator
from kvmtrace.stats.slowest import SlowestAccumulator
from kvmtrace.stats.stolen import StolenAccumulator
from kvmtrace.stats.userspace import UserspaceAccumulator
from kvmtrace.stats.vcpus import Identities, VcpuAccumulator, with_ids
from kvmtrace.table.event_table import LOST_EVENTS
from kvmtrace.table.pipeline import run_stages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvmtrace.check.engine import Checker
    from kvmtrace.check.verdict import Comparison
    from kvmtrace.report.stretches import Stretches
    from kvmtrace.report.timeline import TimelineBuilder
    from kvmtrace.spans.lanes import Lanes
    from kvmtrace.spans.span_builder import Spans
    from kvmtrace.stats.rows import Detail
    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Recording

PIECE_EVENTS = 1 << 18  # small enough for the caches
# rows of each attribution: what a text report cuts further, what a document holds, what --by promises
SHOWN_ROWS, DOCUMENT_ROWS, ALL_ROWS = 256, 4096, 1 << 20
SLOWEST = 32


@dataclass(frozen=True)
class ReportOptions:
    """What a report shall hold.

    Parameters
    ----------
    selection : the part of the recording that the statistics are about
    model : compare with the reference model
    perf_only : nothing but the perf-compatible tables
    symbol : guest address -> its symbol, None if there is none
    detail_rows : rows of each attribution; what lies behind is told in one
    slowest : VM-exits told one by one
    timeline : reduce the recording to what renderers draw over time
    every_segment : the timeline holds all of a long recording's segments
    stretches : called with what gives every stretch of the timeline, if there is one
    every_step : list a replay's steps also where prediction and recording nowhere disagree
    progress : called with the number of events read so far
    tables, spans : called with each table and each piece of spans, for others who want them of the same pass
    """

    selection: Selection = field(default_factory=Selection)
    model: bool = True
    perf_only: bool = False
    symbol: Callable[[int], str | None] = lambda _: None
    detail_rows: int = DOCUMENT_ROWS
    slowest: int = SLOWEST
    timeline: bool = False
    every_segment: bool = False
    stretches: Callable[[Stretches], None] = lambda _: None
    every_step: bool = True
    progress: Callable[[int], None] = lambda _: None
    tables: tuple[Callable[[EventTable], None], ...] = ()
    spans: tuple[Callable[[Spans], None], ...] = ()


def build_report(recording: Recording, options: ReportOptions | None = None) -> Report:
    """Report on a recording.

    Parameters
    ----------
    recording : Recording
    options : ReportOptions; everything by default
    """
    options = options or ReportOptions()
    builder = ReportBuilder(options)
    checker = _new_checker(recording) if options.model and not options.perf_only else None
    selection = options.selection.resolved(recording)
    builder.begin = selection.selection.begin
    beginning = Beginning()

    def collect(table: EventTable) -> None:
        if not options.perf_only:
            beginning.feed(table)
        builder.feed(table, selection.of(table))
        for take in options.tables:
            take(table)
        options.progress(builder.n_events)

    model = [checker.stages] if checker else []
    run_stages(_read_ahead(recording.iter_events(PIECE_EVENTS)), *model, (collect,))
    if not selection.selection.everything and not builder.n_selected:
        raise UsageError(describe_empty(options.selection, recording))
    report = builder.finish(recording, checker.finish() if checker else None)
    if selection.selection.level is not None and not report.exits:
        raise UsageError(f"{recording.capture.path} tells of no VM-exit of L{selection.selection.level}")
    replay = beginning.replay(recording, every_step=options.every_step) if checker else None
    bring_up = beginning.bring_up(recording, report.capture.isa)
    report = replace(report, bring_up=bring_up, replay=replay, vcpus=with_ids(report.vcpus, bring_up))
    vms = vm_rows(recording, report.vcpus)
    report = with_numbers(replace(report, vms=vms, vcpus=with_names(report.vcpus, vms)), recording)
    return builder.with_timeline(with_triggers(report, recording))


def _span(report: Report) -> tuple[int, int]:
    """Return when the recording, or what is selected of it, begins, and how long it is."""
    return report.capture.start_ns or 0, report.capture.duration_ns or 0


def check_report(recording: Recording, limit: int = 20, progress: Callable[[int], None] = lambda _: None) -> Report:
    """Return a document with nothing but `capture`, `loss` and `model`.

    Parameters
    ----------
    limit : violations described per rule; all are counted
    progress : called with the number of events read so far
    """
    checker = _new_checker(recording, limit)
    builder = ReportBuilder(ReportOptions(perf_only=True))

    def look_at(table: EventTable) -> None:
        builder.look_at(table)
        progress(builder.n_events)

    run_stages(_read_ahead(recording.iter_events(PIECE_EVENTS)), checker.stages, (look_at,))
    report = builder.finish(recording, None)
    model = checker.finish()
    capture = replace(report.capture, isa=report.capture.isa or model.isa)
    return with_numbers(Report(capture, report.loss, model=model), recording)


def _read_ahead(tables: Iterable[EventTable]) -> Iterator[EventTable]:
    """Yield tables with the fields already read that an earlier one was asked for."""
    before: EventTable | None = None
    for table in tables:
        if before is not None:
            table.read_ahead(before.asked_for)
        before = table
        yield table


def _new_checker(recording: Recording, limit: int = 20) -> Checker:
    from kvmtrace.check.engine import checker_of

    return checker_of(recording, limit)


class ReportBuilder:
    """Collects everything of the report that comes from events."""

    def __init__(self, options: ReportOptions) -> None:
        self._options = options
        self._spans = SpanBuilder(every_step=options.timeline)
        self._perf = PerfAccumulator()
        self._exits = ExitAccumulator()
        self._userspace = UserspaceAccumulator()
        self._vcpus = VcpuAccumulator()
        self._split = ReasonSplit()
        self._detail = DetailAccumulator()
        self._rate = RateAccumulator()
        self._slowest = SlowestAccumulator(options.slowest)
        self._nested = NestedAccumulator()
        self._stolen = StolenAccumulator()
        self._exits_before: dict[int, int] = {}  # tid -> VM-exits before the selected stretch
        self._identities = Identities()
        self._timeline: TimelineBuilder | None = None
        self._described: set[str] = set()
        self._span: tuple[int, int] | None = None
        self.n_events = self.n_selected = 0
        self.begin: int | None = None  # of the selected stretch, absolute

    def feed(self, table: EventTable, selected: EventTable) -> None:
        """Take in the next table, and of it what was selected (the table itself for everything)."""
        self.look_at(table, selected)
        self._perf.feed(selected)
        if self._options.perf_only:
            return
        lanes = self._spans.feed_lanes(selected)
        self._described |= set(selected.kind_index)
        self._count_before(table)
        if self._options.selection.level is None:  # these events are told without their VM-exits
            self._detail.feed_table(selected, self._spans.keys)
        self._rate.feed(selected)
        self._identities.feed(selected, self._spans.tids)
        self._stolen.feed(selected, self._spans.tids, self._identities.vcpu_ids)
        self._feed_lanes(lanes)

    def _count_before(self, table: EventTable) -> None:
        """Count the VM-exits of each thread before the selected stretch of time: numbers are of the recording."""
        if self.begin is None or not table.count("kvm_exit"):
            return
        rows = table.rows("kvm_exit")
        tids, counts = np.unique(table.tid[rows[table.ts_ns[rows] < self.begin]], return_counts=True)
        for tid, n in zip(tids.tolist(), counts.tolist(), strict=True):
            self._exits_before[tid] = self._exits_before.get(tid, 0) + n

    def look_at(self, table: EventTable, selected: EventTable | None = None) -> None:
        """Count a table's events and note its time span."""
        self.n_events += len(table) - table.count(LOST_EVENTS)  # what stands for lost events is none
        selected = table if selected is None else selected
        self.n_selected += len(selected) - selected.count(LOST_EVENTS)
        if len(selected):
            low, high = int(selected.ts_ns.min()), int(selected.ts_ns.max())
            self._span = (min(low, self._span[0]), max(high, self._span[1])) if self._span else (low, high)

    def _feed_lanes(self, lanes: Lanes, *, final: bool = False) -> None:
        if not len(lanes):
            return
        spans = self._spans.spans(lanes, final=final)
        assert spans is not None
        level = self._options.selection.level
        pairs = spans.pairs if level is None else pairs_of_level(spans.pairs, spans.levels, level)
        self._exits.feed(lanes, pairs)
        self._userspace.feed(lanes, None if level is None else pairs.owner >= 0)
        if self._options.timeline:
            self._timeline = self._timeline or self._new_timeline()
            self._timeline.feed(spans)
        self._split.feed(lanes, pairs, spans.swept, spans.moves)
        self._vcpus.feed(lanes, spans.swept, spans.moves)
        self._detail.feed(lanes, pairs, owned=level is not None)
        self._slowest.feed(spans, pairs.handling)
        self._nested.feed(spans)
        for take in self._options.spans:
            take(spans)

    def finish(self, recording: Recording, model: Comparison | None) -> Report:
        """Return the report; `recording` has been read to its end."""
        self._feed_lanes(self._spans.finish_lanes(), final=True)
        keys = self._spans.keys
        perf_tables = self._perf.finish()
        capture = self._capture_info(recording)
        if self._options.perf_only:
            return Report(capture, self._loss_info(recording), perf_compatible=perf_tables)
        self._identities.add_recorded(recording)
        pids = {tid: self._identities.pids.get(tid) for tid in self._spans.tids}
        stolen, wake_ups = self._stolen.finish(recording, pids)
        knows_userspace = "kvm_userspace_exit" in self._described
        vcpus = self._vcpus.finish(self._spans.tids, self._identities, self._can_tell())
        return Report(
            capture=capture,
            loss=self._loss_info(recording),
            exits=self._exits.finish(keys.reasons, self._split, self._told_parts(), userspace=knows_userspace),
            perf_compatible=perf_tables,
            userspace_exits=self._userspace.finish(keys.userspace),
            vcpus=vcpus,
            nested=self._nested.finish(self._spans.keys, self._spans.tids, vcpus),
            detail=self._finished_detail(),
            rate=self._rate.finish(),
            model=model,
            stolen=stolen,
            wake_ups=wake_ups,
            slowest=self._slowest.finish(keys, self._spans.tids, self._exits_before, self._spans.recorded),
        )

    def _new_timeline(self) -> TimelineBuilder:
        from kvmtrace.report.timeline import MAX_SEGMENTS, TimelineBuilder

        assert self._span is not None
        return TimelineBuilder(self._span[0], None if self._options.every_segment else MAX_SEGMENTS)

    def with_timeline(self, report: Report) -> Report:
        """Return the finished report with its timeline, if one was asked for and there is something to draw."""
        if self._timeline is None:
            return report
        from kvmtrace.report.timeline import Told

        labels = {
            row.tid: (f"{row.vm} " if row.vm else "")
            + f"vCPU {'?' if row.vcpu_id is None else row.vcpu_id} ({row.comm or 'thread'} {row.tid})"
            for row in report.vcpus
        }
        start, length = _span(report)
        violations = report.model.violations if report.model else ()
        told = Told(labels, self._exits_before, violations, start, length)
        made = self._timeline.finish(self._spans.keys, self._spans.tids, told)
        if made is None:
            return report
        self._options.stretches(made[1])
        return replace(report, timeline=made[0])

    def _finished_detail(self) -> Detail:
        return self._detail.finish(self._spans.keys, self._options.symbol, self._options.detail_rows)

    def _can_tell(self) -> dict[str, bool]:
        """Return which parts of a budget this capture shows."""
        recorded = self._spans.recorded
        return {
            "guest_ns": len(self._spans.keys.reasons) > 0,
            "entry_exit_ns": not self._described.isdisjoint(run_functions("_return")),
            "userspace_ns": recorded.userspace,
            "blocked_ns": recorded.scheduling or recorded.wakeups,
            "halt_poll_ns": recorded.wakeups,
            "preempted_ns": recorded.scheduling,
        }

    def _told_parts(self) -> frozenset[str]:
        """Return which of EXIT_PARTS this capture shows."""
        return frozenset(filter(self._spans.recorded.tells, EXIT_PARTS))

    def _capture_info(self, recording: Recording) -> CaptureInfo:
        capture = recording.capture
        start, stop = self._span or (None, None)
        return CaptureInfo(
            path=capture.path,
            format=capture.format,
            host=capture.host,
            kernel=capture.kernel,
            cpu_model=capture.cpu_model,
            isa=self._isa(recording),
            clock=capture.clock,
            backend=capture.backend,
            events=capture.events or _kind_names(recording),
            n_events=self.n_events,
            start_ns=start,
            duration_ns=None if start is None or stop is None else stop - start,
            tracer_cost_ns_per_event=capture.tracer_cost_ns_per_event,
            n_cpus=capture.n_cpus,
            filters=_filters(capture.meta.get("filters")),
            selection=self._options.selection.describe(),
            vm=recording.vm,
        )

    def _isa(self, recording: Recording) -> str | None:
        """Return the ISA that the VM-exits name, or else the recorder."""
        seen = {isa_name(number) for number in self._perf.isas}
        seen.discard(None)
        if len(seen) == 1:
            return seen.pop()
        guest_run = recording.capture.meta.get("guest_run") or {}
        named = recording.capture.meta.get("isa") or guest_run.get("isa")
        return str(named) if named else None

    def _loss_info(self, recording: Recording) -> LossInfo:
        loss = recording.loss
        damage = tuple(DamagedPlace(d.offset, d.cpu, d.expected, d.found) for d in loss.damage)
        by_cpu = {str(cpu): count for cpu, count in sorted(loss.by_cpu.items())}
        meta = recording.capture.meta
        return LossInfo(
            events=loss.events,
            by_cpu=by_cpu,
            truncated=loss.truncated,
            discarded_intervals=self._exits.discarded,
            damage=damage,
            ended_by=meta.get("ended_by"),
            notes=tuple(meta.get("notes") or ()),
            repeated=loss.repeated,
            not_understood=dict(loss.not_understood),
        )


def _kind_names(recording: Recording) -> tuple[str, ...]:
    """Name what the capture describes, where it does not say what was enabled."""
    return tuple(f"{kind.system}:{kind.name}" for kind in recording.kinds if kind.name != "lost_events")


def _filters(recorded: object) -> dict[str, str] | None:
    """Return what the metadata say of filters, each in words; they are untrusted."""
    if not isinstance(recorded, dict):
        return None
    return {str(name): words if isinstance(words, str) else json.dumps(words) for name, words in recorded.items()}
