"""Interrupt lines and the pins that they lead to: learned from their first change, until routes are set anew."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.doubts import Doubt
from kvmtrace.check.interrupt_log import interrupt_log
from kvmtrace.check.routing_changes import ioctl_rows
from kvmtrace.check.vcpu_owners import vcpu_owners
from kvmtrace.model.interrupts import ROUTING_IOCTLS
from kvmtrace.table.distinct import within

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt


@dataclass
class LinePins:
    """Where lines lead.

    Parameters
    ----------
    known : line -> (pins, as a number, since when)
    n_judged, n_unknown : changes of lines in this excerpt
    wrong : changes of other pins
    """

    known: dict[int, tuple[int, int]] = field(default_factory=dict)
    n_judged: int = 0
    n_unknown: int = 0
    wrong: list[Doubt] = field(default_factory=list)

    def add(self, excerpt: Excerpt) -> bool:
        """Compare the changes of lines in an excerpt's new rows."""
        self.n_judged, self.n_unknown, self.wrong = 0, 0, []
        row, line, pins, sure = _changes(excerpt)
        # without any pin it is a message's route, or one of another kind, unless it led to pins before
        sure &= (pins != 0) | within(line, np.append(line[sure & (pins != 0)], np.array(list(self.known), np.int64)))
        self.n_unknown = int(np.count_nonzero(~sure))
        row, line, pins = row[sure], line[sure], pins[sure]
        if vcpu_owners(excerpt).ambiguous:
            self.known.clear()
            self.n_unknown += len(row)
            return True
        changes = np.append(ioctl_rows(excerpt, ROUTING_IOCTLS), np.array(vcpu_owners(excerpt).changes, np.intp))
        changes = np.sort(changes[changes >= excerpt.whole.n_parked])
        epoch = np.searchsorted(changes, row)
        new = np.ones(len(row), bool)
        order = np.lexsort((row, line, epoch))
        now, last = order[1:], order[:-1]
        new[now] = (line[now] != line[last]) | (epoch[now] != epoch[last]) | (pins[now] != pins[last])
        began = 0
        for i in np.flatnonzero(new).tolist():
            if epoch[i] != began:
                began = int(epoch[i])
                self.known.clear()
            one, at_ns = int(line[i]), int(excerpt.whole.table.ts_ns[row[i]])
            first, since = self.known.get(one, (0, 0))
            if not first:
                self.known[one] = int(pins[i]), at_ns
            elif first != pins[i]:
                expected = f"{_in_words(one, first)}, as before"
                self.wrong.append(Doubt(int(row[i]), since, at_ns, expected, _in_words(one, int(pins[i]))))
        if began < len(changes):
            self.known.clear()
        self.n_judged = len(row)
        return True


def _in_words(line: int, pins: int) -> str:
    words = []
    if pins & 0xFF:
        words.append(f"pin {(pins & 0xFF) - 1} of the PICs")
    if pins >> 8:
        words.append(f"pin {(pins >> 8) - 1} of the IOAPIC")
    return f"line {line} changes {' and '.join(words) or 'no pin'}"


def _changes(excerpt: Excerpt) -> tuple[NDArray[np.intp], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Return (row, line, pins as one number, all of it is known) of each kvm_set_irq."""
    log = interrupt_log(excerpt)
    entry = log.of_kind("kvm_set_irq")
    pins = np.zeros(len(entry), np.int64)
    behind = log.behind[entry]
    last = behind
    pic = log.is_kind(behind, "kvm_pic_set_irq")
    at = behind[pic]
    pins[pic] = log.values("kvm_pic_set_irq", "chip", at) * 8 + (log.values("kvm_pic_set_irq", "pin", at) & 7) + 1
    behind = np.where(pic, log.behind[np.maximum(behind, 0)] if len(entry) else behind, behind)
    ioapic = log.is_kind(behind, "kvm_ioapic_set_irq")
    at = behind[ioapic]
    pins[ioapic] |= log.values("kvm_ioapic_set_irq", "pin", at) + 1 << 8
    last = np.where(pic | ioapic, behind, last)
    sure = log.whole(entry, last)
    return log.row[entry], log.values("kvm_set_irq", "gsi", entry), pins, sure


def line_pins(excerpt: Excerpt) -> LinePins:
    """Return what following the lines of an excerpt found."""
    memory = excerpt.remember("line pins", LinePins)
    excerpt.once("line pins", memory.add)
    return memory
