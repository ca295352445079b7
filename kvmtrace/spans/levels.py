"""Which level of guest each VM-entry and VM-exit is of: L1, KVM's own guest, or L2, a guest of that one.

Where kvm_nested_vmexit was recorded, every VM-exit tells for itself, and a VM-entry is of the level of the VM-exit that
ends it. Else nested entries and reflected exits tell from there on; what lies before the first one of a thread is not
known, but for what that event itself says of it. `kvmtrace.model.nesting` has the events and where KVM traces them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.kvm.nested_events import L1, L2, LEVEL_EVENTS, UNKNOWN_LEVEL
from kvmtrace.spans.keys import grown
from kvmtrace.spans.lanes import NESTED_STEP_OF, Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.spans.lanes import Lanes
    from kvmtrace.spans.pairs import Pairs
    from kvmtrace.table.event_table import EventTable

    Levels = NDArray[np.uint8]

_AFTER = np.zeros(32, np.uint8)  # level behind a step; 0: it says nothing
for _row in LEVEL_EVENTS:
    _AFTER[NESTED_STEP_OF[_row.event]] = UNKNOWN_LEVEL if _row.tells else _row.level
_BEFORE = np.zeros(32, np.uint8)  # ... and before it
_BEFORE[[Step.NESTED_ENTRY, Step.REFLECT]] = (L1, L2)


class LevelTracker:
    """Follows the level of each thread through consecutive pieces of lanes."""

    def __init__(self) -> None:
        self._level = np.zeros(16, np.uint8)  # per thread, as of its last row
        self.described = False  # every VM-exit can tell its level
        self._switched = False  # an event told a change of the level
        self.told = False  # a VM-exit told that it was L2's

    @property
    def nested(self) -> bool:
        """Whether any nested event was seen so far."""
        return self.told or self._switched

    def look_at(self, table: EventTable) -> None:
        """Take note of what a table describes."""
        self.described |= "kvm_nested_vmexit" in table.kind_index

    def feed(self, lanes: Lanes, pairs: Pairs) -> Levels:
        """Return the level of each edge (VM-entry or VM-exit) of a piece; shape (e,)."""
        nested = np.flatnonzero(lanes.step >= Step.NESTED_EXIT)
        self.told |= bool((lanes.step[nested] == Step.NESTED_EXIT).any())
        self._switched |= bool((_AFTER[lanes.step[nested]] != 0).any())
        if not self.nested:
            return np.full(len(pairs.edges), L1 if self.described else UNKNOWN_LEVEL, np.uint8)
        self._level = grown(self._level, int(lanes.thread.max()) + 1)
        after = np.zeros(len(lanes) + 1, np.uint8)  # of each edge's row: what the last event behind it says
        tells = nested[_AFTER[lanes.step[nested]] != 0]
        owner = pairs.owner[tells]
        after[owner] = _AFTER[lanes.step[tells]]  # the last stays; the last place stands for no owner
        found = self._told(lanes, pairs, nested, after) if self.told else self._followed(lanes, pairs, tells, after)
        self._remember(lanes, pairs, found, after, tells[owner < 0])
        return found

    def _told(self, lanes: Lanes, pairs: Pairs, nested: NDArray[np.intp], after: Levels) -> Levels:
        """Return the levels where every VM-exit tells for itself."""
        own = np.full(len(lanes) + 1, L1, np.uint8)
        own[pairs.owner[nested[lanes.step[nested] == Step.NESTED_EXIT]]] = L2
        found = own[pairs.edges]
        entries = np.flatnonzero(~pairs.is_exit)
        ends = np.append(pairs.guest, False)[entries]
        # an entry that no exit ends is of the level that the exit before left
        thread = lanes.thread[pairs.edges]
        before = entries - 1
        known = (before >= 0) & (thread[before] == thread[entries])
        left = np.where(after[pairs.edges[before]] != 0, after[pairs.edges[before]], found[before])
        alone = np.where(known, left, self._level[thread[entries]])
        following = np.minimum(entries + 1, len(found) - 1)
        found[entries] = np.where(ends, found[following], alone)
        return found

    def _followed(self, lanes: Lanes, pairs: Pairs, tells: NDArray[np.intp], after: Levels) -> Levels:
        """Return the levels where only changes are told."""
        thread = lanes.thread[pairs.edges]
        new = np.ones(len(thread), bool)
        new[1:] = thread[1:] != thread[:-1]
        change = np.zeros(len(thread), np.uint8)
        change[1:] = after[pairs.edges[:-1]]
        change[new] = self._level[thread[new]]
        first = np.flatnonzero(new & (change == UNKNOWN_LEVEL))
        for edge in first.tolist():  # what a thread's first event says of before
            mine = tells[lanes.thread[tells] == thread[edge]]
            change[edge] = _BEFORE[lanes.step[mine[0]]] if len(mine) else UNKNOWN_LEVEL
        number = np.maximum.accumulate(np.where((change != 0) | new, np.arange(len(change)), 0))
        filled: Levels = change[number]
        return filled

    def _remember(self, lanes: Lanes, pairs: Pairs, found: Levels, after: Levels, unowned: NDArray[np.intp]) -> None:
        """Keep the level of each thread as of its last row."""
        self._level[lanes.thread[unowned]] = _AFTER[lanes.step[unowned]]
        if not len(found):
            return
        thread = lanes.thread[pairs.edges]
        ends = np.flatnonzero(np.append(thread[1:] != thread[:-1], True))
        last = after[pairs.edges[ends]]
        self._level[thread[ends]] = np.where(last != 0, last, found[ends])


def pairs_of_level(pairs: Pairs, levels: Levels, level: int) -> Pairs:
    """Return the pairs with only the VM-exits of one level: all else has neither owner nor duration.

    Parameters
    ----------
    levels : of each edge; shape (e,)
    """
    mine = levels == level
    row = np.zeros(len(pairs.owner) + 1, bool)  # of each lane row; the last place stands for no owner
    row[pairs.edges[mine]] = True
    return replace(
        pairs,
        owner=np.where(row[pairs.owner], pairs.owner, np.int32(-1)),
        is_exit=pairs.is_exit & mine,
        handling=pairs.handling & mine[:-1],
        guest=pairs.guest & mine[1:],
    )
