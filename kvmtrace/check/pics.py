"""The PICs: the vector of each pin, as the guest set it, from a line's edge to the end of its interrupt.

What is in service is known from what is injected: the vector base comes from the guest's own OUTs. A pin that nothing
is known of counts as unknown, never as wrong.
Source: kvm_pic_read_irq, pic_intack, pic_set_irq1, pic_ioport_write (i8259.c)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS
from kvmtrace.check.doubts import Doubt
from kvmtrace.check.interrupt_log import NONE, interrupt_log
from kvmtrace.check.routing_changes import ioctl_rows, known_senders
from kvmtrace.check.vcpu_owners import vcpu_owners
from kvmtrace.kvm.pic import (
    AUTO_EOI,
    BASE_MASK,
    CASCADE_PIN,
    HAS_LAST_WORD,
    INITIALIZE,
    MASTER_PORT,
    N_PINS,
    NON_SPECIFIC_EOIS,
    OTHER_COMMAND,
    PIC_PORTS,
)
from kvmtrace.model.nesting import LEVEL_EVENTS
from kvmtrace.model.thresholds import threshold
from kvmtrace.table.distinct import among, within
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.interrupt_log import InterruptLog

    Rows = NDArray[np.intp]
    Numbers = NDArray[np.int64]
    Event = tuple[int, int, int, int]  # row, what, pin or chip, value

_FORGET, _COMMAND, _DATA, _TAKEN, _LINE, _ACK = range(6)
MASTER_ACK, SLAVE_ACK = 0, 1  # kvm_ack_irq.irqchip (KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE)
# bits of a line's change
_UP, _TOLD, _LEVEL_TRIGGERED, _MASKED, _COALESCED, _SOURCE = 1, 2, 4, 8, 16, 8
_NON_SPECIFIC = 1  # value of an _ACK
_SEVERAL = -2
_MERGED = 2  # so many edges may have been requests before the first one's injection is traced
_SETTERS = ("KVM_SET_IRQCHIP",)


@dataclass
class Pin:
    """What is known of a pin; its number counts on from the master's to the slave's.

    Parameters
    ----------
    in_service : None if that is not known
    level : of its line, NONE if that is not known
    source : who drives it, NONE if nobody did, _SEVERAL if several do
    edges : times of its rises that were requests of their own, since its vector was taken last
    """

    in_service: bool | None = None
    level: int = NONE
    source: int = NONE
    edges: list[int] = field(default_factory=list)


@dataclass
class Pics:
    """The PICs of the VM.

    Parameters
    ----------
    base : vector of each chip's first pin, None if it is not known
    words : how many words of an initialization each chip waits for
    automatic : chips that end interrupts by themselves
    n_judged, n_unknown : ends of interrupts and edges in this excerpt
    wrong : what differs
    """

    base: list[int | None] = field(default_factory=lambda: [None, None])
    words: list[int] = field(default_factory=lambda: [0, 0])
    last_word: list[bool] = field(default_factory=lambda: [False, False])
    automatic: list[bool] = field(default_factory=lambda: [False, False])
    pins: list[Pin] = field(default_factory=lambda: [Pin() for _ in range(2 * N_PINS)])
    began: bool = False
    taken_ns: list[int] = field(default_factory=lambda: [0] * (2 * N_PINS))
    n_judged: int = 0
    n_unknown: int = 0
    wrong: list[Doubt] = field(default_factory=list)

    def add(self, excerpt: Excerpt) -> bool:
        """Follow the PICs through an excerpt's new rows."""
        self.n_judged, self.n_unknown, self.wrong = 0, 0, []
        events = _events(excerpt, self.base)
        seen = excerpt.capability.seen
        if vcpu_owners(excerpt).ambiguous or not seen.isdisjoint(LEVEL_EVENTS):
            self._forget(created=False)
            self.n_unknown = sum(what in (_ACK, _LINE) for _, what, _, _ in events)
            return True
        if not self.began and known_senders(excerpt).created:
            self._forget(created=True)
        self.began = self.began or bool(events)
        times = excerpt.whole.table.ts_ns
        for row, what, about, value in events:
            self._take(what, about, value, row, int(times[row]))
        self._withdraw(events, times)
        return True

    def _forget(self, *, created: bool) -> None:
        self.base, self.words = [None, None], [0, 0]
        for pin in self.pins:
            pin.in_service = False if created else None
            pin.edges.clear()
            pin.level, pin.source = NONE, NONE

    def _take(self, what: int, about: int, value: int, row: int, at_ns: int) -> None:
        if what == _COMMAND:
            self._command(about, value)
        elif what == _DATA:
            self._data(about, value)
        elif what == _TAKEN:
            self._inject(value, at_ns)
        elif what == _LINE:
            self._change(about, value, row, at_ns)
        elif what == _ACK:
            self._end(about, value, row, at_ns)
        else:
            self._forget(created=False)

    def _command(self, chip: int, value: int) -> None:
        """Take a command; an initialization forgets what edges asked for."""
        if value & INITIALIZE:
            self.words[chip], self.last_word[chip] = 3 if value & HAS_LAST_WORD else 2, bool(value & HAS_LAST_WORD)
            self.base[chip], self.automatic[chip] = None, False
            for pin in self.pins[chip * N_PINS : (chip + 1) * N_PINS]:
                pin.edges.clear()

    def _data(self, chip: int, value: int) -> None:
        """Take a word of an initialization: vector base, wiring, modes; else it is a mask."""
        left = self.words[chip]
        if not left:
            return
        if left == 2 + self.last_word[chip]:
            self.base[chip] = value & BASE_MASK
        elif left == 1 and self.last_word[chip]:
            self.automatic[chip] = bool(value & AUTO_EOI)
        self.words[chip] = left - 1

    def _inject(self, vector: int, at_ns: int) -> None:
        """Take a fresh injection: of a pin whose vector it is, if it is not a LAPIC's."""
        for chip, base in enumerate(self.base):
            if base is None:
                for pin in self.pins[chip * N_PINS : (chip + 1) * N_PINS]:
                    pin.in_service = None
                    pin.edges.clear()
            elif vector & BASE_MASK == base:
                self._serve(chip * N_PINS + (vector & ~BASE_MASK), at_ns)
                if chip:
                    self._serve(CASCADE_PIN, at_ns)

    def _serve(self, number: int, at_ns: int) -> None:
        self.pins[number].in_service = True
        self.pins[number].edges.clear()
        self.taken_ns[number] = at_ns

    def _end(self, number: int, value: int, row: int, at_ns: int) -> None:
        """Take the end of a pin's interrupt: only one in service ends without being named."""
        pin, chip = self.pins[number], number // N_PINS
        known = value == _NON_SPECIFIC and pin.in_service is not None and not self.automatic[chip]
        known &= self.base[chip] is not None
        self.n_judged += known
        self.n_unknown += not known
        if known and not pin.in_service:
            base = self.base[chip] or 0
            words = f"pin {number} of the PICs in service: vector {base + number % N_PINS:#x} injected before its end"
            self.wrong.append(Doubt(row, self.taken_ns[number], at_ns, words, "it ends, and was not injected"))
        # read in place of an acknowledgement (poll), a pin's request ends, too
        pin.in_service = False
        pin.edges.clear()

    def _change(self, number: int, value: int, row: int, at_ns: int) -> None:
        """Take a line's change: of three edges that were requests each, one was taken meanwhile."""
        pin, before = self.pins[number], self.pins[number].level
        told = bool(value & _TOLD)
        source = value >> _SOURCE
        if told and pin.source in (NONE, source):
            pin.source = source
        else:
            pin.source = _SEVERAL
        pin.level = value & _UP if told else NONE
        chip = number // N_PINS
        if value & (_LEVEL_TRIGGERED | _MASKED | _COALESCED) or not told or not pin.level:
            return
        if pin.source == _SEVERAL or before == NONE or self.base[chip] is None or self.automatic[chip]:
            pin.edges.clear()
            self.n_unknown += 1
            return
        self.n_judged += 1
        if before:
            return
        pin.edges.append(at_ns)
        if len(pin.edges) > _MERGED:
            vector = (self.base[chip] or 0) + number % N_PINS
            expected = f"vector {vector:#x} injected: pin {number} of the PICs rose three times, each a new request"
            self.wrong.append(Doubt(row, pin.edges[0], at_ns, expected, "it was not"))
            pin.edges.clear()

    def _withdraw(self, events: list[Event], times: Numbers) -> None:
        """Take back what an injection that is traced just behind explains: clocks of CPUs may differ."""
        taken = np.array([times[row] for row, what, _, _ in events if what == _TAKEN], np.int64)
        if not self.wrong or not len(taken):
            return
        until = np.array([one.until_ns for one in self.wrong], np.int64)
        behind = np.append(taken, 1 << 62)[np.searchsorted(taken, until, "right")]
        near = behind - until < threshold("clocks_differ")
        self.wrong = [one for one, explained in zip(self.wrong, near.tolist(), strict=True) if not explained]


