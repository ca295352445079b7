"""A recording as a Perfetto trace: decoded once, checked on the way, in bounded memory."""

from __future__ import annotations

from collections import Counter
from typing import IO, TYPE_CHECKING

import numpy as np

from kvmtrace.check.engine import checker_of
from kvmtrace.isa.registry import describe_exit_reason
from kvmtrace.render.perfetto.exit_rates import ExitRates
from kvmtrace.render.perfetto.interrupt_flows import InterruptFlows
from kvmtrace.render.perfetto.protobuf import PftraceWriter
from kvmtrace.render.perfetto.timeline_slices import VcpuSlices
from kvmtrace.render.perfetto.trace_content import CounterValues, Names, Track
from kvmtrace.render.perfetto.trace_events import TraceEventsWriter
from kvmtrace.spans.lane_keys import split_pair
from kvmtrace.spans.span_builder import SpanBuilder
from kvmtrace.stats.vcpus import Identities
from kvmtrace.table.pipeline import run_stages
from kvmtrace.table.vm_threads import names_of_processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmtrace.check.verdict import Violation
    from kvmtrace.render.perfetto.trace_content import TraceWriter
    from kvmtrace.spans.span_builder import Spans
    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Recording

PIECE_EVENTS = 1 << 17  # each becomes some texts
UNKNOWN_PROCESS = 1  # pid of VMs whose process is not known
INTERRUPTS, COUNTERS = 1 << 24, 1 << 25  # added to what lines that are no threads are numbered by; above every tid


class TraceFile:
    """Puts a recording's tables into a trace.

    Parameters
    ----------
    recording : Recording
    writer : TraceWriter
    """

    def __init__(self, recording: Recording, writer: TraceWriter) -> None:
        self._recording = recording
        self._writer = writer
        self._builder = SpanBuilder(rows=True)
        self._names = Names()
        self._slices = VcpuSlices(self._names)
        self._flows = InterruptFlows(self._names)
        self._rates = ExitRates()
        self._identities = Identities()
        self._vm_names = names_of_processes(recording)
        self._tracks: list[Track] = []  # of the vCPU threads, by number
        self._interrupts: dict[int, Track] = {}  # thread number -> where its interrupts are shown

    def feed(self, table: EventTable) -> None:
        """Take in the next table."""
        spans = self._builder.feed(table)
        self._identities.feed(table, self._builder.tids)
        self._identities.add_recorded(self._recording)
        self._add_tracks()
        self._feed_interrupts(table)
        self._feed_spans(spans)

    def _feed_spans(self, spans: Spans | None) -> None:
        if spans is None:
            return
        self._writer.slices(self._slices.feed(spans), self._names)
        exits = spans.pairs.is_exit & ~spans.told_later[spans.pairs.edges]
        self._rates.feed(spans.pairs.reasons[exits], spans.lanes.ts_ns[spans.pairs.edges[exits]])

    def _add_tracks(self) -> None:
        """Give every new vCPU thread its line."""
        new = [self._track(number) for number in range(len(self._tracks), len(self._builder.tids))]
        self._tracks += new
        self._writer.tracks(new)

    def _process(self, tid: int) -> tuple[int, str]:
        """Return the pid and name of a thread's VM."""
        pid = self._identities.pids.get(tid)
        if pid is None:
            return UNKNOWN_PROCESS, "VM"
        comm = self._recording.comms.get(pid) or self._identities.comms.get(pid)
        if name := self._vm_names.get(pid):
            return pid, f"VM {name} ({comm} {pid})" if comm else f"VM {name} ({pid})"
        return pid, f"VM {pid} ({comm})" if comm else f"VM {pid}"

    def _label(self, tid: int) -> str:
        vcpu_id = self._identities.vcpu_ids.get(tid)
        return f"vCPU {'?' if vcpu_id is None else vcpu_id}"

    def _track(self, number: int) -> Track:
        tid = self._builder.tids[number]
        pid, process = self._process(tid)
        comm = self._identities.comms.get(tid) or "unknown"
        return Track(number + 1, pid, tid, f"{self._label(tid)} ({comm}, thread {tid})", process)

    def _feed_interrupts(self, table: EventTable) -> None:
        """Write the interrupts of a table, each vCPU's on a line of its own."""
        tids = self._builder.tids
        threads = {tid: number for number, tid in enumerate(tids)}
        ids = [(self._identities.vcpu_ids.get(tid), number) for number, tid in enumerate(tids)]
        times = Counter(one for one, _ in ids)
        apics = {one: number for one, number in ids if one is not None and times[one] == 1}
        found = self._flows.feed(table, threads, apics)
        if found is None:
            return
        for number in np.unique(found.track).tolist():
            if number not in self._interrupts:
                thread = self._tracks[number]
                name = f"{self._label(thread.tid)} interrupts"
                track = Track(INTERRUPTS + number, thread.pid, INTERRUPTS + thread.tid, name, thread.process)
                self._interrupts[number] = track
                self._writer.tracks([track])
        found.track[:] += INTERRUPTS
        self._writer.slices(found, self._names)

    def finish(self, violations: Iterable[Violation]) -> None:
        """Write what was held back, the rates, and the violations."""
        self._feed_spans(self._builder.finish())
        reasons = self._builder.keys.reasons.keys()
        process = self._tracks[0] if self._tracks else None
        for number, ts_ns, rates in self._rates.finish():
            assert process is not None
            name = f"exits/s: {describe_exit_reason(*split_pair(reasons[number]))}"
            track = Track(COUNTERS + number, process.pid, COUNTERS + number, name, process.process, counter=True)
            self._writer.tracks([track])
            self._writer.counter(CounterValues(track.number, ts_ns, rates))
        by_tid = {track.tid: track for track in self._tracks}
        for violation in violations:
            if violation.tid in by_tid:
                self._writer.violation(violation, by_tid[violation.tid])
        self._writer.finish()


def write_trace(
    recording: Recording, out: IO[bytes], *, as_json: bool, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Write a recording as a Perfetto trace.

    Parameters
    ----------
    out : binary file
    as_json : bool, in the Trace Event Format, else as protobuf
    progress : called with the number of events read so far
    """
    writer: TraceWriter = TraceEventsWriter(out) if as_json else PftraceWriter(out, recording.capture.clock)
    trace, checker = TraceFile(recording, writer), checker_of(recording)
    n_events = 0

    def feed(table: EventTable) -> None:
        nonlocal n_events
        trace.feed(table)
        n_events += len(table)
        progress(n_events)

    run_stages(recording.iter_events(PIECE_EVENTS), checker.stages, (feed,))
    trace.finish(checker.finish().violations)
