"""Steps that the transition table does not allow: V2's where entry and exit are concerned, else V1's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS_NAMES, ENTRY, EXIT
from kvmtrace.check.state_machine import STATE, STATE_NAMES, UNKNOWN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found


def check_steps(excerpt: Excerpt, found: Found, *, of_guest_mode: bool) -> None:
    """Report wrong steps into, in and out of guest mode, or all others."""
    sequence, steps, automaton = excerpt.sequence, excerpt.steps, excerpt.automaton
    cls = excerpt.step_classes
    chosen = ((cls == ENTRY) | (cls == EXIT) | (steps.before == STATE["guest"])) == of_guest_mode
    known = steps.before != UNKNOWN
    new = ~sequence.repeated[steps.position]
    found.check(np.count_nonzero(chosen & known), np.count_nonzero(chosen & ~known & new))
    wrong = np.flatnonzero(chosen & steps.wrong)

    def describe(i: int) -> tuple[str, str]:
        step = wrong[i]
        state = int(steps.before[step])
        return (
            f"in state {STATE_NAMES[state]}: {automaton.expected(state)}",
            f"{CLASS_NAMES[cls[step]]} ({kind_of(excerpt, int(steps.position[step]))})",
        )

    found.violate(steps.position[wrong], describe)


def kind_of(excerpt: Excerpt, position: int) -> str:
    """Return the tracepoint of the event at a position."""
    table = excerpt.sequence.table
    found: str = table.kinds[table.kind[excerpt.sequence.row[position]]].name
    return found


def joined(excerpt: Excerpt, position: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Say whether nothing was lost between each of these positions and the one before it."""
    found = np.ones(max(len(position) - 1, 0), bool)
    behind = np.searchsorted(position, excerpt.sequence.begins)  # the first of them that stands behind each break
    found[behind[(behind > 0) & (behind < len(position))] - 1] = False
    return found
