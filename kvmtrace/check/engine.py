"""The comparison of a recording with the reference model, part by part, with bounded memory."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.check.alphabet import ENTRY, USERSPACE
from kvmtrace.check.batch import make_batch
from kvmtrace.check.completion import check_completion
from kvmtrace.check.consistency import check_consistency
from kvmtrace.check.coverage import Statistics
from kvmtrace.check.decoding import check_decoding
from kvmtrace.check.findings import Findings, merged
from kvmtrace.check.follow_ups import check_follow_ups
from kvmtrace.check.guest_mode import check_guest_mode
from kvmtrace.check.heuristics import Halted, check_storms
from kvmtrace.check.in_service import InService, check_in_service
from kvmtrace.check.injection import check_injection
from kvmtrace.check.leaving import check_errno, check_leaving
from kvmtrace.check.losses import Gaps
from kvmtrace.check.observability import Evidence, find_capability
from kvmtrace.check.order import check_order
from kvmtrace.check.payloads import check_payloads
from kvmtrace.check.rip import check_rip
from kvmtrace.check.rip_after_userspace import check_rip_after_userspace
from kvmtrace.check.state_machine import compile_automaton
from kvmtrace.check.steps import check_steps, check_stray_follow_ups, take_steps
from kvmtrace.check.thread_events import build_sequence, vcpu_tids
from kvmtrace.errors import MissingEventError
from kvmtrace.table.distinct import distinct
from kvmtrace.table.event_table import EventTable
from kvmtrace.table.parking import materialise

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch
    from kvmtrace.check.observability import Capability
    from kvmtrace.check.state_machine import Automaton
    from kvmtrace.check.thread_events import Sequence
    from kvmtrace.check.verdict import Comparison
    from kvmtrace.table.recording import Capture, Recording

# in two halves, for two threads
FIRST_CHECKS: tuple[Callable[[Batch], None], ...] = (
    check_follow_ups,
    check_payloads,
)
OTHER_CHECKS: tuple[Callable[[Batch], None], ...] = (
    check_rip,
    check_leaving,
    check_errno,
    check_guest_mode,
    check_completion,
    check_rip_after_userspace,
    check_injection,
    check_consistency,
    check_decoding,
    check_storms,
    check_order,
)
BEFORE_ALL = -(1 << 62)  # ns
MAX_PARKED = 65_536  # events of a thread that wait for their continuation; more are given up as unknown


@dataclass(frozen=True, eq=False)
class Part:
    """Part of a recording, prepared for the rules.

    Parameters
    ----------
    batch : what the rules look at
    whole : its events and those that wait for the next part
    automaton : Automaton that it was stepped through
    index : int64, row of the table -> row of the recording
    final : nothing follows
    """

    batch: Batch
    whole: Sequence
    automaton: Automaton
    index: NDArray[np.int64]
    final: bool


class Checker:
    """Steps the model through consecutive tables of one recording.

    The unfinished end of each thread (from its last kvm_entry on) waits for the next table.

    Parameters
    ----------
    capture : Capture, tells what was recorded
    limit : int, violations kept per rule
    """

    def __init__(self, capture: Capture, limit: int = 20) -> None:
        self.capture = capture
        self._findings = Findings(limit), Findings(limit)  # of each half of the rules
        self.statistics = Statistics()
        self._evidence = Evidence(set())
        self._capability: Capability | None = None
        self._tids = np.empty(0, np.int32)
        self._parked: EventTable | None = None
        self._parked_index = np.empty(0, np.int64)
        self._n_seen = 0
        self._halted = Halted()
        self._gaps = Gaps()
        self._in_service: dict[int, InService] = {}

    def know_ends(self, last_ns: dict[int, int]) -> None:
        """Take note of where each CPU's events end in a damaged recording (cpu -> ns)."""
        self._gaps.end_at(last_ns)

    def feed(self, table: EventTable) -> None:
        """Check a further table, all but the unfinished ends of its threads."""
        value: Any = table
        for stage in self.stages:
            value = stage(value)

    @property
    def stages(self) -> tuple[Callable[[Any], Any], ...]:
        """What a table goes through, one after the other; each takes consecutive tables in their order.

        Stages may run at the same time, on different tables.
        """
        return self._prepare, self._judge_first, self._judge_others

    def _prepare(self, table: EventTable) -> Part:
        """Sort a further table's events and step them through the model."""
        index = np.arange(self._n_seen, self._n_seen + len(table))
        self._n_seen += len(table)
        self.statistics.n_events += len(table)
        self._evidence.look_at(table)
        self._gaps.add(table)
        n_parked = 0 if self._parked is None else len(self._parked)
        if self._parked is not None and n_parked:
            table = EventTable.concat([self._parked, table], shared=True)
            index = np.concatenate([self._parked_index, index])
        self._tids = vcpu_tids(table, self._tids)[:65_534]
        return self._part(table, index, n_parked, final=False)

    def _judge_first(self, part: Part) -> Part:
        """Apply the first half of the rules to a part."""
        batch, sequence, findings = part.batch, part.batch.sequence, self._findings[0]
        findings.begin(sequence, part.index)
        self.statistics.add(batch, part.automaton)
        check_steps(sequence, batch.steps, part.automaton, findings)
        check_stray_follow_ups(sequence, batch.steps, part.automaton, findings)
        findings.vcpu_ids |= _vcpu_ids(batch)
        run_rules(FIRST_CHECKS, batch)
        return part

    def _judge_others(self, part: Part) -> None:
        """Apply the others."""
        batch, findings = part.batch, self._findings[1]
        batch.findings = findings
        findings.begin(batch.sequence, part.index)
        findings.vcpu_ids |= _vcpu_ids(batch)
        run_rules(OTHER_CHECKS, batch)
        with contextlib.suppress(MissingEventError):
            check_in_service(batch, self._in_service)
        with contextlib.suppress(MissingEventError):
            self._halted.add(batch, part.whole)
        if part.final:
            self._halted.report(batch)
        self._capability = batch.capability

    def finish(self) -> Comparison:
        """Check what was waiting and return the comparison."""
        if self._parked is not None and len(self._parked):
            part = self._part(self._parked, self._parked_index, len(self._parked), final=True)
            self._judge_others(self._judge_first(part))
        self._parked = None
        return self.statistics.comparison(merged(self._findings), self._capability)

    def _part(self, table: EventTable, index: NDArray[np.int64], n_parked: int, *, final: bool) -> Part:
        capability = find_capability(self.capture, table, self._evidence)
        whole = build_sequence(table, self._tids, capability, self._gaps, n_parked)
        now, later = (slice(None), slice(0)) if final else _cut(whole)
        automaton = compile_automaton(capability)
        sequence = whole.at(now)
        batch = make_batch(sequence, take_steps(sequence, automaton), capability, self._findings[0])
        rows = np.sort(whole.row[later])
        self._parked = materialise(table, rows)
        self._parked_index = index[rows]
        if len(rows):
            self._gaps.forget_before(int(self._parked.ts_ns.min()))
        return Part(batch, whole, automaton, index, final)


