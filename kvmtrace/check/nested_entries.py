"""Nested entries of an excerpt, where L2 begins after them and where L1 goes on behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvmtrace.check.alphabet import CLASS, ENTRY, mask_of
from kvmtrace.check.guest_levels import guest_levels, uncertain
from kvmtrace.check.rip_continuity import overridden
from kvmtrace.model.nesting import NESTED_EVENTS
from kvmtrace.model.states import FOLLOW_UPS, STEPS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

    Group = NDArray[np.intp]
    Mask = NDArray[np.bool_]

ENTRY_EVENT = "kvm_nested_vmenter"


class Switches(NamedTuple):
    """VM-exits behind which the level changed last by an event, and the VM-entries behind them.

    Parameters
    ----------
    position : of the event
    exit : number of the VM-exit
    entry : number of the VM-entry's segment
    rip : where the vCPU goes on
    """

    position: Group
    exit: Group
    entry: Group
    rip: NDArray[np.uint64]


def switches(excerpt: Excerpt, *events: str) -> Switches:
    """Return the switches of level by these events, as far as nothing else can have moved RIP."""
    changes, segments, exits = guest_levels(excerpt).changes, excerpt.segments, excerpt.exits
    last = np.append(changes.exit[1:] != changes.exit[:-1], True) if len(changes.exit) else np.zeros(0, bool)
    found = np.concatenate([segments.positions(event) for event in events])
    keep = last & (changes.exit >= 0) & np.isin(changes.position, found)
    position, number = changes.position[keep], changes.exit[keep]
    entry = segments.resume[exits.seg[number]]
    usable = (entry >= 0) & ~uncertain(excerpt)[number]
    position, number, entry = position[usable], number[usable], entry[usable]
    rip = exits.later_rip[number]
    plain = ~overridden(excerpt, number, rip) if len(number) else np.zeros(0, bool)
    return Switches(position[plain], number[plain], entry[plain], rip[plain])


def entry_before(excerpt: Excerpt, positions: Group) -> Group:
    """Return the position of the thread's last nested entry before each position; -1 for none that is known."""
    sequence, entries = excerpt.sequence, excerpt.segments.positions(ENTRY_EVENT)
    if not len(entries):
        return np.full(len(positions), -1)
    at = np.searchsorted(entries, positions) - 1
    found = entries[np.maximum(at, 0)]
    broken = np.append(0, np.cumsum(sequence.broken))
    known = (at >= 0) & (sequence.thread[found] == sequence.thread[positions])
    known &= broken[positions + 1] == broken[found + 1]
    return np.where(known, found, -1)


def n_switches(excerpt: Excerpt) -> int:
    """Count the VM-entries that may follow a switch of level."""
    changed = len(excerpt.segments.positions(ENTRY_EVENT)) > 0
    return int(np.count_nonzero(excerpt.segments.kind == ENTRY)) if changed else 0


# what KVM does about a vCPU, however deep its guest
_DONE = mask_of(*FOLLOW_UPS, *STEPS, *NESTED_EVENTS)


def followed_by(excerpt: Excerpt, positions: Group, event: str) -> tuple[Mask, Mask]:
    """Say behind which positions KVM traces this event next, preemption and interrupts of the host left out.

    Returns
    -------
    follows, known : whether it does, and whether that can be told: something follows, and nothing was lost between
    """
    done = np.append(_done(excerpt), len(excerpt.sequence) - 1)
    other = np.maximum(done[np.searchsorted(done[:-1], positions, "right")], positions)
    return _is(excerpt, other, event), _in_one_piece(excerpt, positions, other)


def preceded_by(excerpt: Excerpt, positions: Group, event: str) -> tuple[Mask, Mask]:
    """Say the same of what KVM traced last before each position."""
    done = np.append(0, _done(excerpt))
    other = np.minimum(done[np.searchsorted(done[1:], positions)], positions)
    return _is(excerpt, other, event), _in_one_piece(excerpt, other, positions)


def _done(excerpt: Excerpt) -> Group:
    found: Group = np.flatnonzero(_DONE >> excerpt.sequence.cls.astype(np.uint64) & np.uint64(1))
    return found


def _is(excerpt: Excerpt, positions: Group, event: str) -> Mask:
    found: Mask = excerpt.sequence.cls[positions] == CLASS[event]
    return found


def _in_one_piece(excerpt: Excerpt, first: Group, last: Group) -> Mask:
    """Say which positions follow others of their thread, with nothing lost between."""
    sequence = excerpt.sequence
    broken = np.append(0, np.cumsum(sequence.broken))
    found: Mask = (first < last) & (sequence.thread[first] == sequence.thread[last])
    found &= broken[last + 1] == broken[first + 1]
    return found
