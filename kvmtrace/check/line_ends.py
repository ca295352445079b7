"""How interrupts of the IOAPIC end: the EOI of a vector is told to the pins that have it.

A line that is still raised interrupts again then.

Source: kvm_ioapic_send_eoi (lapic.c), kvm_ioapic_update_eoi_one, kvm_ioapic_scan_entry (ioapic.c)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.doubts import Doubt
from kvmtrace.check.interrupt_log import NONE, NUMBER, InterruptLog, interrupt_log
from kvmtrace.check.pending_interrupts import UNTRACED_DELIVERY
from kvmtrace.check.redirection import entry_writes, redirection
from kvmtrace.check.routing_changes import ioctl_rows, routing_changes
from kvmtrace.check.vcpu_owners import vcpu_owners
from kvmtrace.model.interrupts import (
    ENTRY_LEVEL,
    ENTRY_MASKED,
    ENTRY_REMOTE_IRR,
    ENTRY_VECTOR,
    FOREIGN_LINES,
    LINE_EVENTS,
    SPIV_DIRECTED_EOI,
)
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

    Rows = NDArray[np.intp]
    Numbers = NDArray[np.int64]

IOAPIC = 2  # kvm_ack_irq.irqchip (KVM_IRQCHIP_IOAPIC)
_SPIV = 0xF0


@dataclass
class LineEnds:
    """What comparing the EOIs of an excerpt with the pins found.

    Parameters
    ----------
    wrong : what differs
    """

    n_judged: int = 0
    n_unknown: int = 0
    wrong: list[Doubt] = field(default_factory=list)


def line_ends(excerpt: Excerpt) -> LineEnds:
    """Return what comparing the EOIs of an excerpt with the pins found (made once)."""
    return excerpt.once("line ends", _line_ends)


def _line_ends(excerpt: Excerpt) -> LineEnds:
    found, log = LineEnds(), interrupt_log(excerpt)
    acks = log.of_kind("kvm_ack_irq")
    acks = acks[log.values("kvm_ack_irq", "irqchip", acks) == IOAPIC]
    if not len(acks) or vcpu_owners(excerpt).ambiguous:
        found.n_unknown = len(acks)
        return found
    changes = _changes(excerpt)
    eoi = _causes(log, acks)
    _compare_vectors(excerpt, acks, eoi, found)
    _compare_times(excerpt, acks, eoi, found)
    _compare_pins(log, acks, eoi, changes, found)
    if not _directed(log):
        _follow_levels(log, acks, changes, found)
    return found


def _changes(excerpt: Excerpt) -> Rows:
    """Return the rows, ascending, at which pins may get other vectors, or others may want to be told."""
    table = excerpt.whole.table
    lost = table.rows(LOST_EVENTS) if LOST_EVENTS in table.kind_index else np.empty(0, np.intp)
    rows = np.concatenate(
        [entry_writes(excerpt), routing_changes(excerpt).begin, ioctl_rows(excerpt, FOREIGN_LINES), lost]
    )
    return np.sort(rows[rows >= excerpt.whole.n_parked])


def _causes(log: InterruptLog, acks: Rows) -> Rows:
    """Return the entry of the EOI that each pin is told of; NONE where something else lies between."""
    n = len(log.code)
    between = np.zeros(n, bool)
    for kind in ("kvm_apic_accept_irq", *LINE_EVENTS):
        between |= log.code == NUMBER[kind]
    last = np.maximum.accumulate(np.where(between, NONE, np.arange(n)))[acks]
    same = (last >= 0) & (log.lane[last] == log.lane[acks])
    return np.where(same & log.is_kind(last, "kvm_eoi"), last, NONE)


def _compare_vectors(excerpt: Excerpt, acks: Rows, eoi: Rows, found: LineEnds) -> None:
    """Check that the pins that are told of a vector's EOI have that vector: as written, or as last used."""
    log, n = interrupt_log(excerpt), len(excerpt.whole.table)
    pins = log.values("kvm_ack_irq", "pin", acks)
    told = np.array(redirection(excerpt).vectors, np.int64).reshape(-1, 4)
    told = told[np.lexsort((np.arange(len(told)), told[:, 0]))]
    at = np.searchsorted(told[:, 0] * (n + 1) + told[:, 1] + 1, pins * (n + 1) + log.row[acks] + 1) - 1
    known = (at >= 0) & (eoi != NONE)
    pin, since, vector, settled = told[at[known]].T
    ended = log.row[eoi[known]]
    # an entry that is written after the EOI, or about then, may have had another vector
    known[known] = (pin == pins[known]) & (vector != NONE) & (since < ended) & (settled < ended)
    found.n_judged += int(np.count_nonzero(known))
    found.n_unknown += int(np.count_nonzero(~known))
    since, vector, ended = told[at[known], 1], told[at[known], 2], log.values("kvm_eoi", "vector", eoi[known])
    times = log.table.ts_ns
    for i in np.flatnonzero(vector != ended & ENTRY_VECTOR).tolist():
        expected = f"pin {int(pins[known][i])} told of the EOI of its vector {int(vector[i]):#x}"
        row, began = int(log.row[acks[known][i]]), int(since[i])
        since_ns = int(times[began]) if began >= 0 else 0
        found.wrong.append(Doubt(row, since_ns, int(times[row]), expected, f"of {int(ended[i]):#x}"))


