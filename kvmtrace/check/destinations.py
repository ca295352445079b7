"""Which vCPUs a destination stands for: learned from its first use, until something may have changed that."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.deliveries import ALL, SELF, sent, vcpus_in_words
from kvmtrace.check.doubts import Doubt
from kvmtrace.check.interrupt_log import interrupt_log
from kvmtrace.check.routing_changes import routing_changes
from kvmtrace.check.vcpu_owners import vcpu_owners
from kvmtrace.model.interrupts import ENTRY_LEVEL, ENTRY_MASKED, ENTRY_REMOTE_IRR
from kvmtrace.table.distinct import run_starts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

    Rows = NDArray[np.intp]
    Numbers = NDArray[np.int64]

_IPI, _MESSAGE, _PIN, _BROADCAST = range(4)


@dataclass
class Destinations:
    """What destinations stood for when they were last used.

    Parameters
    ----------
    known : destination -> (set of vCPUs, time of the use that told it)
    n_judged, n_unknown : of this excerpt
    wrong : uses that differ
    """

    known: dict[int, tuple[int, int]] = field(default_factory=dict)
    n_judged: int = 0
    n_unknown: int = 0
    wrong: list[Doubt] = field(default_factory=list)

    def add(self, excerpt: Excerpt) -> bool:
        """Compare what was sent in an excerpt."""
        self.n_judged, self.n_unknown, self.wrong = 0, 0, []
        found, log, changes = sent(excerpt), interrupt_log(excerpt), routing_changes(excerpt)
        usable = found.known & ~found.to_one() & (found.shorthand != SELF)
        row = log.row[found.entry]
        key, to = _keys(excerpt), found.to.copy()
        all_of = found.shorthand >= ALL
        usable &= ~all_of | (found.own >= 0)
        to[all_of] |= 1 << np.maximum(found.own[all_of], 0)
        usable &= (to != 0) | _owed(excerpt)
        usable &= changes.is_settled(row)
        if vcpu_owners(excerpt).ambiguous:
            self.known.clear()
            usable[:] = False
        self.n_unknown = int(np.count_nonzero(~usable))
        number = np.flatnonzero(usable)
        epoch = changes.epoch(row[number])
        number = number[np.lexsort((row[number], epoch, key[number]))]
        self._compare(number, key, Uses(to, row, log.table.ts_ns[row] if len(row) else row, changes.epoch(row)))
        return True

    def _compare(self, number: Rows, key: Numbers, all_uses: Uses) -> None:
        """Compare each use of a destination with the first one between two changes."""
        to, epoch = all_uses.to, all_uses.epoch
        last = int(epoch.max(initial=0))
        learned = dict(self.known) if not last else {}
        begins = np.append(run_starts(key[number], epoch[number]), len(number)) if len(number) else np.zeros(1, int)
        for start, stop in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
            group = number[start:stop]
            uses, name = to[group], int(key[group[0]])
            first, since = self.known.get(name, (0, 0)) if not epoch[group[0]] else (0, 0)
            if not first:
                at = int((uses != 0).argmax())
                first, since = int(uses[at]), int(all_uses.ts_ns[group[at]])
                group, uses = group[at:], uses[at:]  # before, it may have been nobody's
            self.n_judged += len(group)
            if first:
                self.wrong += [all_uses.doubt(one, first, since) for one in group[uses != first].tolist()]
            if epoch[group[0]] == last and first:
                learned[name] = first, since
        self.known = learned


@dataclass(frozen=True, eq=False)
class Uses:
    """Sets of vCPUs that accepted what was sent, where and when."""

    to: Numbers
    row: Rows
    ts_ns: Numbers
    epoch: Rows

    def doubt(self, number: int, known: int, since_ns: int) -> Doubt:
        """Return what is to be reported of a use that differs from what is known."""
        return Doubt(
            int(self.row[number]),
            since_ns,
            int(self.ts_ns[number]),
            f"accepted by {vcpus_in_words(known)}, as what went to this destination before",
            f"accepted by {vcpus_in_words(int(self.to[number]))}",
        )


def _keys(excerpt: Excerpt) -> Numbers:
    """Return what names the destination of each thing that was sent."""
    found, log = sent(excerpt), interrupt_log(excerpt)
    kind = np.where(
        log.is_kind(found.entry, "kvm_msi_set_irq"),
        _MESSAGE,
        np.where(log.is_kind(found.entry, "kvm_ioapic_set_irq"), _PIN, _IPI),
    )
    broadcast = found.shorthand >= ALL
    named = (found.destination << 3) | kind << 1 | found.logical
    return np.where(broadcast, _BROADCAST << 1, named)


def _owed(excerpt: Excerpt) -> NDArray[np.bool_]:
    """Say what somebody must accept, if its destination is anybody's."""
    found = sent(excerpt)
    log = interrupt_log(excerpt)
    owed = log.is_kind(found.entry, "kvm_apic_ipi")
    message = log.is_kind(found.entry, "kvm_msi_set_irq")
    # messages are also traced while routes are looked through
    owed |= message & log.is_kind(log.before[found.entry], "kvm_set_irq")
    return owed | raised_and_free(excerpt)


def raised_and_free(excerpt: Excerpt) -> NDArray[np.bool_]:
    """Say which pins of the IOAPIC were raised while nothing held the interrupt back."""
    return excerpt.once("raised pins", _raised_and_free)


def _raised_and_free(excerpt: Excerpt) -> NDArray[np.bool_]:
    found, log = sent(excerpt), interrupt_log(excerpt)
    free = np.zeros(len(found.entry), bool)
    pin = np.flatnonzero(log.is_kind(found.entry, "kvm_ioapic_set_irq"))
    entry = found.entry[pin]
    bits = log.values("kvm_ioapic_set_irq", "e", entry)
    held = (bits & ENTRY_MASKED != 0) | (bits & ENTRY_LEVEL != 0) & (bits & ENTRY_REMOTE_IRR != 0)
    held |= log.values("kvm_ioapic_set_irq", "coalesced", entry) != 0
    free[pin] = ~held & (line_levels(excerpt, entry) == 1)
    return free


def line_levels(excerpt: Excerpt, entries: Rows) -> Numbers:
    """Return the level that kvm_set_irq gave the line whose pin changes at each entry, -1 if that is not known."""
    log = interrupt_log(excerpt)
    level, line = np.full(len(entries), -1, np.int64), log.lines(entries)
    told = line >= 0
    level[told] = log.values("kvm_set_irq", "level", line[told]) != 0
    return level


def destinations(excerpt: Excerpt) -> Destinations:
    """Return what comparing the destinations of an excerpt found."""
    memory = excerpt.remember("destinations", Destinations)
    excerpt.once("destinations", memory.add)
    return memory
