"""The comparison of a recording with the reference model, excerpt by excerpt, with bounded memory.

The engine gates the rules: a part of a rule is run only where all that it needs was recorded. What could not be run is
counted, place by place, and named at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.check.alphabet import ENTRY, USERSPACE
from kvmtrace.check.coverage import Statistics
from kvmtrace.check.excerpt import make_excerpt
from kvmtrace.check.findings import Findings, merged
from kvmtrace.check.fpu_on_demand import without_fpu
from kvmtrace.check.gated_rule import GatedRule
from kvmtrace.check.observability import Evidence, find_capability
from kvmtrace.check.rounds import Rounds
from kvmtrace.check.routing_changes import known_senders
from kvmtrace.check.rule_registry import all_rules
from kvmtrace.check.state_machine import compile_automaton, take_steps
from kvmtrace.check.thread_events import build_sequence, vcpu_tids
from kvmtrace.check.vcpu_lanes import VcpuLanes
from kvmtrace.spans.gaps import Gaps
from kvmtrace.table.distinct import distinct
from kvmtrace.table.event_table import EventTable
from kvmtrace.table.parking import materialise

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.observability import Capability
    from kvmtrace.check.thread_events import Sequence
    from kvmtrace.check.verdict import Comparison
    from kvmtrace.table.recording import Capture, Recording

FIRST_HALF = frozenset({"V1", "V2", "V4", "V5", "V13"})  # as long as the others: two threads share the work
BEFORE_ALL = -(1 << 62)  # ns
MAX_PARKED = 65_536  # events of a thread that wait for their continuation; more are given up as unknown


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
        rules = all_rules()
        self._findings = Findings(rules, limit), Findings(rules, limit)  # of each half of the rules
        self._rules = (
            [GatedRule(rule) for rule in rules.values() if rule.id in FIRST_HALF],
            [GatedRule(rule) for rule in rules.values() if rule.id not in FIRST_HALF],
        )
        self._rounds = Rounds(rules)
        self.statistics = Statistics()
        self._evidence = Evidence(set())
        self._capability: Capability | None = None
        self._known: Capability | None = None  # as of the latest part
        self._tids = np.empty(0, np.int32)
        self._parked: EventTable | None = None
        self._parked_index = np.empty(0, np.int64)
        self._parked_loss = np.empty(0, np.int32)
        self._n_seen = 0
        self._gaps = Gaps()
        self._known_until_ns = -BEFORE_ALL
        self._vcpu_ids: dict[int, int] = {}
        self._memory: dict[str, Any] = {}
        self._lanes = VcpuLanes()
        self._recording: Recording | None = None

    def know(self, recording: Recording) -> None:
        """Take note of where each CPU's events end in a damaged recording, and of whom to ask what was not read."""
        self._recording = recording
        ends = _damaged_ends(recording)
        self._gaps.end_at(ends)
        self._known_until_ns = min(ends.values(), default=self._known_until_ns)

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

    def _prepare(self, table: EventTable) -> tuple[Excerpt, NDArray[np.int64]]:
        """Sort a further table's events and step them through the model.

        Returns
        -------
        (excerpt, index) : index of a row of its table -> row of the recording
        """
        index = np.arange(self._n_seen, self._n_seen + len(table))
        self._n_seen += len(table)
        self.statistics.n_events += len(table)
        self._evidence.look_at(table)
        loss = self._gaps.feed(table)
        if self._evidence.fpu_on_demand:
            table = without_fpu(table)
            self._parked = self._parked and without_fpu(self._parked)
        n_parked = 0 if self._parked is None else len(self._parked)
        if self._parked is not None and n_parked:
            table = EventTable.concat([self._parked, table], shared=True)
            index = np.concatenate([self._parked_index, index])
            loss = np.concatenate([self._parked_loss, loss])
        self._tids = vcpu_tids(table, self._tids)[:65_534]
        return self._excerpt(table, index, loss, n_parked, final=False)

    def _judge_first(self, part: tuple[Excerpt, NDArray[np.int64]]) -> tuple[Excerpt, NDArray[np.int64]]:
        """Apply the first half of the rules to an excerpt."""
        excerpt, index = part
        self.statistics.add(excerpt)
        self._vcpu_ids |= last_vcpus(excerpt)
        excerpt.vcpu_ids = dict(self._vcpu_ids)
        excerpt.told_of = self._rounds.judge(excerpt)
        self._judge(excerpt, index, 0)
        return part

    def _judge_others(self, part: tuple[Excerpt, NDArray[np.int64]]) -> None:
        """Apply the others."""
        excerpt, index = part
        known_senders(excerpt)  # before any vCPU runs, too, when most rules have nothing to judge
        self._judge(excerpt, index, 1)
        self._capability = excerpt.capability

    def _judge(self, excerpt: Excerpt, index: NDArray[np.int64], half: int) -> None:
        findings = self._findings[half]
        findings.begin(excerpt.sequence, index)
        findings.vcpu_ids = excerpt.vcpu_ids
        for rule in self._rules[half]:
            rule.apply(excerpt, findings)

    def finish(self) -> Comparison:
        """Check what was waiting and return the comparison."""
        if self._parked is not None and len(self._parked):
            part = self._excerpt(self._parked, self._parked_index, self._parked_loss, len(self._parked), final=True)
            self._judge_others(self._judge_first(part))
        self._parked = None
        self.statistics.n_kvm_events = self._evidence.n_kvm_events
        not_understood = self._recording.loss.not_understood.values() if self._recording is not None else ()
        self._rounds.settle()
        findings = merged((*self._findings, self._rounds.findings))
        return self.statistics.comparison(findings, self._capability, sum(not_understood))

    def _excerpt(
        self, table: EventTable, index: NDArray[np.int64], loss: NDArray[np.int32], n_parked: int, *, final: bool
    ) -> tuple[Excerpt, NDArray[np.int64]]:
        capability = find_capability(self.capture, table, self._evidence)
        if capability == self._known:  # mostly nothing new: what was found out about it is kept with it
            capability = self._known
        self._known = capability
        whole = self._lanes.split(build_sequence(table, self._tids, capability, self._gaps, loss, n_parked=n_parked))
        now, later = (slice(None), slice(0)) if final else _cut(whole)
        automaton = compile_automaton(capability)
        sequence = whole.at(now)
        steps = take_steps(sequence, automaton)
        excerpt = make_excerpt(sequence, steps, capability, automaton, whole, final=final)
        excerpt.memory = self._memory
        excerpt.known_until_ns = self._known_until_ns
        self._lanes.park(whole, later)
        rows = np.sort(whole.row[later])
        self._parked = materialise(table, rows)
        self._parked_index, self._parked_loss = index[rows], loss[rows]
        if len(rows):
            self._gaps.forget_before(int(self._parked.ts_ns.min()))
        return excerpt, index


def last_vcpus(excerpt: Excerpt) -> dict[int, int]:
    """Return which vCPU each thread runs (key_of a thread -> number), as its last VM-exit told."""
    if not excerpt.has_field("kvm_exit", "vcpu_id"):
        return {}
    ids = excerpt.exits.get("vcpu_id")
    last = {int(thread): int(np.flatnonzero(excerpt.thread == thread)[-1]) for thread in distinct(excerpt.thread)}
    return {excerpt.sequence.key_of(thread): int(ids[at]) for thread, at in last.items()}


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
    checker.know(recording)
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
