"""What of the model a recording exercised: transitions with their times, coverage, explained events."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace._native import automaton as compiled
from kvmtrace._native.automaton import StepColumns
from kvmtrace.check.alphabet import CLASS_NAMES, N_STEPS
from kvmtrace.check.batch import TABLES
from kvmtrace.check.state_machine import STATE_NAMES, UNKNOWN, model_edges
from kvmtrace.check.verdict import Comparison, Coverage, TransitionCount
from kvmtrace.isa.exit_reasons import ISA_NAMES
from kvmtrace.model.rules import SUSPICION
from kvmtrace.model.states import STATES
from kvmtrace.table.distinct import distinct

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch
    from kvmtrace.check.findings import Findings
    from kvmtrace.check.observability import Capability
    from kvmtrace.check.state_machine import Automaton

_SUB_BITS = 5  # a bucket is at most 1/32 wide: times are within 3 %
_BUCKETS = 64 << _SUB_BITS


def bucket_value(bucket: int) -> int:
    """Return the middle of a bucket, ns."""
    width = 1 << _SUB_BITS
    if bucket < 2 * width:
        return bucket
    shift = (bucket >> _SUB_BITS) - 1
    low = (bucket - (shift << _SUB_BITS)) << shift
    return low + ((1 << shift) >> 1)


class Statistics:
    """Counts over all parts of a recording."""

    def __init__(self) -> None:
        self.n_events = 0
        self.explained = 0
        self.unknown = 0
        self.contradicting = 0
        self.n_vcpu_events = 0
        # steps by state before, class and bucket of the time since the step before
        self._counts = np.zeros((len(STATE_NAMES), N_STEPS + 1, _BUCKETS), np.int64)
        self._next_state = np.zeros(N_STEPS + 1, np.uint8)
        self._reasons: set[tuple[int, int]] = set()
        self._edges_in_model: set[tuple[str, str]] = set()

    def add(self, batch: Batch, automaton: Automaton) -> None:
        """Count a batch; a thread's first event is either the recording's first or counted already."""
        steps, sequence = batch.steps, batch.sequence
        self._edges_in_model |= model_edges(batch.capability.traits)
        known = steps.state != UNKNOWN
        self.unknown += int(np.count_nonzero(~known & ~sequence.first))
        wrong = int(np.count_nonzero(steps.wrong))
        self.contradicting += wrong
        self.explained += int(np.count_nonzero(known)) - wrong
        self._next_state = automaton.next_state
        self._count_edges(batch)
        pairs = distinct(batch.exits.isa.astype(np.int64) << 32 | batch.exits.code)
        self._reasons |= {(int(pair) >> 32, int(pair) & 0xFFFFFFFF) for pair in pairs}

    def _count_edges(self, batch: Batch) -> None:
        steps = batch.steps
        columns = StepColumns(steps.before, batch.step_classes, steps.wrong, batch.sequence.ts_ns[steps.position])
        compiled.count_edges(columns, UNKNOWN, _SUB_BITS, self._counts)

    def _edges(self) -> list[tuple[int, int, int]]:
        """Return (state, step, next state) of what was seen."""
        seen = np.argwhere(self._counts.any(axis=2)).tolist()
        return [(state, step, int(self._next_state[step])) for state, step in seen]

    def _transitions(self) -> tuple[TransitionCount, ...]:
        rows = []
        for state, step, after in self._edges():
            histogram = self._counts[state, step]
            rows.append(
                TransitionCount(
                    STATE_NAMES[state],
                    CLASS_NAMES[step],
                    STATE_NAMES[after],
                    int(histogram.sum()),
                    _quantile(histogram, 0.5),
                    _quantile(histogram, 0.99),
                )
            )
        return tuple(rows)

    def comparison(self, findings: Findings, capability: Capability | None) -> Comparison:
        """Return the outcome."""
        results = findings.results()
        from kvmtrace.model.rules import RULES

        suspicions = sum(r.violated for name, r in results.items() if RULES[name].severity == SUSPICION)
        violations = sum(r.violated for r in results.values()) - suspicions
        listed = tuple(sorted(findings.violations, key=lambda v: v.event_index))
        hard = [v for v in listed if v.severity != SUSPICION]
        isas = {isa for isa, _ in self._reasons}
        environment = self.n_events - self.explained - self.unknown - self.contradicting
        return Comparison(
            isa=ISA_NAMES.get(min(isas)) if isas else None,
            rules=results,
            transitions=self._transitions(),
            coverage=self._coverage(isas),
            violations=listed,
            n_violations=violations,
            n_suspicions=suspicions,
            first_divergence=next(iter(hard or listed), None),
            n_events=self.n_events,
            explained_events=self.explained,
            unknown_events=self.unknown,
            environment_events=environment,
            cannot_see=capability.cannot_see() if capability else (),
        )

    def _coverage(self, isas: set[int]) -> Coverage:
        edges = self._edges()
        states = {state for edge in edges for state in (edge[0], edge[2])}
        seen = {(STATE_NAMES[e[0]], CLASS_NAMES[e[1]]) for e in edges}
        in_model = sum(len(TABLES[isa]) for isa in isas if isa in TABLES)
        return Coverage(
            states_seen=len(states),
            states_in_model=len(STATES) - 1,
            transitions_seen=len(seen & self._edges_in_model),
            transitions_in_model=len(self._edges_in_model),
            exit_reasons_seen=sum(code in TABLES.get(isa, {}) for isa, code in self._reasons),
            exit_reasons_in_model=in_model,
        )


def _quantile(histogram: NDArray[np.int64], q: float) -> int | None:
    total = int(histogram.sum())
    if not total:
        return None
    return bucket_value(int(np.searchsorted(np.cumsum(histogram), max(q * total, 1))))
