"""System-management interrupts, from where they are accepted to where the mode begins.

Each beginning takes one; several may have merged into one (KVM keeps a request and a flag), but nothing begins without.
Source: process_smi, kvm_check_and_inject_events, enter_smm (x86.c, smm.c); __apic_accept_irq (lapic.c)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, ENTRY
from kvmtrace.check.interrupt_log import acceptances, interrupt_log
from kvmtrace.check.routing_changes import known_senders
from kvmtrace.check.userspace_changes import setter_rows
from kvmtrace.check.vcpu_owners import NOBODY, vcpu_owners
from kvmtrace.model.injection import SMI_DELIVERY_MODE
from kvmtrace.model.nesting import DOINGS, LEVEL_EVENTS
from kvmtrace.model.userspace_actions import SMI_SETTERS
from kvmtrace.table.distinct import within
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt

_OWN, _OTHER, _TRANSITION, _MODE, _FORGET = range(5)
_OTHERS = np.array([CLASS[name] for name in DOINGS])


@dataclass
class SystemManagement:
    """What is known of the vCPUs' SMIs.

    Parameters
    ----------
    waiting : vCPU -> an SMI may wait
    late : vCPU -> ... that another thread sent, so that it may come behind the beginning that is traced next
    n_judged : beginnings of the mode in this excerpt
    uncaused : rows at which it begins without an SMI
    outside : vCPUs that are not in the mode, as their latest transition told, or from their creation on
    without : rows of VM-entries before which an SMI that a vCPU sent to itself had no effect
    """

    waiting: dict[int, bool] = field(default_factory=dict)
    late: dict[int, bool] = field(default_factory=dict)
    whole: bool = False
    n_judged: int = 0
    uncaused: list[int] = field(default_factory=list)
    outside: dict[int, bool] = field(default_factory=dict)
    created: bool = False
    without: list[int] = field(default_factory=list)

    def add(self, excerpt: Excerpt) -> bool:
        """Follow the SMIs through an excerpt's new rows."""
        self.n_judged, self.uncaused, self.without = 0, [], []
        if vcpu_owners(excerpt).ambiguous:
            self._forget()
            return True
        self.created |= known_senders(excerpt).created and not self.outside
        if known_senders(excerpt).created and not self.waiting:
            self.whole = True
        owed = _owed_entries(excerpt)
        for row, what, vcpu, entering in _events(excerpt):
            if row in owed and self.outside.get(vcpu, self.created):
                entry, effect = owed[row]
                self.n_judged += 1
                self.without += [entry] if not effect else []
            self._take(what, vcpu, row, entering=bool(entering))
        return True

    def _forget(self) -> None:
        self.waiting.clear()
        self.late.clear()
        self.outside.clear()
        self.whole = self.created = False

    def _take(self, what: int, vcpu: int, row: int, *, entering: bool) -> None:
        if what == _FORGET:
            self._forget()
        elif what in (_OWN, _OTHER):
            for one in [vcpu] if vcpu != NOBODY else [*self.waiting]:
                self.waiting[one] = True
                self.late[one] = what == _OTHER or self.late.get(one, False)
            self.whole &= vcpu != NOBODY
        elif what == _MODE:
            self.outside[vcpu] = not entering
        elif entering:
            self.outside[vcpu] = False
            self.n_judged += 1
            if not self.waiting.get(vcpu, not self.whole):
                self.uncaused.append(row)
            # all that came before is one now; but what another thread sent may have come behind it
            self.waiting[vcpu] = self.late.pop(vcpu, False)
        else:
            self.outside[vcpu] = True


def _events(excerpt: Excerpt) -> list[tuple[int, int, int, int]]:
    """Return (row, what, vCPU, entering) of what is new, by row."""
    log, table = interrupt_log(excerpt), excerpt.whole.table
    accepted = acceptances(excerpt)
    mine = accepted.mode == SMI_DELIVERY_MODE >> 8
    rows, vcpus = log.row[accepted.entry[mine]].tolist(), accepted.vcpu[mine].tolist()
    owners = vcpu_owners(excerpt)
    tids = table.tid[rows].astype(np.int64) if rows else np.empty(0, np.int64)
    own = (owners.vcpus(tids) == accepted.vcpu[mine]).tolist()
    found = [(row, _OWN if one else _OTHER, vcpu, 0) for row, vcpu, one in zip(rows, vcpus, own, strict=True)]
    setters = setter_rows(excerpt, SMI_SETTERS)
    for row, vcpu in zip(setters.tolist(), owners.vcpus(table.tid[setters].astype(np.int64)).tolist(), strict=True):
        found.append((row, _OTHER if vcpu == NOBODY else _OWN, vcpu, 0))
    if LOST_EVENTS in table.kind_index:
        found += [(row, _FORGET, 0, 0) for row in table.rows(LOST_EVENTS).tolist()]
    found += [(row, _FORGET, 0, 0) for row in vcpu_owners(excerpt).changes]
    entry = log.of_kind("kvm_smm_transition")
    # an ioctl that sets the mode traces it, too, and takes no SMI
    by_ioctl = log.is_kind(log.before[entry], "sys_enter_ioctl", "kvm_vcpu_ioctl")
    what = np.where(by_ioctl, _MODE, _TRANSITION).tolist()
    vcpu, entering = (log.values("kvm_smm_transition", name, entry).tolist() for name in ("vcpu_id", "entering"))
    found += zip(log.row[entry].tolist(), what, vcpu, entering, strict=True)
    return sorted(one for one in found if one[0] >= excerpt.whole.n_parked)


def _owed_entries(excerpt: Excerpt) -> dict[int, tuple[int, bool]]:
    """Return, by row, the SMIs that vCPUs sent to themselves: the row of the next VM-entry, and whether it had effect.

    Left out are those behind which something else was injected first, or userspace was asked.
    """
    log, accepted, whole = interrupt_log(excerpt), acceptances(excerpt), excerpt.whole
    mine = np.flatnonzero((accepted.mode == SMI_DELIVERY_MODE >> 8) & log.is_kind(accepted.sender, "kvm_apic_ipi"))
    if not len(mine) or not excerpt.capability.seen.isdisjoint(LEVEL_EVENTS):
        return {}
    rows = log.row[accepted.entry[mine]]
    tids = log.table.tid[rows].astype(np.int64)
    own = (vcpu_owners(excerpt).vcpus(tids) == accepted.vcpu[mine]) & log.own()[accepted.entry[mine]]
    found: dict[int, tuple[int, bool]] = {}
    for row, tid in zip(rows[own].tolist(), tids[own].tolist(), strict=True):
        # a thread that runs several vCPUs has a lane for each
        lanes = np.flatnonzero(np.asarray(whole.tids) == tid)
        positions = np.flatnonzero(within(whole.thread, lanes) & (whole.row > row))
        positions = positions[np.argsort(whole.row[positions], kind="stable")]
        cls = whole.cls[positions]
        entries = np.flatnonzero(cls == ENTRY)
        if len(entries) and not within(cls[: entries[0]], _OTHERS).any():
            effect = bool((cls[: entries[0]] == CLASS["kvm_smm_transition"]).any())
            found[row] = int(whole.row[positions[entries[0]]]), effect
    return found


def system_management(excerpt: Excerpt) -> SystemManagement:
    """Return what following the SMIs of an excerpt found."""
    memory = excerpt.remember("system management", SystemManagement)
    excerpt.once("system management", memory.add)
    return memory