def _events(excerpt: Excerpt, bases: list[int | None]) -> list[Event]:
    """Return what concerns the PICs among an excerpt's new rows, by row; `bases`: vectors of the chips' first pins."""
    log, table = interrupt_log(excerpt), excerpt.whole.table
    lines, acks = log.of_kind("kvm_pic_set_irq"), log.of_kind("kvm_ack_irq")
    chip = log.values("kvm_ack_irq", "irqchip", acks)
    acks = acks[(chip == MASTER_ACK) | (chip == SLAVE_ACK)]
    writes = _port_writes(excerpt)
    forget = np.append(ioctl_rows(excerpt, _SETTERS), np.array(vcpu_owners(excerpt).changes, np.intp))
    if LOST_EVENTS in table.kind_index:
        forget = np.append(forget, table.rows(LOST_EVENTS))
    found: list[Event] = [(row, _FORGET, 0, 0) for row in forget.tolist() if row >= excerpt.whole.n_parked]
    found += _writes_as_events(excerpt, writes)
    found += _lines(log, lines)
    numbers = log.values("kvm_ack_irq", "pin", acks) & (2 * N_PINS - 1)
    non_specific = _by_non_specific(log, acks, writes, excerpt)
    found += zip(log.row[acks].tolist(), [_ACK] * len(acks), numbers.tolist(), non_specific.tolist(), strict=True)
    marks = np.sort(np.array([row for row, *_ in found], np.intp))
    return sorted(found + _injections(excerpt, marks, _vectors(excerpt, writes, bases)))