def _vcpu_ids(batch: Batch) -> dict[int, int]:
    """Return which vCPU each thread runs; of a thread that runs several, the last one."""
    if not batch.has_field("kvm_exit", "vcpu_id"):
        return {}
    ids = batch.exits.get("vcpu_id")
    last = {int(thread): int(np.flatnonzero(batch.thread == thread)[-1]) for thread in distinct(batch.thread)}
    return {int(batch.sequence.tids[thread]): int(ids[at]) for thread, at in last.items()}


def run_rules(checks: tuple[Callable[[Batch], None], ...], batch: Batch) -> None:
    """Apply rules to a batch; one whose fields were not recorded says nothing."""
    for check in checks:
        with contextlib.suppress(MissingEventError):
            check(batch)


def _cut(sequence: Sequence) -> tuple[NDArray[np.bool_] | slice, NDArray[np.bool_] | slice]:
    """Split each thread at its last kvm_entry, else its last userspace exit; that event is in both parts.

    Returns
    -------
    (now, later) : bool over the sequence; of one thread, slices
    """
    n = len(sequence)
    if not n:
        return slice(0), slice(0)
    start = np.flatnonzero(sequence.first)
    stop = np.append(start[1:], n)
    if len(start) == 1:
        last = _last_boundary(sequence.cls)
        return slice(0, last + 1), slice(last, n)
    cut = np.array(
        [
            first + _last_boundary(sequence.cls[first:end])
            for first, end in zip(start.tolist(), stop.tolist(), strict=True)
        ]
    )
    at = np.repeat(cut, stop - start)
    position = np.arange(n)
    return position <= at, position >= at


def _last_boundary(cls: NDArray[np.uint8]) -> int:
    """Return where one thread's events are cut: at its last kvm_entry, userspace exit, or else at the first event."""
    found = 0
    for boundary in (ENTRY, USERSPACE):
        from_end = int((cls[::-1] == boundary).argmax())
        if cls[len(cls) - 1 - from_end] == boundary:
            found = len(cls) - 1 - from_end
            break
    return max(found, len(cls) - MAX_PARKED)


def _damaged_ends(recording: Recording) -> dict[int, int]:
    """Return cpu -> time of its last event if the recording is cut off or damaged, else nothing.

    The CPUs of such a file end at different times, and a thread may go on where nothing was kept.
    """
    if not (recording.loss.truncated or recording.loss.damage):
        return {}
    ends: dict[int, int] = {}
    for table in recording.iter_events():
        for cpu in np.unique(table.cpu):
            ends[int(cpu)] = int(table.ts_ns[np.flatnonzero(table.cpu == cpu)[-1]])
    damaged = {damage.cpu for damage in recording.loss.damage if damage.cpu is not None}
    for cpu in damaged | set(range(recording.capture.n_cpus or 0)):
        ends.setdefault(cpu, BEFORE_ALL)  # nothing of this CPU was kept
    return ends


def checker_of(recording: Recording, limit: int = 20) -> Checker:
    """Return a checker that knows where a damaged recording's CPUs end.

    Parameters
    ----------
    limit : int, violations described per rule; all are counted
    """
    checker = Checker(recording.capture, limit)
    checker.know_ends(_damaged_ends(recording))
    return checker


def check_recording(recording: Recording, limit: int = 20) -> Comparison:
    """Compare a recording with the reference model.

    Parameters
    ----------
    recording : Recording
    limit : int, violations described per rule; all are counted
    """
    checker = checker_of(recording, limit)
    for table in recording.iter_events():
        checker.feed(table)
    return checker.finish()
