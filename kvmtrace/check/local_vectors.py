"""What the LAPICs send to their own vCPUs, beside what the guest wrote into their local vector tables.

The vCPU's own thread does both, so that their order is certain.
Source: kvm_apic_local_deliver, kvm_inject_apic_timer_irqs (lapic.c), kvm_pmu_deliver_pmi (pmu.c)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.deliveries import in_words
from kvmtrace.check.doubts import Doubt
from kvmtrace.check.interrupt_log import NONE, acceptances, interrupt_log
from kvmtrace.check.routing_changes import Follower, ioctl_rows, known_senders
from kvmtrace.check.timer_shots import TimerShots
from kvmtrace.check.userspace_changes import ioctl_kind
from kvmtrace.check.vcpu_owners import vcpu_owners
from kvmtrace.kvm.apic import APIC_LVTPC, APIC_LVTT, APIC_SPIV, FIXED
from kvmtrace.model.injection import INIT_DELIVERY_MODE, SIPI_DELIVERY_MODE
from kvmtrace.model.interrupts import (
    APIC_BASE_ENABLED,
    LAPIC_SETTERS,
    LOCAL_VECTORS,
    LVT_MASKED,
    OTHER_SENDERS,
    ROUTING_MSRS,
    SPIV_ENABLED,
)
from kvmtrace.table.distinct import among, distinct
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

    Rows = NDArray[np.intp]
    Numbers = NDArray[np.int64]

UNKNOWN = -1


@dataclass
class LocalVectors:
    """What the local vector tables hold.

    Parameters
    ----------
    written : (register, lane) -> value
    at_first : value of what was not written yet: masked by the vCPU's reset, or UNKNOWN
    n_judged, n_unknown : of this excerpt
    wrong : acceptances that differ
    shots : timers that fire once
    """

    written: dict[tuple[int, int], int] = field(default_factory=dict)
    at_first: int = UNKNOWN
    begun: bool = False
    n_judged: int = 0
    n_unknown: int = 0
    wrong: list[Doubt] = field(default_factory=list)
    shots: TimerShots = field(default_factory=TimerShots)
    follower: Follower = field(default_factory=Follower)

    def add(self, excerpt: Excerpt) -> bool:
        """Compare what was accepted in an excerpt's new rows."""
        log, accepted = interrupt_log(excerpt), acceptances(excerpt)
        if not self.begun:
            self.at_first = LVT_MASKED if known_senders(excerpt).created else UNKNOWN
            self.begun = known_senders(excerpt).entered
        if self.follower.missed_some(excerpt):
            self.written.clear()
            self.shots.fired_ns.clear()
            self.at_first = UNKNOWN
        mine = accepted.entry[_local(excerpt)]
        forgets = _forgets(excerpt)
        values = {register: self._values(excerpt, register, mine, forgets) for register in LOCAL_VECTORS}
        known = np.all([value != UNKNOWN for value in values.values()], axis=0)
        known &= not known_senders(excerpt).others
        vector = log.values("kvm_apic_accept_irq", "vec", mine)
        right = np.zeros(len(mine), bool)
        for value in values.values():
            right |= (value & 0xFF == vector) & (value & LVT_MASKED == 0) & (value >> 8 & 7 == FIXED)
        self.n_judged, self.n_unknown = int(np.count_nonzero(known)), int(np.count_nonzero(~known))
        self.wrong = [
            Doubt(
                int(log.row[mine[i]]),
                # a write that was lost, at whatever time, would explain it
                -(1 << 62),
                int(log.table.ts_ns[log.row[mine[i]]]),
                "what the local vector table says: "
                + ", ".join(f"{LOCAL_VECTORS[name]} {int(value[i]):#x}" for name, value in values.items()),
                in_words(excerpt, int(mine[i])),
            )
            for i in np.flatnonzero(known & ~right).tolist()
        ]
        timer = known & (values[APIC_LVTT] & 0xFF == vector) & (values[APIC_LVTPC] & 0xFF != vector)
        self.shots.follow(excerpt, mine[timer], values[APIC_LVTT][timer])
        self._remember(excerpt, forgets)
        return True

    def _values(self, excerpt: Excerpt, register: int, entries: Rows, forgets: Rows) -> Numbers:
        """Return what a register holds at each of these entries, UNKNOWN if that is not known."""
        log = interrupt_log(excerpt)
        lane, row, value = _writes(excerpt, register)
        rows, lanes = log.row[entries], log.lane[entries]
        # both are sorted by lane and row
        before = np.searchsorted(lane * len(log.table) + row, lanes * len(log.table) + rows) - 1
        found = before >= 0
        found[found] = lane[before[found]] == lanes[found]
        epoch = np.zeros(len(entries), np.int64)
        epoch[found] = np.searchsorted(forgets, row[before[found]])
        held = np.full(len(entries), UNKNOWN, np.int64)
        for one in distinct(lanes).tolist():
            held[lanes == one] = self.written.get((register, one), self.at_first)
        held[found] = value[before[found]]
        held[epoch != np.searchsorted(forgets, rows)] = UNKNOWN
        return held

    def _remember(self, excerpt: Excerpt, forgets: Rows) -> None:
        last = -1
        if len(forgets):
            self.written.clear()
            self.at_first, last = UNKNOWN, int(forgets[-1])
        for register in LOCAL_VECTORS:
            lane, row, value = _writes(excerpt, register)
            for one, held in zip(lane[row > last].tolist(), value[row > last].tolist(), strict=True):
                self.written[register, one] = held


