"""The IOAPIC's redirection entries: what the guest wrote into them, and what KVM then says they hold.

An entry is learned from the guest's writes to the IOAPIC's window, else from its first use; it stays until it is
written again, or userspace sets the whole chip.
Source: ioapic_write_indirect (ioapic.c)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.doubts import Doubt
from kvmtrace.check.interrupt_log import NONE, interrupt_log
from kvmtrace.check.routing_changes import ioctl_rows
from kvmtrace.check.vcpu_owners import vcpu_owners
from kvmtrace.kvm.apic import IOAPIC_DEFAULT_BASE
from kvmtrace.model.interrupts import ENTRY_VECTOR, READ_ONLY_ENTRY_BITS, ROUTING_IOCTLS
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

SELECT, WINDOW = IOAPIC_DEFAULT_BASE, IOAPIC_DEFAULT_BASE + 0x10
FIRST_ENTRY = 0x10  # register of the first entry's low half
_WRITE = 2  # kvm_mmio.type
_HALF, _ALL = 0xFFFFFFFF, (1 << 64) - 1
_USE, _SELECT, _WINDOW, _FORGET = range(4)


@dataclass
class Redirection:
    """What is known of the entries.

    Parameters
    ----------
    selected : register that the window shows, None if that is not known
    bits : pin -> (known bits, which those are, since when)
    former : pin -> the same before its latest write, and the row up to which that may be under way
    n_judged, n_unknown : uses of entries in this excerpt
    wrong : uses that differ
    vectors : (pin, row from which on, its vector or NONE, row up to which a write of it may be under way), by row
    """

    selected: int | None = None
    selected_ns: int = 0
    bits: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    former: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    n_judged: int = 0
    n_unknown: int = 0
    wrong: list[Doubt] = field(default_factory=list)
    vectors: list[tuple[int, int, int, int]] = field(default_factory=list)

    def add(self, excerpt: Excerpt) -> bool:
        """Take note of an excerpt's new rows, in their order."""
        self.n_judged, self.n_unknown, self.wrong, self.vectors = 0, 0, [], []
        if vcpu_owners(excerpt).ambiguous:
            self._forget()
            return True
        self.former.clear()
        for pin in self.bits:
            self._note(pin, NONE)
        row, what, about, value = _events(excerpt)
        for i in _telling(what, about, value).tolist():
            at_ns = int(excerpt.whole.table.ts_ns[row[i]])
            self._take(int(what[i]), (int(row[i]), at_ns), int(about[i]), int(value[i]))
        self.n_judged = int(np.count_nonzero(what == _USE)) - self.n_unknown
        return True

    def _take(self, what: int, place: tuple[int, int], about: int, value: int) -> None:
        """Take an event at a row and time; `about`: the pin, or the row up to which a write may be under way."""
        if what == _FORGET:
            for pin in self.bits:
                self.vectors.append((pin, place[0], NONE, NONE))
            self._forget()
        elif what == _SELECT:
            self.selected, self.selected_ns = value & 0xFF, place[1]
        elif what == _WINDOW:
            self._write(value & _HALF, about, place[0])
        else:
            self._use(place, about, value & ~READ_ONLY_ENTRY_BITS)
            self._note(about, place[0])

    def _note(self, pin: int, row: int, settled: int = NONE) -> None:
        """Note which vector a pin has from a row on."""
        bits, known, _ = self.bits[pin]
        self.vectors.append((pin, row, bits & ENTRY_VECTOR if known & ENTRY_VECTOR else NONE, settled))

    def _forget(self) -> None:
        self.selected = None
        self.bits.clear()
        self.former.clear()

    def _write(self, value: int, settled: int, row: int) -> None:
        """Take a write to the window; to a register that is not known it may be to any entry."""
        if self.selected is None:
            for pin in self.bits:
                self.vectors.append((pin, row, NONE, NONE))
            self.bits.clear()
        elif self.selected >= FIRST_ENTRY:
            pin, high = divmod(self.selected - FIRST_ENTRY, 2)
            bits, known, since = self.bits.get(pin, (0, 0, self.selected_ns))
            self.former[pin] = bits, known, settled
            half = _HALF << 32 * high
            self.bits[pin] = (
                bits & ~half | value << 32 * high & ~READ_ONLY_ENTRY_BITS,
                known | half,
                min(since, self.selected_ns),
            )
            self._note(pin, row, settled)

    def _use(self, place: tuple[int, int], pin: int, value: int) -> None:
        bits, known, since = self.bits.get(pin, (0, 0, 0))
        before, known_before, settled = self.former.get(pin, (0, 0, -1))
        if place[0] < settled and not (before ^ value) & known_before:
            self.n_unknown += 1  # the write was traced, and not done yet perhaps
            return
        self.n_unknown += not known
        if (bits ^ value) & known:
            expected = f"redirection entry {bits & _ALL:#x}, as written or used before"
            self.wrong.append(Doubt(place[0], since, place[1], expected, f"{value & _ALL:#x}"))
        self.bits[pin] = value, _ALL, place[1]


