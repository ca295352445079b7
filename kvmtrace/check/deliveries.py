"""What senders of interrupts say, beside what the LAPICs then accepted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.interrupt_log import ACCEPT, NONE, acceptances, interrupt_log
from kvmtrace.check.vcpu_owners import NOBODY, vcpu_owners
from kvmtrace.kvm.apic import DELIVERY_MODES, FIXED, LOWEST_PRIORITY
from kvmtrace.model.interrupts import ENTRY_LEVEL, SENDERS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.interrupt_log import InterruptLog

    Rows = NDArray[np.intp]
    Flags = NDArray[np.bool_]
    Numbers = NDArray[np.int64]

MOST_VCPUS = 63  # what a set of vCPUs in one integer can hold
# shorthands of an ICR
SELF, ALL, OTHERS = 1, 2, 3


@dataclass(frozen=True, eq=False)
class Sent:
    """What was sent, in the log's order.

    Parameters
    ----------
    entry : intp, of the sender in the log
    vector, mode, shorthand, destination : int64
    level, logical : bool
    own : int64, vCPU of the thread that traced it, NOBODY if it runs none
    known : bool, all acceptances are in this excerpt: nothing was lost, or cut off
    to : int64, set of vCPUs that accepted it as sent
    wrong : list of (entry of an acceptance, number of the sender, what is wrong)
    """

    entry: Rows
    vector: Numbers
    mode: Numbers
    level: Flags
    shorthand: Numbers
    logical: Flags
    destination: Numbers
    own: Numbers
    known: Flags
    to: Numbers
    wrong: list[tuple[int, int, str]]

    def to_one(self) -> Flags:
        """Say what goes to one of several vCPUs, whichever KVM chooses."""
        found: Flags = self.mode == LOWEST_PRIORITY
        return found


def sent(excerpt: Excerpt) -> Sent:
    """Return what was sent, and who accepted it (made once)."""
    return excerpt.once("sent", _sent)


def _sent(excerpt: Excerpt) -> Sent:
    log, accepted = interrupt_log(excerpt), acceptances(excerpt)
    entry = np.flatnonzero(log.is_kind(np.arange(len(log.row)), *filter(log.tells, SENDERS)))
    columns = _columns(log, entry)
    own = vcpu_owners(excerpt).vcpus(log.table.tid[log.row[entry]].astype(np.int64))
    own[~log.own()[entry]] = NOBODY
    first, last = entry.copy(), log.behind[entry]
    for kind, row in SENDERS.items():
        if row.after:
            mine = log.is_kind(entry, kind)
            first[mine], last[mine] = log.before[entry[mine]], entry[mine]
    known = log.whole(first, last)
    found = Sent(entry, *columns, own, known, np.zeros(len(entry), np.int64), [])
    _receive(found, np.flatnonzero(accepted.sender != NONE), excerpt)
    return found


def _columns(log: InterruptLog, entry: Rows) -> tuple[Numbers, Numbers, Flags, Numbers, Flags, Numbers]:
    """Return vector, mode, level, shorthand, logical and destination of senders."""
    n = len(entry)
    low, destination = np.zeros(n, np.int64), np.zeros(n, np.int64)
    ipi = log.is_kind(entry, "kvm_apic_ipi")
    low[ipi] = log.values("kvm_apic_ipi", "icr_low", entry[ipi]) & 0xFFFFFFFF
    destination[ipi] = log.values("kvm_apic_ipi", "dest_id", entry[ipi]) & 0xFFFFFFFF
    pin = log.is_kind(entry, "kvm_ioapic_set_irq")
    bits = log.values("kvm_ioapic_set_irq", "e", entry[pin])
    # vector, mode and destination mode stand where an ICR has them, the trigger mode too
    low[pin] = bits & (0xFFF | ENTRY_LEVEL)
    destination[pin] = bits >> 56 & 0xFF
    message = log.is_kind(entry, "kvm_msi_set_irq")
    address = log.values("kvm_msi_set_irq", "address", entry[message])
    low[message] = log.values("kvm_msi_set_irq", "data", entry[message]) & (0x7FF | 0x8000)
    low[message] |= (address >> 2 & 1) << 11
    # a redirection hint lets KVM choose one of several; the address as a whole says where a message goes
    low[message & _at(message, address >> 3 & 1 != 0)] |= LOWEST_PRIORITY << 8
    destination[message] = address
    shorthand = np.where(ipi, low >> 18 & 3, 0)
    return low & 0xFF, low >> 8 & 7, low & 0x8000 != 0, shorthand, low & 0x800 != 0, destination


def _at(where: Flags, values: Flags) -> Flags:
    """Return flags of the whole from those of the chosen ones."""
    found = np.zeros(len(where), bool)
    found[where] = values
    return found


def _receive(found: Sent, numbers: Rows, excerpt: Excerpt) -> None:
    """Note the acceptances of what was sent: who accepted it, and which do not agree with it."""
    log, accepted = interrupt_log(excerpt), acceptances(excerpt)
    of = np.searchsorted(found.entry, accepted.sender[numbers])
    vcpu = accepted.vcpu[numbers]
    mode, meant = accepted.mode[numbers], found.mode[of]
    as_sent = accepted.vector[numbers] == found.vector[of]
    # one of several was chosen before; to all of them a lowest-priority interrupt goes as a fixed one
    as_mode = (mode == meant) | (meant == LOWEST_PRIORITY) & (mode == FIXED)
    as_sent &= as_mode & (accepted.level[numbers] == found.level[of])
    again = np.zeros(len(numbers), bool)
    bits = np.where((vcpu >= 0) & (vcpu < MOST_VCPUS), 1 << np.clip(vcpu, 0, MOST_VCPUS - 1), 0)
    order = np.lexsort((numbers, vcpu, of, ~as_sent))
    same = (of[order][1:] == of[order][:-1]) & (vcpu[order][1:] == vcpu[order][:-1])
    again[order[1:]] = same & as_sent[order][1:] & as_sent[order][:-1]
    good = as_sent & ~again
    np.bitwise_or.at(found.to, of[good], bits[good])
    found.known[of[bits == 0]] = False
    # what the thread's own LAPIC accepts may be its timer's: that follows directly, nothing traced between
    local = ~good & (vcpu == found.own[of]) & (mode == FIXED) & ~accepted.level[numbers]
    local &= ~log.is_kind(found.entry[of], "kvm_ioapic_set_irq")
    for i in np.flatnonzero(~good & ~local & found.known[of]).tolist():
        what = "again" if again[i] else "otherwise than it was sent"
        found.wrong.append((int(accepted.entry[numbers[i]]), int(of[i]), what))


def in_words(excerpt: Excerpt, entry: int) -> str:
    """Return an acceptance in words."""
    log = interrupt_log(excerpt)
    one = np.array([entry])
    vector, mode = int(log.values(ACCEPT, "vec", one)[0]), int(log.values(ACCEPT, "dm", one)[0]) >> 8 & 7
    level = "level" if log.values(ACCEPT, "tm", one)[0] else "edge"
    return f"vCPU {int(log.values(ACCEPT, 'apicid', one)[0])} accepted vector {vector:#x} ({mode_name(mode)}, {level})"


def mode_name(mode: int) -> str:
    """Name a delivery mode."""
    return DELIVERY_MODES[mode]


def vcpus_in_words(found: int) -> str:
    """Name a set of vCPUs."""
    numbers = [str(i) for i in range(MOST_VCPUS) if found >> i & 1]
    return ("vCPU " if len(numbers) == 1 else "vCPUs ") + ", ".join(numbers) if numbers else "no vCPU"
