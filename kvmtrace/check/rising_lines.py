"""Edge-triggered pins of the IOAPIC: a line that rises interrupts once, one that stays up does not interrupt again.

Source: ioapic_set_irq, ioapic_service (ioapic.c)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.doubts import Doubt
from kvmtrace.check.interrupt_log import NONE, InterruptLog, acceptances, interrupt_log
from kvmtrace.check.routing_changes import all_are_recorded, ioctl_rows, known_senders, routing_changes
from kvmtrace.check.vcpu_owners import vcpu_owners
from kvmtrace.kvm.apic import APIC_ID
from kvmtrace.model.interrupts import (
    BROADCAST,
    ENTRY_DESTINATION,
    ENTRY_LEVEL,
    ENTRY_LOGICAL,
    ENTRY_MASKED,
    ENTRY_MODE,
    N_ISA_PINS,
    ROUTING_IOCTLS,
    RTC_PIN,
)
from kvmtrace.model.thresholds import threshold
from kvmtrace.table.distinct import among, within

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

    Rows = NDArray[np.intp]
    Flags = NDArray[np.bool_]
    Numbers = NDArray[np.int64]

SETTLES_NS = 1_000_000_000  # so long after userspace set a chip's state lines are not judged
VCPU_BITS = 32


@dataclass
class Edges:
    """What following the lines of edge-triggered pins found.

    Parameters
    ----------
    n_judged, n_unknown : raised lines of this excerpt
    wrong : an interrupt without an edge, or an edge without an interrupt
    renamed : a guest wrote an APIC_ID: a destination may be any vCPU's
    latest : pin -> (who drove its line last, to which level)
    shared : pins whose line somebody raised while somebody else held it up, perhaps
    """

    n_judged: int = 0
    n_unknown: int = 0
    wrong: list[Doubt] = field(default_factory=list)
    renamed: bool = False
    latest: dict[int, tuple[int, int]] = field(default_factory=dict)
    shared: set[int] = field(default_factory=set)

    def add(self, excerpt: Excerpt) -> bool:
        """Follow the lines through an excerpt's new rows."""
        self.n_judged, self.n_unknown, self.wrong = 0, 0, []
        log = interrupt_log(excerpt)
        writes = log.of_kind("kvm_apic")
        named = (log.values("kvm_apic", "rw", writes) == 1) & (log.values("kvm_apic", "reg", writes) == APIC_ID)
        self.renamed |= bool(named.any())
        uses = _uses(log)
        raised = uses.level == 1
        known = raised & self._known(excerpt, uses)
        edge = known & (uses.bits & (ENTRY_LEVEL | ENTRY_MASKED) == 0)
        again = edge & (_before(uses.level) == 1)
        rises = edge & ~again & self._reaches_a_vcpu(excerpt, uses)
        self.n_judged = int(np.count_nonzero(again | rises))
        self.n_unknown = int(np.count_nonzero(raised & ~known))
        self._report(uses, again & uses.accepted, "no interrupt: its line was up already", "another one is accepted")
        self._report(uses, rises & ~uses.accepted, "an interrupt: its line rises", "nobody accepts one")
        return True

    def _report(self, uses: _Uses, bad: Flags, expected: str, observed: str) -> None:
        times = uses.log.table.ts_ns
        for i in np.flatnonzero(bad).tolist():
            row, since = int(uses.row[i]), int(uses.row[i - 1])
            words = f"edge-triggered pin {int(uses.pin[i])} of the IOAPIC: {expected}"
            self.wrong.append(Doubt(row, int(times[since]), int(times[row]), words, observed))

    def _known(self, excerpt: Excerpt, uses: _Uses) -> Flags:
        """Say of which changes the one before is known, with nobody else who drives the line, or sets it."""
        self._note_sources(uses)
        if vcpu_owners(excerpt).ambiguous or known_senders(excerpt).others:
            return np.zeros(len(uses.pin), bool)
        # nobody shares an edge-triggered line of an ISA device: who is not recorded does not drive it
        driven = np.ones(len(uses.pin), bool) if all_are_recorded(excerpt) else uses.pin < N_ISA_PINS
        known = driven & ~among(uses.pin, {*self.shared, RTC_PIN}) & (_before(uses.level) >= 0)
        known &= _before(uses.pin) == uses.pin
        times, lane = uses.log.table.ts_ns[uses.row], uses.log.lane[uses.entry]
        # clocks of CPUs may differ
        apart = np.diff(times, prepend=0) > threshold("clocks_differ")
        known &= apart | (_before(lane) == lane)
        sets = np.sort(ioctl_rows(excerpt, ROUTING_IOCTLS))
        latest = np.append(-SETTLES_NS, uses.log.table.ts_ns[sets])[np.searchsorted(sets, uses.row)]
        found: Flags = known & (_before(times) - latest > SETTLES_NS)
        return found

    def _note_sources(self, uses: _Uses) -> None:
        """Note whose line each pin is; one that another takes over while it is down is that one's."""
        follows = _before(uses.pin) == uses.pin
        other = follows & (_before(uses.source) != uses.source)
        self.shared |= set(uses.pin[(uses.source < 0) | other & (_before(uses.level) != 0)].tolist())
        for i in np.flatnonzero(~follows).tolist():
            pin, source = int(uses.pin[i]), int(uses.source[i])
            before, level = self.latest.get(pin, (source, 0))
            if before != source and level:
                self.shared.add(pin)
        for i in np.flatnonzero(np.append(uses.pin[1:] != uses.pin[:-1], True)[: len(uses.pin)]).tolist():
            self.latest[int(uses.pin[i])] = int(uses.source[i]), int(uses.level[i])

    def _reaches_a_vcpu(self, excerpt: Excerpt, uses: _Uses) -> Flags:
        """Say which entries name a vCPU whose LAPIC is on: it accepts other interrupts, with the same routing."""
        mode, destination = uses.bits >> ENTRY_MODE & 7, uses.bits >> ENTRY_DESTINATION & BROADCAST
        plain: Flags = (mode == 0) & (uses.bits & ENTRY_LOGICAL == 0) & (destination != BROADCAST)
        if self.renamed or not known_senders(excerpt).created:
            return np.zeros(len(plain), bool)
        accepted, changes = acceptances(excerpt), routing_changes(excerpt)
        seen = changes.epoch(uses.log.row[accepted.entry]).astype(np.int64) << VCPU_BITS | accepted.vcpu
        meant = changes.epoch(uses.row).astype(np.int64) << VCPU_BITS | destination
        return plain & within(meant, seen) & changes.is_settled(uses.row)


