"""The level of guest (L1 or L2) behind each VM-exit of an excerpt, as the model's LEVEL_EVENTS tell it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvmtrace.check.alphabet import ENTRY, EXIT, USERSPACE
from kvmtrace.check.userspace_changes import ioctl_kind, setter_rows
from kvmtrace.isa.registry import BY_NUMBER
from kvmtrace.model.injection import RESET_RIPS
from kvmtrace.model.nesting import (
    ENTERS_L1,
    ENTERS_L2,
    L1,
    L2,
    LEAVES_SILENTLY,
    LEVEL_SETTERS,
    TELLS_L2,
    UNKNOWN_LEVEL,
)
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.isa.base import Isa, Nesting

    Group = NDArray[np.intp]
    Mask = NDArray[np.bool_]


class Changes(NamedTuple):
    """The events that set the level, by position.

    Parameters
    ----------
    position : intp
    level : uint8, level from there on
    silent : bool, a transition of system-management mode: it may have left L2 without an event
    exit : intp, the VM-exit behind which it stands; -1: none that is known
    before : uint8, level that it found
    """

    position: Group
    level: NDArray[np.uint8]
    silent: Mask
    exit: Group
    before: NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class GuestLevels:
    """Levels of an excerpt.

    Parameters
    ----------
    told : uint8 per exit, L2 where its segment says so, else L1; UNKNOWN_LEVEL where the segment breaks off
    changes : what set the level between VM-exits and VM-entries
    entered : uint8 per segment, of VM-entries: the level that they must enter; UNKNOWN_LEVEL where nobody can know
    """

    told: NDArray[np.uint8]
    changes: Changes
    entered: NDArray[np.uint8]


def guest_levels(excerpt: Excerpt) -> GuestLevels:
    """Return the levels of an excerpt in which kvm_nested_vmexit was recorded (made once)."""
    return excerpt.once("guest levels", _make)


def nestings(excerpt: Excerpt) -> list[tuple[Nesting, Isa, Mask]]:
    """Return each ISA that knows nested guests, and which exits are of it (made once, not to be written to)."""
    return excerpt.once("nestings", _nestings)


def _nestings(excerpt: Excerpt) -> list[tuple[Nesting, Isa, Mask]]:
    numbers = np.flatnonzero(np.bincount(excerpt.exits.isa)).tolist() if len(excerpt.exits) else []
    isas = [BY_NUMBER[number] for number in numbers if number in BY_NUMBER]
    return [(isa.nesting, isa, excerpt.exits.isa == isa.number) for isa in isas if isa.nesting is not None]


def of_nesting(excerpt: Excerpt, chosen: Callable[[Nesting], object]) -> Mask:
    """Say which exits are of an ISA whose nested guests have a trait."""
    return excerpt.of_isa(lambda isa: isa.nesting is not None and chosen(isa.nesting))


def chain_owner(excerpt: Excerpt, positions: Group) -> Group:
    """Return the exit behind which each position stands, userspace exits between allowed; -1 for none."""
    segments, exits = excerpt.segments, excerpt.exits
    owner = np.full(int(segments.chain[-1]) + 1 if len(segments) else 0, -1, np.intp)
    owner[segments.chain[exits.seg]] = np.arange(len(exits))
    found: Group = owner[segments.chain[segments.of[positions]]]
    return found


def _make(excerpt: Excerpt) -> GuestLevels:
    exits = excerpt.exits
    # of a segment that breaks off nobody knows what was behind
    told = np.where(exits.has(TELLS_L2), L2, np.where(exits.next_kind != 0, L1, UNKNOWN_LEVEL)).astype(np.uint8)
    changes = _changes(excerpt, told)
    return GuestLevels(told, changes, _entered(excerpt, told, changes))


def _changes(excerpt: Excerpt, told: NDArray[np.uint8]) -> Changes:
    segments = excerpt.segments
    named = [(name, L2) for name in ENTERS_L2] + [(name, L1) for name in (*ENTERS_L1, LEAVES_SILENTLY)]
    found = [segments.positions(name) for name, _ in named]
    position = np.concatenate(found)
    level = np.repeat(np.array([level for _, level in named], np.uint8), [len(one) for one in found])
    silent = np.zeros(len(position), bool)
    silent[len(position) - len(found[-1]) :] = True
    order = np.argsort(position)
    position, level, silent = position[order], level[order], silent[order]
    owner = chain_owner(excerpt, position)
    before = np.full(len(position), UNKNOWN_LEVEL, np.uint8)
    before[owner >= 0] = told[owner[owner >= 0]]
    again = np.flatnonzero(owner[1:] == owner[:-1]) + 1
    before[again] = level[again - 1]
    return Changes(position, level, silent, owner, before)


def _entered(excerpt: Excerpt, told: NDArray[np.uint8], changes: Changes) -> NDArray[np.uint8]:
    segments, exits, sequence = excerpt.segments, excerpt.exits, excerpt.sequence
    after = told.copy()
    mine = changes.exit >= 0
    after[changes.exit[mine]] = changes.level[mine]  # the last of each exit stays
    after[uncertain(excerpt)] = UNKNOWN_LEVEL
    entered = np.full(len(segments), UNKNOWN_LEVEL, np.uint8)
    resume = segments.resume[exits.seg]
    entered[resume[resume >= 0]] = after[resume >= 0]
    # an excerpt begins with the entry that the one before ended with
    last: dict[int, int] = excerpt.remember("level of the last entry", dict)
    for number in np.flatnonzero(sequence.repeated[segments.start] & (segments.kind == ENTRY)).tolist():
        entered[number] = last.get(sequence.key_of(int(sequence.thread[segments.start[number]])), UNKNOWN_LEVEL)
    threads = sequence.thread[segments.start]
    ends = np.flatnonzero(np.append(threads[1:] != threads[:-1], True)) if len(threads) else np.empty(0, np.intp)
    for end in ends.tolist():
        last[sequence.key_of(int(threads[end]))] = int(entered[end]) if segments.kind[end] == ENTRY else UNKNOWN_LEVEL
    return entered


def uncertain(excerpt: Excerpt) -> Mask:
    """Say behind which exits somebody else may have set the level: a reset, or userspace (made once)."""
    return excerpt.once("uncertain levels", _uncertain)


def _uncertain(excerpt: Excerpt) -> Mask:
    segments, exits = excerpt.segments, excerpt.exits
    found = exits.failed_entry | excerpt.of_kind("triple_fault") | among(exits.later_rip, RESET_RIPS)
    left = exits.next_kind == USERSPACE
    if not left.any():
        return found
    entry = segments.resume[exits.seg]
    known = left & (entry >= 0)
    found[known] |= state_set_between(excerpt, exits.start[known], segments.start[entry[known]])
    return found


def next_exits(excerpt: Excerpt, entries: Group) -> Group:
    """Return the exit that ends each of these stays in guest mode; -1 for none."""
    exits, segments = excerpt.exits, excerpt.segments
    if not len(exits):
        return np.full(len(entries), -1)
    number = np.minimum(np.searchsorted(exits.seg, entries + 1), len(exits) - 1)
    there = (segments.next_kind[entries] == EXIT) & (exits.seg[number] == entries + 1)
    return np.where(there, number, -1)


def state_set_between(excerpt: Excerpt, first: Group, last: Group) -> Mask:
    """Say whether the VMM may have set the state of nested guests between two positions each."""
    sequence = excerpt.sequence
    if ioctl_kind(excerpt) is None:
        rows: Group = excerpt.segments.positions("userspace exit")
        between: Mask = np.searchsorted(rows, last) != np.searchsorted(rows, first)
        return between
    rows = setter_rows(excerpt, tuple(LEVEL_SETTERS))
    found: Mask = np.searchsorted(rows, sequence.row[last]) != np.searchsorted(rows, sequence.row[first])
    return found
