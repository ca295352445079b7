"""System-management interrupts, from where they are accepted to where the mode begins.

Each beginning takes one; several may have merged into one (KVM keeps a request and a flag), but nothing begins without.
Source: process_smi, kvm_check_and_inject_events, enter_smm (x86.c, smm.c); __apic_accept_irq (lapic.c)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmtrace.check.doubts import Doubt
from kvmtrace.check.routing_changes import Follower, known_senders
from kvmtrace.check.smi_events import (
    ACCEPTED,
    BEGINS,
    CREATED,
    DELAYED,
    ENDS,
    ENTERED,
    FORGET,
    REQUESTED,
    RETURNED,
    SET,
    SmiEvent,
    smi_events,
)
from kvmtrace.check.vcpu_owners import NOBODY, vcpu_owners
from kvmtrace.model.nesting import LEVEL_EVENTS
from kvmtrace.model.thresholds import threshold

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt


@dataclass
class Vcpu:
    """What is known of the SMIs of a vCPU, as one thread runs it.

    Parameters
    ----------
    known : all SMIs that may wait are counted
    own : one may wait that the thread sent itself, or set
    others : so many at most may wait that other threads sent: each may be traced before the beginning and come behind
    """

    known: bool = False
    own: bool = False
    others: int = 0


@dataclass
class SystemManagement:
    """What is known of SMIs.

    Parameters
    ----------
    vcpus : (tid, vCPU) -> what is known
    sent : (tid, vCPU) -> how many SMIs a thread sent to a vCPU of that number; NOBODY: to any
    outside : tid -> its vCPU is not in the mode, None if that is not known
    created : threads that made a vCPU, their own: all SMIs for it are counted
    owed : tid -> (when, userspace set it) of the SMI that begins the mode at its next VM-entry
    asked : threads that are in a KVM_SMI
    supported : this KVM has the mode
    several : a thread runs several vCPUs
    complete : all who may send SMIs were recorded: the whole machine, or the VM from its creation on
    since_ns : what was lost since then may explain what differs
    n_judged : beginnings of the mode, and SMIs that begin it, in this excerpt
    uncaused, without : what differs: beginnings without an SMI, VM-entries without the mode
    unsupported : times of doubts that hold only where this KVM has the mode
    """

    vcpus: dict[tuple[int, int], Vcpu] = field(default_factory=dict)
    sent: Counter[tuple[int, int]] = field(default_factory=Counter)
    outside: dict[int, bool | None] = field(default_factory=dict)
    created: set[int] = field(default_factory=set)
    owed: dict[int, tuple[int, bool]] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)
    supported: bool = False
    several: bool = False
    complete: bool = False
    since_ns: int = -1
    n_judged: int = 0
    uncaused: list[Doubt] = field(default_factory=list)
    without: list[Doubt] = field(default_factory=list)
    unsupported: set[int] = field(default_factory=set)
    follower: Follower = field(default_factory=Follower)

    def add(self, excerpt: Excerpt) -> bool:
        """Follow the SMIs through an excerpt's new rows."""
        self.n_judged, self.uncaused, self.without = 0, [], []
        times = excerpt.whole.table.ts_ns
        senders = known_senders(excerpt)
        if self.since_ns < 0:  # nothing was judged before a vCPU ran
            self.since_ns = senders.began_ns
            self.outside = dict.fromkeys(senders.makers, True)
            self.created = set(senders.makers)
        if self.follower.missed_some(excerpt):
            self._forget(int(times[0]) if len(times) else self.since_ns)
        vcpu_of = vcpu_owners(excerpt).vcpu_of
        for event in smi_events(excerpt, self.owed.keys() | self.asked):
            self._take(event, int(times[event.row]), vcpu_of)
        self.complete = excerpt.capability.whole_machine or senders.created
        tids = excerpt.whole.tids
        self.several |= len(set(tids.tolist())) < len(tids) or NOBODY in vcpu_of.values()
        return True

    @property
    def causes_hold(self) -> bool:
        """Say whether nobody sends SMIs unseen."""
        return self.complete and not self.several

    def effects_hold(self, excerpt: Excerpt, doubt: Doubt) -> bool:
        """Say whether an SMI that had no effect ought to have had one."""
        plain = not self.several and excerpt.capability.seen.isdisjoint(LEVEL_EVENTS)
        return plain and (self.supported or doubt.until_ns not in self.unsupported)

    def _take(self, event: SmiEvent, at_ns: int, vcpu_of: dict[int, int]) -> None:
        what, tid, about = event.what, event.tid, event.about
        if what == FORGET:
            self._forget(at_ns)
        elif what == CREATED:
            self.outside[tid] = True
            self.created.add(tid)
        elif what in (SET, REQUESTED):
            self._send(tid, NOBODY)
            self.owed.pop(tid, None)
            self.asked.discard(tid)
            if what == REQUESTED:
                self.asked.add(tid)
        elif what == RETURNED and tid in self.asked:
            self.asked.discard(tid)
            self.supported |= about == 0
            if about == 0:
                self._owe(tid, at_ns, set_by_userspace=True)
        elif what == ACCEPTED:
            self._send(tid, about)
            if vcpu_of.get(tid, NOBODY) == about:
                self._owe(tid, at_ns, set_by_userspace=False)
        elif what in (BEGINS, ENDS):
            self._change(event, at_ns)
        elif what == DELAYED:
            self.owed.pop(tid, None)
        elif what == ENTERED and tid in self.owed:
            self._miss(event, at_ns)

    def _forget(self, at_ns: int) -> None:
        for vcpu in self.vcpus.values():
            vcpu.known = False
        self.outside.clear()
        self.created.clear()
        self.owed.clear()
        self.asked.clear()
        self.since_ns = at_ns

    def _send(self, tid: int, number: int) -> None:
        """Take an SMI for the vCPUs of a number, NOBODY: any."""
        self.sent[tid, number] += 1
        for (runner, mine), vcpu in self.vcpus.items():
            if number in (NOBODY, mine):
                vcpu.own |= runner == tid
                vcpu.others += runner != tid

    def _owe(self, tid: int, at_ns: int, *, set_by_userspace: bool) -> None:
        if self.outside.get(tid):
            self.owed[tid] = at_ns, set_by_userspace

    def _miss(self, event: SmiEvent, at_ns: int) -> None:
        since_ns, set_by_userspace = self.owed.pop(event.tid)
        self.n_judged += 1
        who = "userspace set an SMI" if set_by_userspace else "the vCPU sent itself an SMI"
        expected = f"system-management mode begins: {who}"
        self.without.append(Doubt(event.row, min(self.since_ns, since_ns), at_ns, expected, "VM-entry without"))
        if not set_by_userspace:
            self.unsupported.add(at_ns)

    def _change(self, event: SmiEvent, at_ns: int) -> None:
        """Take a transition; of a vCPU that another thread runs, only userspace makes one."""
        tid, number = event.tid, event.about
        self.supported = True
        for runner, mine in self.vcpus:
            if mine == number and runner != tid:
                self.outside[runner] = None
        self.outside[tid] = event.what == ENDS
        self.n_judged += self.owed.pop(tid, None) is not None
        if event.what == BEGINS:
            self._begin(event, at_ns)

    def _begin(self, event: SmiEvent, at_ns: int) -> None:
        vcpu = self.vcpus.setdefault((event.tid, event.about), self._sent_before(event))
        if not vcpu.known:
            # one that was sent before the recording began, or in what was lost, may come late
            vcpu.known, vcpu.own = True, False
            vcpu.others += at_ns - self.since_ns < threshold("wakes_within")
            return
        self.n_judged += 1
        if vcpu.own:
            vcpu.own = False
        elif vcpu.others:
            vcpu.others -= 1
        else:
            expected = "an SMI accepted, or set by userspace, since system-management mode began last"
            self.uncaused.append(Doubt(event.row, self.since_ns, at_ns, expected, "it begins without"))

    def _sent_before(self, event: SmiEvent) -> Vcpu:
        """Return what is known of a vCPU whose mode changes for the first time."""
        found = Vcpu(known=event.tid in self.created)
        for (tid, number), count in self.sent.items():
            if number in (NOBODY, event.about):
                found.own |= tid == event.tid
                found.others += count if tid != event.tid else 0
        return found


def system_management(excerpt: Excerpt) -> SystemManagement:
    """Return what following the SMIs of an excerpt found."""
    memory = excerpt.remember("system management", SystemManagement)
    excerpt.once("system management", memory.add)
    return memory
