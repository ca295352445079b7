"""vCPUs that start: INIT makes them wait, a start-up message (SIPI) lets them go on.

Source: kvm_apic_accept_events (lapic.c), kvm_arch_vcpu_ioctl_run (x86.c)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.userspace_changes import setter_rows
from kvmtrace.check.vcpu_owners import vcpu_owners
from kvmtrace.model.injection import INIT_DELIVERY_MODE, SIPI_DELIVERY_MODE
from kvmtrace.model.thresholds import threshold
from kvmtrace.model.userspace_actions import RIP_SETTERS
from kvmtrace.table.distinct import among, distinct
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.verdict import Violation
    from kvmtrace.table.event_table import EventTable

STARTS = {INIT_DELIVERY_MODE: "INIT", SIPI_DELIVERY_MODE: "start-up message"}
INIT, SIPI, ENTERED, FORGET = range(4)
_INTERRUPTIBLE = 1
_WAITS_NO_LONGER = 3  # VM-entries; one of them may have been under way when INIT came


def started_vcpus(excerpt: Excerpt) -> list[int]:
    """Return the vCPUs that accepted INIT or a start-up message in this part of the recording."""
    table = excerpt.sequence.table
    mode = table.field("kvm_apic_accept_irq", "dm").astype(np.int64)
    apic = table.field("kvm_apic_accept_irq", "apicid").astype(np.int64)
    started: list[int] = distinct(apic[among(mode, tuple(STARTS))]).tolist()
    return started


def starting_events(excerpt: Excerpt) -> list[tuple[int, int, int, int]]:
    """Return (row, what, vCPU, RIP) of what is new and concerns vCPUs that wait, by row (made once).

    Of VM-entries, the first ones of the table and those behind INIT and start-up messages: none waits behind them.
    """
    return excerpt.once("starting events", _starting_events)


def _starting_events(excerpt: Excerpt) -> list[tuple[int, int, int, int]]:
    whole, table = excerpt.whole, excerpt.whole.table
    rows = table.rows("kvm_apic_accept_irq")
    apic, mode = (table.field("kvm_apic_accept_irq", name).astype(np.int64) for name in ("apicid", "dm"))
    entries = np.flatnonzero(whole.cls == ENTRY)
    entries = entries[whole.row[entries] >= whole.n_parked]
    vcpu = whole.values("kvm_entry", "vcpu_id", entries).astype(np.int64)
    kept = _near(whole.row[entries], vcpu, np.append(whole.n_parked, rows[among(mode, tuple(STARTS))]))
    entries, vcpu = entries[kept], vcpu[kept]
    rip = whole.values("kvm_entry", "rip", entries)
    lost = table.rows(LOST_EVENTS) if LOST_EVENTS in table.kind_index else rows[:0]
    events = [(row, FORGET, 0, 0) for row in np.append(setter_rows(excerpt, RIP_SETTERS), lost).tolist()]
    for one, what in ((INIT_DELIVERY_MODE, INIT), (SIPI_DELIVERY_MODE, SIPI)):
        mine = mode == one
        events += [(row, what, to, 0) for row, to in zip(rows[mine].tolist(), apic[mine].tolist(), strict=True)]
    events += zip(whole.row[entries].tolist(), [ENTERED] * len(entries), vcpu.tolist(), rip.tolist(), strict=True)
    return sorted(event for event in events if event[0] >= whole.n_parked)


def _near(row: NDArray[np.intp], vcpu: NDArray[np.int64], marks: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return which VM-entries are among their vCPU's first behind one of these rows, ascending."""
    found = []
    for one in distinct(vcpu):
        mine = np.flatnonzero(vcpu == one)
        mine = mine[np.argsort(row[mine], kind="stable")]
        first = np.searchsorted(row[mine], marks)
        at = (first[:, None] + np.arange(_WAITS_NO_LONGER)).ravel()
        found.append(mine[distinct(at[at < len(mine)])])
    return np.sort(np.concatenate(found)) if found else np.empty(0, np.intp)


