"""What of the model a recording exercised: transitions with their times, coverage, explained events."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace._native import automaton as compiled
from kvmtrace._native.automaton import StepColumns
from kvmtrace.check.alphabet import CLASS_NAMES, N_STEPS
from kvmtrace.check.observability import Capability
from kvmtrace.check.rule import SUSPICION
from kvmtrace.check.rule_registry import all_rules, registry
from kvmtrace.check.side_rows import is_explained, own_side_events
from kvmtrace.check.state_machine import STATE_NAMES, UNKNOWN, model_edges
from kvmtrace.check.verdict import Comparison, Coverage, NotChecked, PartNotSeen, TransitionCount
from kvmtrace.isa.registry import BY_NUMBER, isa_name
from kvmtrace.model.states import LIFECYCLE_PARTS, STATES, STEPS
from kvmtrace.table.distinct import distinct

if TYPE_CHECKING:
    from collections.abc import Collection

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.findings import Findings

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
        self.n_kvm_events = 0
        self.explained = 0
        self.unknown = 0
        self.contradicting = 0
        self.unexplained: Counter[str] = Counter()
        # steps by state before, class and bucket of the time since the step before
        self._counts = np.zeros((len(STATE_NAMES), N_STEPS + 1, _BUCKETS), np.int64)
        self._next_state = np.zeros(N_STEPS + 1, np.uint8)
        self._reasons: set[tuple[int, int]] = set()
        self._edges_in_model: set[tuple[str, str]] = set()

    def add(self, excerpt: Excerpt) -> None:
        """Count an excerpt; a thread's first event is either the recording's first or counted already."""
        steps, sequence = excerpt.steps, excerpt.sequence
        self._edges_in_model |= model_edges(excerpt.capability.traits)
        known = steps.state != UNKNOWN
        self.unknown += int(np.count_nonzero(~known & ~sequence.first))
        wrong = int(np.count_nonzero(steps.wrong))
        self.contradicting += wrong
        self.explained += int(np.count_nonzero(known)) - wrong
        self._count_side_events(excerpt)
        self._next_state = excerpt.automaton.next_state
        self._count_edges(excerpt)
        pairs = distinct(excerpt.exits.isa.astype(np.int64) << 32 | excerpt.exits.code)
        self._reasons |= {(int(pair) >> 32, int(pair) & 0xFFFFFFFF) for pair in pairs}

    def _count_side_events(self, excerpt: Excerpt) -> None:
        """Count the vCPU threads' own events that are no letters of the model's alphabet."""
        for kind, count in own_side_events(excerpt).items():
            if is_explained(kind):
                self.explained += count
            else:
                self.unexplained[kind] += count

    def _count_edges(self, excerpt: Excerpt) -> None:
        steps = excerpt.steps
        columns = StepColumns(steps.before, excerpt.step_classes, steps.wrong, excerpt.sequence.ts_ns[steps.position])
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

    def comparison(self, findings: Findings, capability: Capability | None, not_understood: int = 0) -> Comparison:
        """Return the outcome; `not_understood`: lines of a text that were not read as events."""
        results = findings.results()
        suspicions = sum(r.violated for name, r in results.items() if findings.rules[name].severity == SUSPICION)
        violations = sum(r.violated for r in results.values()) - suspicions
        listed = tuple(sorted(findings.violations, key=lambda v: v.event_index))
        hard = [v for v in listed if v.severity != SUSPICION]
        isas = {isa for isa, _ in self._reasons}
        own = self.explained + self.unknown + self.contradicting + self.unexplained.total()
        environment = self.n_events - own
        unchecked = not_checked(findings, capability or Capability())
        foreign = {one.rule for one in unchecked if not one.part and not one.applies}
        return Comparison(
            isa=isa_name(min(isas)) if isas else None,
            rules=results,
            transitions=self._transitions(),
            coverage=self._coverage(isas, capability or Capability()),
            violations=listed,
            n_violations=violations,
            n_suspicions=suspicions,
            first_divergence=next(iter(hard or listed), None),
            n_events=self.n_events,
            explained_events=self.explained,
            unknown_events=self.unknown,
            environment_events=environment,
            unexplained=dict(sorted(self.unexplained.items(), key=lambda item: (-item[1], item[0]))),
            cannot_see=_cannot_see(capability, foreign) if capability else (),
            not_checked=unchecked,
            judged_share=(self.explained + self.contradicting) / (own + not_understood) if own else None,
            not_understood=not_understood,
            n_kvm_events=self.n_kvm_events,
            rule_errors=(*registry().errors, *dict.fromkeys(findings.errors)),
        )

    def _coverage(self, isas: set[int], capability: Capability) -> Coverage:
        edges = self._edges()
        states = {state for edge in edges for state in (edge[0], edge[2])}
        seen = {(STATE_NAMES[e[0]], CLASS_NAMES[e[1]]) for e in edges}
        in_model = sum(len(BY_NUMBER[isa].rows) for isa in isas if isa in BY_NUMBER)
        return Coverage(
            states_seen=len(states),
            states_in_model=len(STATES) - 1,
            transitions_seen=len(seen & self._edges_in_model),
            transitions_in_model=len(self._edges_in_model),
            exit_reasons_seen=sum(isa in BY_NUMBER and code in BY_NUMBER[isa].exits for isa, code in self._reasons),
            exit_reasons_in_model=in_model,
            not_seen=_not_seen(capability),
        )


def _cannot_see(capability: Capability, foreign: Collection[str]) -> tuple[str, ...]:
    """Say in words what a recording does not show even where its rules are checked; `foreign`: that do not apply."""
    blind = (
        f"{rule.id} {rule.title}: cannot see {rule.cannot_see}"
        for rule in all_rules().values()
        if rule.cannot_see and rule.id not in foreign and not capability.missing(rule.needs)
    )
    return (*blind, *capability.not_shown())


def _not_seen(capability: Capability) -> tuple[PartNotSeen, ...]:
    """Return the parts of the lifecycle of which no event was seen."""
    return tuple(
        PartNotSeen(part, any(STEPS[step].kind in capability.recorded for step in steps))
        for part, steps in LIFECYCLE_PARTS.items()
        if not any(STEPS[step].kind in capability.seen for step in steps)
    )


SOME_EXITS = "some exits"  # a part that has no name: what single rows of the exit table ask for


def not_checked(findings: Findings, capability: Capability) -> tuple[NotChecked, ...]:
    """Return the rules, and the parts of rules, that the recording did not allow to check."""
    found = []
    for rule in all_rules().values():
        mine = {key[1:]: places for key, places in findings.skipped.items() if key[0] == rule.id}
        missing = capability.missing(rule.needs)
        if not missing and rule.parts and not rule.row_parts_of and not findings.checked[rule.id]:
            of_parts = [capability.missing(part.needs) for part in rule.parts]
            missing = tuple(dict.fromkeys(name for lacking in of_parts for name in lacking)) if all(of_parts) else ()
        if missing:
            found.append(NotChecked(rule.id, "", missing, sum(mine.values()), not capability.cannot_be(missing)))
            continue
        found += [
            NotChecked(rule.id, part or SOME_EXITS, lacking, places, not capability.cannot_be(lacking))
            for (part, lacking), places in mine.items()
        ]
    return tuple(found)


def _quantile(histogram: NDArray[np.int64], q: float) -> int | None:
    total = int(histogram.sum())
    if not total:
        return None
    return bucket_value(int(np.searchsorted(np.cumsum(histogram), max(q * total, 1))))
