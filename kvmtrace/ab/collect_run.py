"""A recording as one run of a comparison: one pass, its durations kept as 10 bytes each."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.ab.run import KERNEL, USERSPACE, Key, RunSamples, Samples, Traced
from kvmtrace.formats import open_recording
from kvmtrace.report.build import ReportOptions, build_report
from kvmtrace.report.selection import Selection
from kvmtrace.spans.keys import KeyIndex
from kvmtrace.spans.lane_keys import split_pair
from kvmtrace.spans.lanes import Step
from kvmtrace.spans.levels import pairs_of_level
from kvmtrace.spans.span_builder import SpanBuilder, iter_spans
from kvmtrace.spans.vmm_stays import find_userspace_stays
from kvmtrace.table.event_table import TRACE_FLAG_IRQS_OFF
from kvmtrace.table.one_vm import only_vm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from kvmtrace.report.document import Report
    from kvmtrace.spans.span_builder import Spans
    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Recording

_U32_MAX = 2**32 - 1
_FREQUENT = 50  # an event is frequent if it happens at least once in so many VM-exits


class TimedDurations:
    """Durations of many groups with their start stamps, fed in pieces.

    A duration costs 10 bytes (uint32 ns, uint32 ns since the piece's first, its group) unless one of them is longer
    than 4.29 s.
    """

    def __init__(self) -> None:
        self._pieces: list[tuple[int, NDArray[Any], NDArray[Any], NDArray[Any]]] = []

    def add(self, groups: NDArray[Any], ts_ns: NDArray[np.int64], dur_ns: NDArray[np.int64]) -> None:
        """Add durations, ns, none of them negative."""
        if not len(groups):
            return
        first = int(ts_ns.min())
        since = ts_ns - first
        small = np.uint16 if int(groups.max()) <= 0xFFFF else np.uint32
        self._pieces.append((first, groups.astype(small), _compact(since), _compact(dur_ns)))

    def grouped(self) -> Iterator[tuple[int, Samples]]:
        """Yield (group, its durations in time order)."""
        if not self._pieces:
            return
        groups = np.concatenate([piece[1] for piece in self._pieces])
        order = np.argsort(groups, kind="stable")
        bounds = np.concatenate([[0], np.cumsum(np.bincount(groups))])
        dur_ns = np.concatenate([piece[3] for piece in self._pieces])
        ts_ns = np.concatenate([piece[2].astype(np.int64) + piece[0] for piece in self._pieces])
        self._pieces = []
        for group in range(len(bounds) - 1):
            rows = order[bounds[group] : bounds[group + 1]]
            if len(rows):
                rows = rows[np.argsort(ts_ns[rows], kind="stable")]
                yield group, Samples(ts_ns[rows], dur_ns[rows].astype(np.int64))


def _compact(values: NDArray[np.int64]) -> NDArray[Any]:
    return values.astype(np.uint32) if int(values.max()) <= _U32_MAX else values


class RunCollector:
    """Collects what a comparison needs of consecutive tables and spans.

    Parameters
    ----------
    level : of guest, whose VM-exits and stays in userspace alone are compared; None for all
    """

    def __init__(self, level: int | None = None) -> None:
        self._level = level
        self._exits = TimedDurations()
        self._stays = TimedDurations()
        self._guest_ns = 0
        self._counts: dict[str, int] = {}
        self._irqs_off = {"kvm_entry": 0, "kvm_exit": 0}
        self._span: tuple[int, int] | None = None
        self._keys: tuple[KeyIndex, KeyIndex] = (KeyIndex(), KeyIndex())  # of VM-exits, of userspace exits

    def take_table(self, table: EventTable) -> None:
        """Count the events of a table."""
        counts = np.bincount(table.kind, minlength=len(table.kinds))
        for kind, count in zip(table.kinds, counts.tolist(), strict=True):
            self._counts[kind.name] = self._counts.get(kind.name, 0) + count
        for event in self._irqs_off:
            off = table.irq_flags[table.rows(event)] & TRACE_FLAG_IRQS_OFF
            self._irqs_off[event] += int(np.count_nonzero(off))
        if len(table):
            low, high = int(table.ts_ns.min()), int(table.ts_ns.max())
            self._span = (min(low, self._span[0]), max(high, self._span[1])) if self._span else (low, high)

    def take_spans(self, spans: Spans) -> None:
        """Take in a piece of spans."""
        lanes, pairs, level = spans.lanes, spans.pairs, self._level
        if level is not None:
            pairs = pairs_of_level(pairs, spans.levels, level)
        self._keys = spans.keys.reasons, spans.keys.userspace
        handled = pairs.handling & pairs.sound
        left = np.zeros(len(lanes) + 1, bool)  # per lane row: an exit that left to userspace; the last: none
        left[pairs.owner[lanes.step == Step.USERSPACE_EXIT]] = True
        at = pairs.edges[:-1][handled]
        self._exits.add(pairs.reasons[:-1][handled] << 1 | left[at], lanes.ts_ns[at], pairs.dur_ns[handled])
        self._guest_ns += int(pairs.dur_ns[pairs.guest & pairs.sound].sum())
        stays = find_userspace_stays(lanes)
        kept = stays.sound if level is None else stays.sound & (pairs.owner[stays.left] >= 0)
        at = stays.left[kept]
        self._stays.add(lanes.arg[at], lanes.ts_ns[at], stays.dur_ns[kept])

    def finish(self, recording: Recording, isa: str | None) -> RunSamples:
        """Return the run, without what the report tells; `recording` has been read to its end."""
        reasons, userspace = (keys.keys() for keys in self._keys)
        samples: dict[Key, Samples] = {}
        for group, own in self._exits.grouped():
            number, reason = split_pair(reasons[group >> 1])
            samples[Key("vm_exit", number, reason, USERSPACE if group & 1 else KERNEL)] = own
        for group, own in self._stays.grouped():
            errno, reason = split_pair(userspace[group])
            if not errno:  # with an errno the reason may be a stale one
                samples[Key("userspace", 0, reason, USERSPACE)] = own
        start, stop = self._span or (0, 0)
        return RunSamples(
            name=recording.capture.path,
            start_ns=start,
            wall_ns=stop - start,
            guest_ns=self._guest_ns or None,
            samples=samples,
            budget_ns={},
            transitions={},
            late_exit=self._late_exit(),
            traced=self._traced(recording, isa),
        )

    def _late_exit(self) -> bool | None:
        """Say whether kvm_exit is traced with interrupts on; None without exits or without irq flags."""
        # kvm_entry is always traced with interrupts off: if its flag does not say so, the capture has no flags
        n_exits = self._counts.get("kvm_exit", 0)
        return self._irqs_off["kvm_exit"] / n_exits < 0.5 if n_exits and self._irqs_off["kvm_entry"] else None

    def _traced(self, recording: Recording, isa: str | None) -> Traced:
        """Return how the run was recorded; the recorder's metadata are untrusted."""
        capture, meta = recording.capture, recording.capture.meta
        enough = max(self._counts.get("kvm_exit", 0), self._counts.get("kvm_userspace_exit", 0)) / _FREQUENT
        guest_run, filters = meta.get("guest_run"), meta.get("filters")
        guest = None
        if isinstance(guest_run, dict) and guest_run.get("guest"):
            guest = f"{guest_run['guest']} {json.dumps(guest_run.get('arguments') or {}, sort_keys=True)}"
        return Traced(
            isa=isa,
            enabled=frozenset(name.rpartition(":")[2] for name in capture.events) or None,
            occurring=frozenset(name for name, count in self._counts.items() if count),
            frequent=frozenset(name for name, count in self._counts.items() if count > enough),
            filters={str(name): str(words) for name, words in filters.items()} if isinstance(filters, dict) else {},
            guest=guest,
            backend=capture.backend,
            lost=None if recording.loss.truncated else recording.loss.events,
        )


def load_run(path: str, progress: Callable[[int], None] = lambda _: None, *, vm: str | None = None) -> RunSamples:
    """Read a recording, or of it what `--vm` means, and collect what a comparison needs of it."""
    return read_run(only_vm(open_recording(path), vm), progress)


def read_run(
    recording: Recording, progress: Callable[[int], None] = lambda _: None, *, level: int | None = None
) -> RunSamples:
    """Collect what a comparison needs of a recording, in one pass.

    Parameters
    ----------
    level : of guest (1, 2), whose VM-exits alone are compared; the time budget and the model stay whole

    Raises
    ------
    UsageError
        No VM-exit is of that level.
    """
    collector = RunCollector(level)
    options = ReportOptions(
        Selection(level=level), progress=progress, tables=(collector.take_table,), spans=(collector.take_spans,)
    )
    report = build_report(recording, options)
    return _with_report(collector.finish(recording, report.capture.isa), report)


def run_of(recording: Recording, report: Report) -> RunSamples:
    """Collect what a comparison needs of a recording whose report (made with the model) is there already."""
    collector = RunCollector()

    def tables() -> Iterator[EventTable]:
        for table in recording.iter_events():
            collector.take_table(table)
            yield table

    for spans in iter_spans(tables(), SpanBuilder()):
        collector.take_spans(spans)
    return _with_report(collector.finish(recording, report.capture.isa), report)


def _with_report(run: RunSamples, report: Report) -> RunSamples:
    """Return the run with the budget and the model's part of its report."""
    budget: dict[str, int | None] = {}
    for vcpu in report.vcpus:
        for part, value in vars(vcpu.budget).items():
            known = budget.get(part)
            budget[part] = known if value is None else (known or 0) + value
    model = report.model
    assert model is not None, "made with the model"
    edges = {(t.from_state, t.event, t.to_state): t.count for t in model.transitions}
    return replace(run, budget_ns=budget, transitions=edges, violations=model.n_violations)
