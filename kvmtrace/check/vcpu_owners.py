"""Which thread runs which vCPU, for what is traced of a vCPU by its number: of one VM only.

The events do not name VMs. Where two threads run vCPUs of one number by turns, there are two VMs, or a vCPU wanders:
what a number stands for is not known then. Where one thread takes the place of another for good, a new VM begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.table.distinct import distinct

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

NOBODY = -1
_SHIFT = 32


@dataclass
class VcpuOwners:
    """Threads and vCPUs so far.

    Parameters
    ----------
    vcpu_of : tid -> number of its vCPU, NOBODY if it runs several
    owner : number of a vCPU -> tid
    ambiguous : two threads ran vCPUs of one number by turns
    changes : rows of the excerpt's table at which a new VM, or a vCPU in another thread, begins
    """

    vcpu_of: dict[int, int] = field(default_factory=dict)
    owner: dict[int, int] = field(default_factory=dict)
    ambiguous: bool = False
    changes: list[int] = field(default_factory=list)
    _retired: dict[int, set[int]] = field(default_factory=dict)

    def add(self, excerpt: Excerpt) -> bool:
        """Take note of the new rows of an excerpt's table."""
        self.changes = []
        until: dict[int, int] = {}  # vCPU -> last row of its latest owner here
        for first, last, tid, vcpu in _runs(excerpt):
            if self.vcpu_of.setdefault(tid, vcpu) != vcpu:
                self.vcpu_of[tid] = NOBODY
                self.ambiguous = True
            owner = self.owner.get(vcpu, tid)
            if owner != tid:
                self.changes.append(first)
                self._retired.setdefault(vcpu, set()).add(owner)
            self.ambiguous |= tid in self._retired.get(vcpu, ()) or until.get(vcpu, -1) > first
            self.owner[vcpu], until[vcpu] = tid, last
        return True

    def vcpus(self, tids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the vCPU that each thread runs, NOBODY if none or several."""
        known = np.array(sorted(self.vcpu_of), np.int64)
        if not len(known):
            return np.full(len(tids), NOBODY, np.int64)
        vcpu = np.array([self.vcpu_of[tid] for tid in known.tolist()], np.int64)
        at = np.minimum(np.searchsorted(known, tids), len(known) - 1)
        return np.where(known[at] == tids, vcpu[at], NOBODY)


def _runs(excerpt: Excerpt) -> list[tuple[int, int, int, int]]:
    """Return (first new row, last, tid, vCPU) of each pair of a thread and a vCPU, by the first row."""
    table = excerpt.whole.table
    if not table.has("kvm_exit", "vcpu_id"):
        return []
    rows = table.rows("kvm_exit")
    new = rows >= excerpt.whole.n_parked
    rows = rows[new]
    pairs = table.tid[rows].astype(np.int64) << _SHIFT | table.field("kvm_exit", "vcpu_id")[new].astype(np.int64)
    found = []
    for pair in distinct(pairs).tolist():
        mine = np.flatnonzero(pairs == pair)
        found.append((int(rows[mine[0]]), int(rows[mine[-1]]), pair >> _SHIFT, pair & 0xFFFFFFFF))
    return sorted(found)


def vcpu_owners(excerpt: Excerpt) -> VcpuOwners:
    """Return what is known up to the end of this excerpt."""
    memory = excerpt.remember("vCPU owners", VcpuOwners)
    excerpt.once("vCPU owners", memory.add)
    return memory
