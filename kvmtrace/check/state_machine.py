"""The transition table compiled for one recording: look-up arrays instead of a state machine in code.

Steps that were not recorded, or that the recorder may have missed, become silent: the compiled table steps
over them. Since every step leads to one state, whatever the state before, the state of a whole column of
events is a look-up.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace._native import automaton as compiled
from kvmtrace.check.alphabet import CLASS, N_STEPS
from kvmtrace.check.guards import guard_holds
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.states import STATES, STEPS
from kvmtrace.model.transitions import FOLLOW_UP_STATES, LATE_EXIT_STATES, TRANSITIONS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.observability import Capability
    from kvmtrace.check.thread_events import Sequence
    from kvmtrace.model.transitions import Transition

STATE_NAMES: tuple[str, ...] = tuple(STATES)
STATE: dict[str, int] = {name: number for number, name in enumerate(STATE_NAMES)}
UNKNOWN = STATE["unknown"]
ILLEGAL, LEGAL, GUARDED = 0, 1, 2


@dataclass(frozen=True)
class Automaton:
    """The compiled table.

    Parameters
    ----------
    verdict : uint8, shape (states, steps + 1): ILLEGAL, LEGAL or GUARDED
    next_state : uint8, shape (steps + 1,): the state that a step leads to
    guards : (state, step) -> names of guards, of which one must hold
    follow_ups : bool, shape (states,): follow-ups of exits may be traced here
    """

    verdict: NDArray[np.uint8]
    next_state: NDArray[np.uint8]
    guards: dict[tuple[int, int], frozenset[str]]
    follow_ups: NDArray[np.bool_]

    @property
    def classes(self) -> dict[str, int]:
        """Step -> its column."""
        return CLASS

    def expected(self, state: int) -> str:
        """Name the steps that the state allows."""
        names = [name for name in STEPS if self.verdict[state, CLASS[name]] != ILLEGAL]
        return "one of: " + ", ".join(names)


def rows_for(traits: frozenset[str]) -> tuple[Transition, ...]:
    """Return the rows of the transition table that exist on a kernel with these traits."""
    return tuple(row for row in TRANSITIONS if not row.only or row.only in traits)


def _silent(recorded: frozenset[str], *, filtered: bool) -> frozenset[str]:
    """Return the steps whose absence proves nothing."""
    return frozenset(name for name, step in STEPS.items() if step.optional or name not in recorded or filtered)


def _recorded_steps(capability: Capability) -> frozenset[str]:
    """Return the steps that the recording tells apart."""

    def told(kind: str, field: str) -> bool:
        return kind in capability.recorded and (not field or f"{kind}.{field}" in capability.described)

    return frozenset(name for name, step in STEPS.items() if told(step.kind, step.condition[0].removesuffix("!=")))


def _reach(state: str, rows: tuple[Transition, ...], silent: frozenset[str]) -> set[str]:
    """Return the states reachable by silent steps, those without a guard."""
    reached = {state}
    todo = [state]
    while todo:
        current = todo.pop()
        for row in rows:
            if row.state == current and row.event in silent and not row.guard and row.next not in reached:
                reached.add(row.next)
                todo.append(row.next)
    return reached


def next_states(rows: tuple[Transition, ...]) -> dict[str, str]:
    """Return step -> the state it leads to; a table in which that is not unique is an error of ours."""
    found: dict[str, str] = {}
    for row in rows:
        assert found.setdefault(row.event, row.next) == row.next, (row, found[row.event])
    return found


@lru_cache(maxsize=64)
def _compile(recorded: frozenset[str], traits: frozenset[str], filtered: bool) -> Automaton:
    rows = rows_for(traits)
    silent = _silent(recorded, filtered=filtered)
    verdict = np.zeros((len(STATES), N_STEPS + 1), np.uint8)
    verdict[UNKNOWN] = LEGAL
    guards: dict[tuple[int, int], frozenset[str]] = {}
    follow_ups = np.zeros(len(STATES), bool)
    late = not traits.isdisjoint({"exit_irqs_on", "exit_irqs_unknown"})
    allowed = FOLLOW_UP_STATES | (LATE_EXIT_STATES if late else frozenset())
    for state in STATES:
        reached = _reach(state, rows, silent)
        follow_ups[STATE[state]] = bool(reached & allowed)
        for row in rows:
            if row.state not in reached:
                continue
            key = STATE[state], CLASS[row.event]
            if not row.guard:
                verdict[key] = LEGAL
            elif verdict[key] != LEGAL:
                verdict[key] = GUARDED
                guards[key] = guards.get(key, frozenset()) | {row.guard}
    after = np.zeros(N_STEPS + 1, np.uint8)
    for step, state in next_states(rows).items():
        after[CLASS[step]] = STATE[state]
    return Automaton(verdict, after, guards, follow_ups)


def compile_automaton(capability: Capability) -> Automaton:
    """Return the transition table as it applies to a recording."""
    return _compile(_recorded_steps(capability), capability.traits, capability.filtered)


def compile_for(steps: frozenset[str], traits: frozenset[str]) -> Automaton:
    """Return the transition table as it applies where exactly these steps are seen, on a kernel with these traits."""
    return _compile(steps, traits, filtered=False)


def model_edges(traits: frozenset[str]) -> set[tuple[str, str]]:
    """Return the (state, step) edges of the model on a kernel with these traits."""
    return {(row.state, row.event) for row in rows_for(traits)}


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a sequence.

    Parameters
    ----------
    position : intp, where in the sequence
    before : uint8, state before the step (UNKNOWN after a break)
    wrong : bool, no row of the table allows it
    state : uint8, over the whole sequence: the state in which each event finds its thread
    """

    position: NDArray[np.intp]
    before: NDArray[np.uint8]
    wrong: NDArray[np.bool_]
    state: NDArray[np.uint8]


def take_steps(sequence: Sequence, automaton: Automaton) -> Steps:
    """Look up every step of the sequence in the transition table."""
    position, before, verdict, state = compiled.take_steps(
        sequence.knowledge, automaton.next_state, automaton.verdict, UNKNOWN
    )
    wrong = verdict == ILLEGAL
    for i in np.flatnonzero(verdict == GUARDED):
        names = automaton.guards[int(before[i]), int(sequence.cls[position[i]])]
        wrong[i] = not any(guard_holds(name, sequence, int(position[i])) for name in sorted(names))
    return Steps(position, before, wrong, state)