def _vectors(excerpt: Excerpt, writes: Rows, bases: list[int | None]) -> Numbers | None:
    """Return the bases that an injection may be of, None if any injection tells something."""
    known = [base for base in bases if base is not None]
    if len(known) < len(bases):
        return None
    return np.append(np.array(known, np.int64), _values(excerpt, "val", writes) & BASE_MASK)


def _port_writes(excerpt: Excerpt) -> Rows:
    """Return the new rows at which a guest writes one byte to a PIC."""
    table = excerpt.whole.table
    rows = table.rows("kvm_pio")
    port, size, way, count = (table.field("kvm_pio", name).astype(np.int64) for name in ("port", "size", "rw", "count"))
    found: Rows = rows[among(port, PIC_PORTS) & (size == 1) & (way == 1) & (count == 1)]
    return found[found >= excerpt.whole.n_parked]


def _values(excerpt: Excerpt, name: str, rows: Rows) -> Numbers:
    table = excerpt.whole.table
    column: Numbers = table.field("kvm_pio", name).take(table.position_in_kind[rows]).astype(np.int64)
    return column


def _writes_as_events(excerpt: Excerpt, rows: Rows) -> list[Event]:
    port, value = _values(excerpt, "port", rows), _values(excerpt, "val", rows) & 0xFF
    what = np.where(port & 1, _DATA, _COMMAND)
    return list(zip(rows.tolist(), what.tolist(), (port & ~1 != MASTER_PORT).tolist(), value.tolist(), strict=True))


