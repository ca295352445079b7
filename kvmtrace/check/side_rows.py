"""Side events of vCPU threads: which rows of a table they are, and what their thread was doing.

The model's alphabet has no class for them (a class is a bit of 64), so they are looked at as rows of the table, each
beside the last step of its thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace._native import class_positions
from kvmtrace.check.alphabet import CLASS_NAMES, INTERRUPT_CONTEXT, N_STEPS
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.side_events import SIDE_EVENTS, VMM_PREFIX
from kvmtrace.model.states import STEPS
from kvmtrace.table.distinct import distinct

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.table.event_table import EventTable

    Rows = NDArray[np.intp]

_TRACKED = frozenset({*CLASS_NAMES, *(step.kind for step in STEPS.values())})
_ROW_BITS = 40


@dataclass(frozen=True, eq=False)
class ThreadOrder:
    """All tracked events of an excerpt's table by thread (not by lane) and row.

    Parameters
    ----------
    tids : int32, ascending
    key : int64, ascending: number of the thread, row of the table
    position : intp, position of each in `whole`
    latest : position in this order of the last step up to each event, of whatever thread; -1 for none
    breaks : how often knowledge broke off up to each event, of whatever thread
    """

    tids: NDArray[np.int32]
    key: NDArray[np.int64]
    position: Rows
    latest: Rows
    breaks: Rows

    def keys_of(self, table: EventTable, rows: Rows) -> NDArray[np.int64]:
        """Return the keys of rows of these threads."""
        number = np.searchsorted(self.tids, table.tid[rows]).astype(np.int64)
        return number << _ROW_BITS | rows


def thread_order(excerpt: Excerpt) -> ThreadOrder:
    """Return the order of an excerpt's tracked events."""
    return excerpt.once("thread order", _thread_order)


def _thread_order(excerpt: Excerpt) -> ThreadOrder:
    whole = excerpt.whole
    tids = excerpt.once("threads of vCPUs", lambda own: distinct(own.whole.tids))
    number = np.searchsorted(tids, whole.tids)[whole.thread].astype(np.int64)
    key = number << _ROW_BITS | whole.row
    position = np.arange(len(key))
    if len(key) and not bool((key[1:] > key[:-1]).all()):
        position = np.argsort(key, kind="stable")
        key = key[position]
    latest, breaks = class_positions.steps_and_breaks(whole.cls, whole.broken, position, N_STEPS)
    return ThreadOrder(tids, key, position, latest, breaks)


def side_rows(excerpt: Excerpt, kind: str, *, parked: bool = False) -> Rows:
    """Return the rows of a kind that vCPU threads traced themselves, not in interrupt context.

    Parameters
    ----------
    parked : also those that waited for this table, and were seen before
    """
    table = excerpt.whole.table
    rows = table.rows(kind) if kind in table.kind_index else np.empty(0, np.intp)
    if not parked:
        rows = rows[rows >= excerpt.whole.n_parked]
    tids = excerpt.once("threads of vCPUs", lambda own: distinct(own.whole.tids))
    if not len(rows) or not len(tids):
        return rows[:0]
    tid = table.tid[rows]
    own = tids[np.minimum(np.searchsorted(tids, tid), len(tids) - 1)] == tid
    own &= (table.irq_flags[rows] & INTERRUPT_CONTEXT) == 0
    found: Rows = rows[own]
    return found


def own_side_events(excerpt: Excerpt) -> dict[str, int]:
    """Count the new events of vCPU threads that the model's alphabet has no class for, by name."""
    table = excerpt.whole.table
    kinds = [kind.name for kind in table.kinds if kind.name not in _TRACKED and table.count(kind.name)]
    counts = {kind: len(side_rows(excerpt, kind)) for kind in kinds}
    return {kind: count for kind, count in counts.items() if count}


def is_explained(kind: str) -> bool:
    """Say whether the model has a row for an event beside the life of a vCPU."""
    return kind in SIDE_EVENTS or kind.startswith(VMM_PREFIX)


def last_steps(excerpt: Excerpt, rows: Rows) -> Rows:
    """Return the position in `whole` of the last step of each row's thread before it; -1 if that is not known."""
    if not len(rows):
        return np.full(0, -1)
    order, whole = thread_order(excerpt), excerpt.whole
    if not len(order.key):
        return np.full(len(rows), -1)
    keys = order.keys_of(whole.table, rows)
    after = np.searchsorted(order.key, keys, "right")
    found = np.where(after > 0, order.latest[np.maximum(after - 1, 0)], -1)
    known = (found >= 0) & _same_thread(order.key[found], keys)
    # nothing broke off since, up to the thread's next event: what did may have done so before this row
    following = np.minimum(after, len(order.key) - 1)
    known &= _same_thread(order.key[following], keys) & (after < len(order.key))
    known &= order.breaks[following] == order.breaks[found]
    return np.where(known, order.position[found], -1)


def neighbours(excerpt: Excerpt, rows: Rows, others: Rows) -> tuple[Rows, Rows]:
    """Return (the last of the others before each row in its thread, the first behind), as indices; -1 for none."""
    if not len(rows):
        return np.full(0, -1), np.full(0, -1)
    order, table = thread_order(excerpt), excerpt.whole.table
    keys, other = order.keys_of(table, rows), order.keys_of(table, others)
    by_thread = np.argsort(other, kind="stable")
    other = other[by_thread]
    behind = np.searchsorted(other, keys, "right")
    found = []
    for wanted in (behind - 1, behind):
        inside = (wanted >= 0) & (wanted < len(other))
        at = np.where(inside, wanted, 0)
        near = inside & _same_thread(other[at], keys) if len(other) else inside
        found.append(np.where(near, by_thread[at] if len(other) else -1, -1))
    return found[0], found[1]


def _same_thread(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.bool_]:
    same: NDArray[np.bool_] = one >> _ROW_BITS == other >> _ROW_BITS
    return same
