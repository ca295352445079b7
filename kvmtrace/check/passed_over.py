"""Interrupts that a lower one overtook: of those that wait, the LAPIC takes the highest.

Source: apic_find_highest_irr, kvm_apic_has_interrupt (lapic.c)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.doubts import Doubt
from kvmtrace.check.interrupt_log import NONE, interrupt_log
from kvmtrace.check.pending_interrupts import ACCEPTED, TAKEN, forgets
from kvmtrace.check.vcpu_owners import NOBODY, vcpu_owners

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.pending_interrupts import Events

    Rows = NDArray[np.intp]
    Numbers = NDArray[np.int64]

LOWEST_VECTOR = 16  # below, vectors are reserved


def passed_over(excerpt: Excerpt, events: Events) -> list[Doubt]:
    """Return injections of a lower vector while a higher one was accepted before an earlier VM-entry."""
    log, ends = interrupt_log(excerpt), np.append(forgets(excerpt), len(excerpt.whole.table))
    found: list[Doubt] = []
    lapic = np.flatnonzero(events.what == TAKEN)
    lapic = lapic[events.before(lapic, 1) == ACCEPTED]
    first = np.flatnonzero((events.what == ACCEPTED) & (events.row >= 0) & (events.key & 0xFF >= LOWEST_VECTOR))
    first = first[events.before(first, 1) != ACCEPTED]
    if not len(lapic) or not len(first):
        return found
    for vcpu, rows in _entries(excerpt).items():
        mine = first[events.key[first] >> 8 == vcpu]
        taken = lapic[events.key[lapic] >> 8 == vcpu]
        taken = taken[np.argsort(events.row[taken], kind="stable")]
        until = np.minimum(_next_taken(events, mine), ends[np.searchsorted(ends, events.row[mine], "right")])
        behind = log.behind[events.entry[mine]]
        set_by = np.where(behind == NONE, until, log.row[behind] if len(log.row) else 0)
        entry = np.searchsorted(rows, np.maximum(set_by, events.row[mine]))
        since = np.where(entry < len(rows), rows[np.minimum(entry, len(rows) - 1)], until)
        low, high = np.searchsorted(events.row[taken], since), np.searchsorted(events.row[taken], until)
        for i in np.flatnonzero(low < high).tolist():
            vector = int(events.key[mine[i]]) & 0xFF
            lower = [j for j in taken[low[i] : high[i]].tolist() if int(events.key[j]) & 0xFF < vector]
            if lower:
                at = lower[0]
                found.append(
                    Doubt(
                        int(events.row[at]),
                        int(events.ts_ns[mine[i]]),
                        int(events.ts_ns[at]),
                        f"vector {vector:#x} injected first: vCPU {vcpu} accepted it before its VM-entry",
                        f"vector {int(events.key[at]) & 0xFF:#x} injected",
                    )
                )
    return found


def _next_taken(events: Events, at: Rows) -> Numbers:
    """Return the row at which each accepted vector is taken, a large one if it is not."""
    never = np.iinfo(np.int64).max
    taken = np.where(events.what == TAKEN, events.row, never)
    n = len(events.key)
    # the next one in the order of the vectors; another vector's does not count
    position = np.where(events.what == TAKEN, np.arange(n), n)
    following = np.minimum.accumulate(position[::-1])[::-1] if n else position
    found = following[at]
    inside = found < n
    found = np.minimum(found, max(n - 1, 0))
    same = inside & (events.key[found] == events.key[at]) if n else inside
    return np.where(same, taken[found] if n else never, never)


def _entries(excerpt: Excerpt) -> dict[int, Rows]:
    """Return vCPU -> rows of its VM-entries in the new part of the table."""
    whole = excerpt.whole
    at = np.flatnonzero((whole.cls == ENTRY) & (whole.row >= whole.n_parked))
    vcpu = vcpu_owners(excerpt).vcpus(whole.table.tid[whole.row[at]].astype(np.int64))
    return {
        one: np.sort(whole.row[at[vcpu == one]])
        for one in vcpu_owners(excerpt).owner
        if one != NOBODY and bool((vcpu == one).any())
    }