def _compare_times(excerpt: Excerpt, acks: Rows, eoi: Rows, found: LineEnds) -> None:
    """Check that an EOI is told to a pin once; where hardware ends interrupts, more of them may be told."""
    if not excerpt.capability.seen.isdisjoint(UNTRACED_DELIVERY):
        return
    log = interrupt_log(excerpt)
    pins = log.values("kvm_ack_irq", "pin", acks)
    order = np.lexsort((acks, pins, eoi))
    now, last = order[1:], order[:-1]
    again = now[(eoi[now] != NONE) & (eoi[now] == eoi[last]) & (pins[now] == pins[last])]
    for i in again.tolist():
        expected = f"pin {int(pins[i])} of the IOAPIC told once of an EOI"
        found.wrong.append(_doubt(log, int(eoi[i]), int(acks[i]), expected, "told again"))


def _compare_pins(log: InterruptLog, acks: Rows, eoi: Rows, changes: Rows, found: LineEnds) -> None:
    """Check that each EOI of a vector is told to the same pins, until an entry is written.

    The first one behind a change may go by what was before; the second one counts.
    """
    entry = log.of_kind("kvm_eoi")
    told = np.zeros(len(entry), np.int64)
    caused = eoi != NONE
    pins = log.values("kvm_ack_irq", "pin", acks[caused])
    np.bitwise_or.at(told, np.searchsorted(entry, eoi[caused]), 1 << np.clip(pins, 0, 62))
    vector, vcpu = log.values("kvm_eoi", "vector", entry), log.values("kvm_eoi", "apicid", entry)
    usable = (vector >= 0) & log.whole(entry, log.behind[entry])
    at, epoch = np.flatnonzero(usable), np.searchsorted(changes, log.row[entry])
    key = (epoch * 256 + (vector & 0xFF)) * (1 << 16) + (vcpu & 0xFFFF)
    at = at[np.lexsort((log.row[entry[at]], key[at]))]
    first = np.ones(len(at), bool)
    first[1:] = key[at][1:] != key[at][:-1]
    number = np.arange(len(at)) - np.maximum.accumulate(np.where(first, np.arange(len(at)), 0))
    judged = np.flatnonzero(number >= 2)
    second = at[judged - number[judged] + 1]
    found.n_judged += len(judged)
    for i in np.flatnonzero(told[at[judged]] != told[second]).tolist():
        one = at[judged[i]]
        expected = f"the EOI of vector {int(vector[one]):#x} told to {_in_words(int(told[second[i]]))}, as before"
        found.wrong.append(_doubt(log, entry[second[i]], entry[one], expected, f"to {_in_words(int(told[one]))}"))


def _doubt(log: InterruptLog, since: int, until: int, expected: str, observed: str) -> Doubt:
    """Return what differs at an entry from what an earlier one told."""
    times = log.table.ts_ns
    row = int(log.row[until])
    return Doubt(row, int(times[log.row[since]]), int(times[row]), expected, observed)


def _in_words(pins: int) -> str:
    numbers = [str(pin) for pin in range(63) if pins >> pin & 1]
    return f"pin {', '.join(numbers)} of the IOAPIC" if numbers else "no pin of the IOAPIC"