def _injections(excerpt: Excerpt, marks: Rows, bases: Numbers | None) -> list[Event]:
    """Return fresh injections of any vCPU, the first of each vector between two of the other events (`marks`)."""
    whole = excerpt.whole
    at = np.flatnonzero(whole.cls == CLASS["inject interrupt"])
    at = at[whole.row[at] >= whole.n_parked]
    fresh = (whole.values("kvm_inj_virq", "reinjected", at) == 0) & (whole.values("kvm_inj_virq", "soft", at) == 0)
    at = at[fresh]
    vector = whole.values("kvm_inj_virq", "vector", at).astype(np.int64) & 0xFF
    if bases is not None:
        mine = within(vector & BASE_MASK, bases)
        at, vector = at[mine], vector[mine]
    _, first = np.unique(np.searchsorted(marks, whole.row[at]) << 8 | vector, return_index=True)
    rows = whole.row[at[first]].tolist()
    return [(row, _TAKEN, 0, one) for row, one in zip(rows, vector[first].tolist(), strict=True)]


def _lines(log: InterruptLog, lines: Rows) -> list[Event]:
    """Return the changes of the PICs' lines; of masked ones that go on alike, the first and the last."""
    pin = log.values("kvm_pic_set_irq", "pin", lines) & (N_PINS - 1)
    number = (log.values("kvm_pic_set_irq", "chip", lines) & 1) * N_PINS + pin
    before = log.before[lines]
    told = log.is_kind(before, "kvm_set_irq") & log.whole(before, lines)
    value = np.where(told, _TOLD, 0)
    cause = before[told]
    value[told] |= np.where(log.values("kvm_set_irq", "level", cause) != 0, _UP, 0)
    value[told] |= (log.values("kvm_set_irq", "irq_source_id", cause) & 0xFFFF) << _SOURCE
    value |= np.where(log.values("kvm_pic_set_irq", "elcr", lines) >> pin & 1, _LEVEL_TRIGGERED, 0)
    value |= np.where(log.values("kvm_pic_set_irq", "imr", lines) >> pin & 1, _MASKED, 0)
    value |= np.where(log.values("kvm_pic_set_irq", "coalesced", lines) != 0, _COALESCED, 0)
    if not len(lines):
        return []
    order = np.lexsort((log.row[lines], number))
    row, number, value = log.row[lines[order]], number[order], value[order]
    # what tells nothing new: masked, as the one before and the one behind, whatever the level
    follows = (number[1:] == number[:-1]) & (value[1:] | _UP == value[:-1] | _UP) & (value[1:] & _MASKED != 0)
    inner = np.append(False, follows) & np.append(follows, False)
    row, number, value = row[~inner], number[~inner], value[~inner]
    return list(zip(row.tolist(), [_LINE] * len(row), number.tolist(), value.tolist(), strict=True))


def _by_non_specific(log: InterruptLog, acks: Rows, writes: Rows, excerpt: Excerpt) -> Numbers:
    """Say which pins are told of an end that the guest wrote to their chip without naming them."""
    before = log.before[acks]
    cause = np.where(log.is_kind(before, "kvm_pio"), log.row[before] if len(log.row) else before, NONE)
    at = np.minimum(np.searchsorted(writes, cause), max(len(writes) - 1, 0))
    found = np.zeros(len(acks), np.int64)
    if not len(writes):
        return found
    port, value = _values(excerpt, "port", writes)[at], _values(excerpt, "val", writes)[at] & 0xFF
    own = (port == MASTER_PORT) == (log.values("kvm_ack_irq", "irqchip", acks) == MASTER_ACK)
    ends = among(value >> 5, NON_SPECIFIC_EOIS) & (value & (INITIALIZE | OTHER_COMMAND) == 0) & (port & 1 == 0)
    found[(cause >= 0) & (writes[at] == cause) & own & ends] = _NON_SPECIFIC
    return found


def pics(excerpt: Excerpt) -> Pics:
    """Return what following the PICs through an excerpt found."""
    memory = excerpt.remember("PICs", Pics)
    excerpt.once("PICs", memory.add)
    return memory