@dataclass
class Starting:
    """vCPUs that got INIT and have not entered the guest since, and threads inside KVM_RUN.

    Parameters
    ----------
    called : vCPU -> time of the start-up message that it got since, None if it got none
    told : vCPU -> what is to be reported if it never starts
    asleep : tid -> since when it sleeps inside KVM_RUN
    new : (vCPU, row) of the start-up messages of this excerpt that a vCPU waits for
    """

    called: dict[int, int | None] = field(default_factory=dict)
    told: dict[int, Violation] = field(default_factory=dict)
    asleep: dict[int, int] = field(default_factory=dict)
    new: list[tuple[int, int]] = field(default_factory=list)
    end_ns: int = 0

    def add(self, excerpt: Excerpt) -> bool:
        """Take note of an excerpt's new rows."""
        table = excerpt.whole.table
        self.new = []
        if len(table):
            self.end_ns = max(self.end_ns, int(table.ts_ns.max()))
        if not self.called and not started_vcpus(excerpt):
            return True
        for row, what, vcpu, _ in starting_events(excerpt):
            if what == FORGET:
                self.called.clear()
            elif what == INIT:
                self.called[vcpu] = None
            elif what == ENTERED:
                self.called.pop(vcpu, None)
            elif vcpu in self.called:
                self.called[vcpu] = int(table.ts_ns[row])
                self.new.append((vcpu, row))
        self.new = [(vcpu, row) for vcpu, row in self.new if self.called.get(vcpu) == int(table.ts_ns[row])]
        self._note_threads(table)
        return True

    def _note_threads(self, table: EventTable) -> None:
        """Note which threads are inside KVM_RUN, with the guest's FPU loaded, and sleep there."""
        loads = table.rows("kvm_fpu")
        switches = table.rows("sched_switch")
        state = table.field("sched_switch", "prev_state").astype(np.int64) & 0xFF
        loaded = table.field("kvm_fpu", "load").astype(np.int64)
        for tid in {*distinct(table.tid[loads]).tolist(), *self.asleep}:
            own = np.flatnonzero(table.tid[loads] == tid)
            mine = np.flatnonzero(table.tid[switches] == tid)
            inside = bool(loaded[own[-1]]) if len(own) else tid in self.asleep
            self.asleep.pop(tid, None) if len(own) or len(mine) else None
            if inside and len(mine) and state[mine[-1]] == _INTERRUPTIBLE:
                last = int(switches[mine[-1]])
                if not len(own) or last > loads[own[-1]]:
                    self.asleep[tid] = int(table.ts_ns[last])

    def never_started(self, excerpt: Excerpt) -> list[Violation]:
        """Return what is to be reported at the end: vCPUs that sleep on although they were called."""
        owners = vcpu_owners(excerpt)
        if owners.ambiguous:
            return []
        strangers = [since for tid, since in self.asleep.items() if tid not in owners.vcpu_of]
        unseen = [vcpu for vcpu in self.called if vcpu not in owners.owner]
        found = []
        for vcpu, called_ns in self.called.items():
            # a thread that never entered the guest does not say which vCPU it runs: all that wait are such ones
            mine = [self.asleep[owners.owner[vcpu]]] if owners.owner.get(vcpu) in self.asleep else []
            if vcpu in unseen and len(strangers) == len(unseen):
                mine = strangers
            latest = max([called_ns or 0, *mine])
            late = called_ns is not None and self.end_ns - latest > threshold("wakes_within")
            if late and mine and vcpu in self.told:
                found.append(self.told[vcpu])
        return found


def starting(excerpt: Excerpt) -> Starting:
    """Return what is known of vCPUs that start, up to the end of this excerpt."""
    memory = excerpt.remember("starting vCPUs", Starting)
    excerpt.once("starting vCPUs", memory.add)
    return memory