def _directed(log: InterruptLog) -> bool:
    """Say whether a guest asked for EOIs that are not told to the IOAPIC (bit 12 of its SPIV)."""
    writes = log.of_kind("kvm_apic")
    spiv = log.values("kvm_apic", "reg", writes) == _SPIV
    return bool((log.values("kvm_apic", "val", writes[spiv]) & SPIV_DIRECTED_EOI != 0).any())


def _follow_levels(log: InterruptLog, acks: Rows, changes: Rows, found: LineEnds) -> None:
    """Check remote IRR of level-triggered pins: set from delivery to EOI; and that a raised line interrupts again."""
    uses = log.of_kind("kvm_ioapic_set_irq")
    bits = log.values("kvm_ioapic_set_irq", "e", uses)
    level = bits & ENTRY_LEVEL != 0
    uses, bits = uses[level], bits[level]
    pin = np.append(log.values("kvm_ioapic_set_irq", "pin", uses), log.values("kvm_ack_irq", "pin", acks))
    entry = np.append(uses, acks)
    is_use = np.repeat(np.array([True, False]), [len(uses), len(acks)])
    entries = np.append(bits, np.zeros(len(acks), np.int64))
    order = np.lexsort((log.row[entry], pin))
    waits: dict[int, tuple[bool, int, int, int]] = {}  # pin -> remote IRR, from which row on, entry, told by
    for i in order.tolist():
        one, row, number = int(entry[i]), int(log.row[entry[i]]), int(pin[i])
        held = waits.get(number)
        if held is not None and np.searchsorted(changes, held[1]) != np.searchsorted(changes, row):
            held = None
        if is_use[i]:
            waits[number] = _use_of_level(log, one, int(entries[i]), held, found)
        elif held is not None:
            waits[number] = _end_of_level(log, one, held, found)


def _use_of_level(
    log: InterruptLog, one: int, bits: int, held: tuple[bool, int, int, int] | None, found: LineEnds
) -> tuple[bool, int, int, int]:
    row, waiting = int(log.row[one]), bits & ENTRY_REMOTE_IRR != 0
    if held is not None and row > held[1] and waiting != held[0]:
        words = ("no remote IRR: its interrupt was ended", "remote IRR: its interrupt was not ended")
        expected = f"a level-triggered pin with {words[held[0]]}"
        found.wrong.append(_doubt(log, held[3], one, expected, f"entry {bits & (1 << 64) - 1:#x}"))
    found.n_judged += held is not None
    return waiting or bool(log.accepted_before(np.array([one]))[0]), row, bits, one


def _end_of_level(
    log: InterruptLog, one: int, held: tuple[bool, int, int, int], found: LineEnds
) -> tuple[bool, int, int, int]:
    """Take an EOI; it is over when the thread traces something else."""
    following = int(log.behind[one])
    again = following != one + 1 and following != NONE
    until = int(log.row[following]) if following != NONE else len(log.table)
    if following == NONE or log.is_kind(np.array([following]), *LINE_EVENTS)[0]:
        return again, until, held[2], one
    if not again and not held[2] & ENTRY_MASKED and _raised(log, one, until):
        expected = "another interrupt: its line is still raised"
        found.wrong.append(_doubt(log, held[3], one, expected, "an EOI, and none"))
    return again, until, held[2], one


def _raised(log: InterruptLog, ack: int, until: int) -> bool:
    """Say whether the one source that drives a pin's line had raised it, until its EOI is over."""
    uses = log.of_kind("kvm_ioapic_set_irq")
    pin = int(log.values("kvm_ack_irq", "pin", np.array([ack]))[0])
    uses = uses[log.values("kvm_ioapic_set_irq", "pin", uses) == pin]
    line = log.lines(uses)
    if not len(line) or (line < 0).any():
        return False
    sources = log.values("kvm_set_irq", "irq_source_id", line) << 32 | log.values("kvm_set_irq", "gsi", line)
    rows = log.row[line]
    before = rows < log.row[ack]
    if (sources != sources[0]).any() or ((rows >= log.row[ack]) & (rows <= until)).any() or not before.any():
        return False
    last = line[before][int(np.argmax(rows[before]))]
    return bool(log.values("kvm_set_irq", "level", np.array([last]))[0] != 0)