def _local(excerpt: Excerpt) -> NDArray[np.bool_]:
    """Say what vCPUs' threads accepted for their own LAPICs, sent by nothing that was traced."""
    log, accepted = interrupt_log(excerpt), acceptances(excerpt)
    tids = log.table.tid[log.row[accepted.entry]].astype(np.int64)
    own = vcpu_owners(excerpt).vcpus(tids) == accepted.vcpu
    before = log.before[accepted.entry]
    local: NDArray[np.bool_] = own & log.own()[accepted.entry] & (accepted.sender == NONE) & (before != NONE)
    local &= (accepted.mode == FIXED) & ~accepted.level & ~log.is_kind(before, *OTHER_SENDERS)
    return local


def _written(excerpt: Excerpt, register: int) -> tuple[Rows, Numbers]:
    """Return the log's entries that write a register of a LAPIC, and the values."""
    log = interrupt_log(excerpt)
    writes = log.of_kind("kvm_apic")
    chosen = (log.values("kvm_apic", "rw", writes) == 1) & (log.values("kvm_apic", "reg", writes) == register)
    return writes[chosen], log.values("kvm_apic", "val", writes[chosen]) & 0xFFFFFFFF


def _writes(excerpt: Excerpt, register: int) -> tuple[Numbers, Rows, Numbers]:
    """Return (lane, row, value) of what gives a register a value, by lane and row: its reset does so, too."""
    log = interrupt_log(excerpt)
    entries, value = _written(excerpt, register)
    # a LAPIC that is disabled masks all of its table
    spiv, enabled = _written(excerpt, APIC_SPIV)
    spiv = spiv[enabled & SPIV_ENABLED == 0]
    lane, row = [log.lane[entries], log.lane[spiv]], [log.row[entries], log.row[spiv]]
    values = [value, np.full(len(spiv), LVT_MASKED)]
    accepted = log.of_kind("kvm_apic_accept_irq")
    mode = log.values("kvm_apic_accept_irq", "dm", accepted)
    owner = vcpu_owners(excerpt).owner
    # INIT resets it, at some time before the vCPU takes the SIPI
    for sent, held in ((INIT_DELIVERY_MODE, UNKNOWN), (SIPI_DELIVERY_MODE, LVT_MASKED)):
        at = accepted[mode == sent]
        vcpus = log.values("kvm_apic_accept_irq", "apicid", at).tolist()
        lane.append(np.array([owner.get(vcpu, -1) << 2 for vcpu in vcpus], np.int64))
        row.append(log.row[at])
        values.append(np.full(len(at), held))
    lanes, rows, held_by = np.concatenate(lane), np.concatenate(row), np.concatenate(values)
    order = np.lexsort((rows, lanes))
    return lanes[order], rows[order], held_by[order]


def _forgets(excerpt: Excerpt) -> Rows:
    """Return the rows, ascending, behind which the tables may hold something else without the guest's doing."""
    log, table = interrupt_log(excerpt), excerpt.whole.table
    msrs = log.of_kind("kvm_msr")
    base = log.values("kvm_msr", "write", msrs) != 0
    base &= among(log.values("kvm_msr", "ecx", msrs), ROUTING_MSRS)
    base &= log.values("kvm_msr", "data", msrs) & APIC_BASE_ENABLED == 0
    rows = [
        log.row[msrs[base]],
        ioctl_rows(excerpt, LAPIC_SETTERS),
        np.array(vcpu_owners(excerpt).changes, np.intp),
        table.rows("kvm_userspace_exit") if ioctl_kind(excerpt) is None else np.empty(0, np.intp),
        table.rows(LOST_EVENTS) if LOST_EVENTS in table.kind_index else np.empty(0, np.intp),
    ]
    found = np.sort(np.concatenate(rows))
    return found[found >= excerpt.whole.n_parked]


def local_vectors(excerpt: Excerpt) -> LocalVectors:
    """Return what comparing an excerpt with the local vector tables found."""
    memory = excerpt.remember("local vectors", LocalVectors)
    excerpt.once("local vectors", memory.add)
    return memory
