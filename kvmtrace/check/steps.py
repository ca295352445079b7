"""Stepping the transition table through thread sequences: V1, V2 and follow-ups in the wrong state (V13)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace._native import automaton as compiled
from kvmtrace.check.alphabet import CLASS_NAMES, ENTRY, EXIT, FOLLOW_UP_MASK, mask_of
from kvmtrace.check.guards import guard_holds
from kvmtrace.check.state_machine import GUARDED, ILLEGAL, STATE, STATE_NAMES, UNKNOWN
from kvmtrace.model.states import BYSTANDERS
from kvmtrace.model.transitions import GUEST_EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.findings import Findings
    from kvmtrace.check.state_machine import Automaton
    from kvmtrace.check.thread_events import Sequence


# bystanders that KVM cannot trace in guest mode; sched_switch is V3's
_NOT_IN_GUEST = mask_of(*(name for name in BYSTANDERS if name not in GUEST_EVENTS | {"sched_switch"}))


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


def check_steps(sequence: Sequence, steps: Steps, automaton: Automaton, findings: Findings) -> None:
    """Report wrong steps under V1 and V2."""
    cls = sequence.cls[steps.position]
    is_v2 = (cls == ENTRY) | (cls == EXIT) | (steps.before == STATE["guest"])
    known = steps.before != UNKNOWN
    new = ~sequence.repeated[steps.position]
    for rule, chosen in (("V1", ~is_v2), ("V2", is_v2)):
        findings.check(rule, np.count_nonzero(chosen & known), np.count_nonzero(chosen & ~known & new))
        wrong = np.flatnonzero(chosen & steps.wrong)

        def describe(i: int, wrong: NDArray[np.intp] = wrong) -> tuple[str, str]:
            step = wrong[i]
            state = int(steps.before[step])
            return (
                f"in state {STATE_NAMES[state]}: {automaton.expected(state)}",
                f"{CLASS_NAMES[cls[step]]} ({_kind(sequence, int(steps.position[step]))})",
            )

        findings.violate(rule, steps.position[wrong], describe)


def _kind(sequence: Sequence, position: int) -> str:
    table = sequence.table
    found: str = table.kinds[table.kind[sequence.row[position]]].name
    return found


def check_stray_follow_ups(sequence: Sequence, steps: Steps, automaton: Automaton, findings: Findings) -> None:
    """Report follow-ups of VM-exits in states where KVM does not run a handler (V13)."""
    is_follow_up = (FOLLOW_UP_MASK >> sequence.cls.astype(np.uint64)) & np.uint64(1) == 1
    stray = is_follow_up & ~automaton.follow_ups[steps.state]
    if not automaton.follow_ups[STATE["guest"]]:
        in_guest = (steps.state == STATE["guest"]) | (steps.state == STATE["switching_in"])
        stray |= in_guest & (_NOT_IN_GUEST >> sequence.cls.astype(np.uint64) & np.uint64(1) == 1)
    wrong = np.flatnonzero(stray)

    def describe(i: int) -> tuple[str, str]:
        state = STATE_NAMES[int(steps.state[wrong[i]])]
        return f"no such event in state {state}", _kind(sequence, int(wrong[i]))

    findings.violate("V13", wrong, describe)