def entry_writes(excerpt: Excerpt) -> NDArray[np.intp]:
    """Return the rows at which the guest writes to the IOAPIC's window."""
    log = interrupt_log(excerpt)
    writes = log.of_kind("kvm_mmio")
    window = (log.values("kvm_mmio", "gpa", writes) == WINDOW) & (log.values("kvm_mmio", "type", writes) == _WRITE)
    found: NDArray[np.intp] = log.row[writes[window]]
    return found


def _events(excerpt: Excerpt) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return (row, what, pin or row, value) of what concerns the entries, by row."""
    log, table = interrupt_log(excerpt), excerpt.whole.table
    pins, writes = log.of_kind("kvm_ioapic_set_irq"), log.of_kind("kvm_mmio")
    gpa = log.values("kvm_mmio", "gpa", writes)
    written = log.values("kvm_mmio", "type", writes) == _WRITE
    select, window = writes[written & (gpa == SELECT)], writes[written & (gpa == WINDOW)]
    forget = np.append(ioctl_rows(excerpt, ROUTING_IOCTLS), np.array(vcpu_owners(excerpt).changes, np.intp))
    if LOST_EVENTS in table.kind_index:
        forget = np.append(forget, table.rows(LOST_EVENTS))
    forget = forget[forget >= excerpt.whole.n_parked]
    rows = [log.row[pins], log.row[select], log.row[window], forget]
    nothing = np.zeros(len(forget), np.int64)
    values = [
        log.values("kvm_ioapic_set_irq", "e", pins),
        log.values("kvm_mmio", "val", select),
        log.values("kvm_mmio", "val", window),
        nothing,
    ]
    row = np.concatenate(rows)
    what = np.repeat(np.array([_USE, _SELECT, _WINDOW, _FORGET]), [len(one) for one in rows])
    about = np.zeros(len(row), np.int64)
    about[what == _USE] = log.values("kvm_ioapic_set_irq", "pin", pins)
    following = log.behind[window]
    about[what == _WINDOW] = np.where(following == NONE, len(table), log.row[following] if len(log.row) else 0)
    order = np.argsort(row, kind="stable")
    return row[order], what[order], about[order], np.concatenate(values)[order]


def _telling(what: NDArray[np.int64], pin: NDArray[np.int64], value: NDArray[np.int64]) -> NDArray[np.intp]:
    """Return which events say something new: a pin's entry that is as before, nothing written between, does not."""
    written = np.cumsum(what != _USE)
    order = np.lexsort((np.arange(len(what)), pin, what))
    same = np.zeros(len(what), bool)
    now, last = order[1:], order[:-1]
    same[now] = (what[now] == _USE) & (what[last] == _USE) & (pin[now] == pin[last])
    same[now] &= (value[now] & ~READ_ONLY_ENTRY_BITS) == (value[last] & ~READ_ONLY_ENTRY_BITS)
    same[now] &= written[now] == written[last]
    return np.flatnonzero(~same)


def redirection(excerpt: Excerpt) -> Redirection:
    """Return what following the entries through an excerpt found."""
    memory = excerpt.remember("redirection", Redirection)
    excerpt.once("redirection", memory.add)
    return memory
