"""VM-exits that L1 gets: which exit of L2 they come from, and whether KVM passed it on as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import mask_of
from kvmtrace.check.guest_levels import chain_owner, guest_levels, nestings, state_set_between
from kvmtrace.model.nesting import DOINGS, ENTERS_L2, L2, REFLECTS, SAYS_WHY, TELLS_L2, WITH_ENTRY
from kvmtrace.model.states import FOLLOW_UPS
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

    Group = NDArray[np.intp]
    Mask = NDArray[np.bool_]

_BETWEEN = mask_of(*FOLLOW_UPS, *SAYS_WHY, *ENTERS_L2, *DOINGS)


@dataclass(frozen=True, eq=False)
class Reflections:
    """All kvm_nested_vmexit_inject of an excerpt that stand behind a VM-exit.

    Parameters
    ----------
    position : intp
    exit : number of the VM-exit behind which it stands
    code : int64, the exit that L1 gets, without flags
    raw : int64, with them
    own : int64, the VM-exit's
    direct : bool, KVM passed the exit of L2 on as it was: of the same reason, nothing done between
    """

    position: Group
    exit: Group
    code: NDArray[np.int64]
    raw: NDArray[np.int64]
    own: NDArray[np.int64]
    direct: Mask

    def take(self, at: Group | Mask) -> Reflections:
        """Return some of them."""
        return Reflections(self.position[at], self.exit[at], self.code[at], self.raw[at], self.own[at], self.direct[at])


def reflections(excerpt: Excerpt) -> Reflections:
    """Return the reflections (made once); needs kvm_nested_vmexit_inject.exit_code and the reason of kvm_exit."""
    return excerpt.once("reflections", _make)


def _make(excerpt: Excerpt) -> Reflections:
    exits, segments, sequence = excerpt.exits, excerpt.segments, excerpt.sequence
    position = segments.positions(REFLECTS)
    owner = chain_owner(excerpt, position) if len(position) else position
    position, owner = position[owner >= 0], owner[owner >= 0]
    raw = sequence.values(REFLECTS, "exit_code", position).astype(np.int64) & 0xFFFFFFFF
    if not len(position):
        return Reflections(position, owner, raw, raw, raw, np.zeros(0, bool))
    code = raw.copy()
    for _, isa, mine in nestings(excerpt):
        own = mine[owner]
        code[own] = isa.code(raw[own])
    doing = np.append(0, np.cumsum(_BETWEEN >> sequence.cls.astype(np.uint64) & np.uint64(1)))
    first = np.ones(len(owner), bool)
    first[1:] = owner[1:] != owner[:-1]
    direct = first & (doing[position] == doing[exits.start[owner] + 1]) & (exits.code[owner] == code)
    direct &= guest_levels(excerpt).told[owner] == L2
    for nesting, _, mine in nestings(excerpt):  # KVM looks at these first: an exit of the same reason is another one
        direct &= ~(mine[owner] & among(code, [*nesting.kept]))
    return Reflections(position, owner, code, raw, exits.code[owner], direct)


def has_before(excerpt: Excerpt, found: Reflections, event: str) -> Mask:
    """Say behind which exits an event of a class stands before the reflection."""
    positions = excerpt.segments.positions(event)
    at = np.searchsorted(positions, found.position) - 1
    there = at >= 0
    there[there] = positions[at[there]] > excerpt.exits.start[found.exit[there]]
    return there


def passed_on(excerpt: Excerpt) -> Mask:
    """Say of each exit whether KVM passed it on to L1 as it was."""
    found = reflections(excerpt)
    direct = np.zeros(len(excerpt.exits), bool)
    direct[found.exit[found.direct]] = True
    return direct


def exits_of_l2(excerpt: Excerpt) -> Group:
    """Return the exits of L2 of which it is known what became, failed entries left out."""
    exits = excerpt.exits
    group: Group = np.flatnonzero(exits.has(TELLS_L2) & (exits.next_kind != 0) & ~exits.failed_entry)
    return group


def asked_for(excerpt: Excerpt, positions: Group, code: NDArray[np.int64]) -> tuple[Mask, Mask]:
    """Say of exits whether L1 asked for them when it entered L2 last, and whether that is known.

    Parameters
    ----------
    positions : of the exits or reflections
    code : what is asked about
    """
    sequence = excerpt.sequence
    known, asked = np.zeros(len(positions), bool), np.zeros(len(positions), bool)
    words = excerpt.segments.positions(WITH_ENTRY)
    table = {code: where for nesting, _, _ in nestings(excerpt) for code, where in nesting.intercepts.items()}
    if not len(words) or not table:
        return asked, known
    at = np.searchsorted(words, positions) - 1
    word = words[np.maximum(at, 0)]
    broken = np.append(0, np.cumsum(sequence.broken))
    near = (at >= 0) & (sequence.thread[word] == sequence.thread[positions])
    near &= broken[positions + 1] == broken[word + 1]
    near &= ~state_set_between(excerpt, word, positions)
    for one in np.unique(code[near]).tolist():
        if one not in table or not excerpt.has_field(WITH_ENTRY, table[one][0]):
            continue
        field, bit = table[one]
        mine = np.flatnonzero(near & (code == one))
        value = sequence.values(WITH_ENTRY, field, word[mine]).astype(np.uint64)
        known[mine], asked[mine] = True, (value >> np.uint64(bit) & np.uint64(1)) != 0
    return asked, known