@dataclass(frozen=True, eq=False)
class _Uses:
    """Changes of lines as the IOAPIC's pins saw them, under its lock: pin by pin, each in its order.

    Parameters
    ----------
    entry : in the log
    row : of the table
    source : who drives the line, and which; -1 if that is not known
    level : 0, 1; -1 if that is not known
    bits : redirection entry
    accepted : a LAPIC accepted an interrupt meanwhile
    """

    log: InterruptLog
    entry: Rows
    row: Rows
    pin: Numbers
    source: Numbers
    level: Numbers
    bits: Numbers
    accepted: Flags


def _before(values: Numbers) -> Numbers:
    """Return the value before each, NONE before the first."""
    return np.append(NONE, values)[:-1]


def _uses(log: InterruptLog) -> _Uses:
    entry = log.of_kind("kvm_ioapic_set_irq")
    pin = log.values("kvm_ioapic_set_irq", "pin", entry)
    order = np.lexsort((log.row[entry], pin))
    entry, pin = entry[order], pin[order]
    line = log.lines(entry)
    told = log.whole(line, entry)
    source, level = np.full(len(entry), NONE, np.int64), np.full(len(entry), NONE, np.int64)
    driver = log.values("kvm_set_irq", "irq_source_id", line[told])
    source[told] = driver << 32 | log.values("kvm_set_irq", "gsi", line[told]) & 0xFFFFFFFF
    level[told] = log.values("kvm_set_irq", "level", line[told]) != 0
    bits = log.values("kvm_ioapic_set_irq", "e", entry)
    return _Uses(log, entry, log.row[entry], pin, source, level, bits, log.accepted_before(entry))


def edges(excerpt: Excerpt) -> Edges:
    """Return what following the lines of an excerpt found."""
    memory = excerpt.remember("edges", Edges)
    excerpt.once("edges", memory.add)
    return memory
