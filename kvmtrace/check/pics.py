"""The PICs: the vector of each pin, as the guest set it, from a line's edge to the end of its interrupt.

What is in service is known from what is injected: the vector base comes from the guest's own OUTs. A pin that nothing
is known of counts as unknown, never as wrong.
Source: kvm_pic_read_irq, pic_intack, pic_set_irq1, pic_ioport_write (i8259.c)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.doubts import Doubt
from kvmtrace.check.interrupt_log import NONE
from kvmtrace.check.pending_interrupts import NEVER, pending_interrupts
from kvmtrace.check.pic_events import (
    ACK,
    COALESCED,
    COMMAND,
    DATA,
    ENDED,
    LEVEL_TRIGGERED,
    LINE,
    MASKED,
    NON_SPECIFIC,
    SOURCE,
    TAKEN,
    TOLD,
    UP,
    PicEvent,
    ends_some_pin,
    pic_events,
)
from kvmtrace.check.routing_changes import known_senders
from kvmtrace.check.vcpu_owners import vcpu_owners
from kvmtrace.kvm.pic import (
    AUTO_EOI,
    BASE_MASK,
    CASCADE_PIN,
    FIRST_LAPIC_VECTOR,
    HAS_LAST_WORD,
    INITIALIZE,
    N_PINS,
    SPURIOUS_PIN,
)
from kvmtrace.model.nesting import LEVEL_EVENTS
from kvmtrace.model.thresholds import threshold

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

    Numbers = NDArray[np.int64]

_SEVERAL = -2
_MERGED = 2  # so many edges may have been requests before the first one's injection is traced


@dataclass
class Pin:
    """What is known of a pin; its number counts on from the master's to the slave's.

    Parameters
    ----------
    in_service : it may be; None if nothing is known
    certain : it is in service for sure
    level : of its line, NONE if that is not known
    source : who drives it, NONE if nobody did, _SEVERAL if several do
    edges : times of its rises that were requests of their own, since its vector was taken last
    """

    in_service: bool | None = None
    certain: bool = False
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
    masks : of each chip, as a thread wrote it; None if that is not known
    in_kernel : KVM has the PICs, not userspace
    n_judged, n_unknown : ends of interrupts and edges in this excerpt
    wrong : what differs
    """

    base: list[int | None] = field(default_factory=lambda: [None, None])
    words: list[int] = field(default_factory=lambda: [0, 0])
    last_word: list[bool] = field(default_factory=lambda: [False, False])
    automatic: list[bool] = field(default_factory=lambda: [False, False])
    masks: list[tuple[int, int] | None] = field(default_factory=lambda: [None, None])
    in_kernel: bool = False
    accepted_ns: Numbers = field(default_factory=lambda: np.zeros(256, np.int64))
    pins: list[Pin] = field(default_factory=lambda: [Pin() for _ in range(2 * N_PINS)])
    began: bool = False
    taken_ns: list[int] = field(default_factory=lambda: [0] * (2 * N_PINS))
    n_judged: int = 0
    n_unknown: int = 0
    wrong: list[Doubt] = field(default_factory=list)

    def add(self, excerpt: Excerpt) -> bool:
        """Follow the PICs through an excerpt's new rows."""
        self.n_judged, self.n_unknown, self.wrong = 0, 0, []
        events = pic_events(excerpt, self.base)
        seen = excerpt.capability.seen
        if vcpu_owners(excerpt).ambiguous or not seen.isdisjoint(LEVEL_EVENTS):
            self._forget(created=False)
            self.n_unknown = sum(event.what in (ACK, LINE) for event in events)
            return True
        if not self.began and known_senders(excerpt).created:
            self._forget(created=True)
        self.began = self.began or bool(events)
        self.accepted_ns = pending_interrupts(excerpt).accepted_ns
        times = excerpt.whole.table.ts_ns
        for event in events:
            self._take(event, int(times[event.row]))
        self._withdraw(events, times)
        return True

    def _forget(self, *, created: bool) -> None:
        self.base, self.words, self.masks = [None, None], [0, 0], [None, None]
        for pin in self.pins:
            pin.in_service, pin.certain = False if created else None, False
            pin.edges.clear()
            pin.level, pin.source = NONE, NONE

    def _take(self, event: PicEvent, at_ns: int) -> None:
        row, what, about, value, tid = event
        if what == COMMAND:
            self._command(about, value, event, at_ns)
        elif what == DATA:
            self._data(about, value & 0xFF, tid)
        elif what == TAKEN:
            self._inject(value, event, at_ns)
        elif what == LINE:
            self.in_kernel = True
            self._change(about, value, row, at_ns)
        elif what == ACK:
            self._end(about, value, row, at_ns)
        else:
            self._forget(created=False)

    def _command(self, chip: int, value: int, event: PicEvent, at_ns: int) -> None:
        """Take a command; an initialization forgets what edges asked for."""
        pins = self.pins[chip * N_PINS : (chip + 1) * N_PINS]
        if value & INITIALIZE:
            self.words[chip], self.last_word[chip] = 3 if value & HAS_LAST_WORD else 2, bool(value & HAS_LAST_WORD)
            self.base[chip], self.automatic[chip], self.masks[chip] = None, False, (0, event.tid)
            for pin in pins:
                pin.edges.clear()
                pin.certain = False
        elif ends_some_pin(value) and any(pin.certain for pin in pins):
            self.n_judged += 1
            if not value & ENDED:
                number = chip * N_PINS + next(i for i, pin in enumerate(pins) if pin.certain)
                words = f"pin {number} of the PICs, which is in service, told that its interrupt ended"
                self.wrong.append(Doubt(event.row, self.taken_ns[number], at_ns, words, "no pin is told"))
                self.pins[number].certain = False

    def _data(self, chip: int, value: int, tid: int) -> None:
        """Take a word of an initialization: vector base, wiring, modes; else it is a mask."""
        left = self.words[chip]
        if not left:
            self.masks[chip] = value, tid
            return
        if left == 2 + self.last_word[chip]:
            self.base[chip] = value & BASE_MASK
        elif left == 1 and self.last_word[chip]:
            self.automatic[chip] = bool(value & AUTO_EOI)
        self.words[chip] = left - 1

    def _inject(self, vector: int, event: PicEvent, at_ns: int) -> None:
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
                elif vector < FIRST_LAPIC_VECTOR and self.accepted_ns[vector] == NEVER and self.in_kernel:
                    self._take_for_sure(vector - base, event, at_ns)

    def _take_for_sure(self, number: int, event: PicEvent, at_ns: int) -> None:
        """Take an injection that no LAPIC can have asked for: of a pin that is not masked, or of none at all."""
        if number == SPURIOUS_PIN or self.automatic[0]:
            return
        self.pins[number].certain = True
        mask, tid = self.masks[0] or (0, -1)
        if tid == event.tid:
            self.n_judged += 1
            if mask >> number & 1:
                words = f"nothing of pin {number} of the PICs, which is masked"
                self.wrong.append(Doubt(event.row, 0, at_ns, words, f"its vector {event.value:#x} injected"))

    def _serve(self, number: int, at_ns: int) -> None:
        self.pins[number].in_service = True
        self.pins[number].edges.clear()
        self.taken_ns[number] = at_ns

    def _end(self, number: int, value: int, row: int, at_ns: int) -> None:
        """Take the end of a pin's interrupt: only one in service ends without being named."""
        pin, chip = self.pins[number], number // N_PINS
        known = value == NON_SPECIFIC and pin.in_service is not None and not self.automatic[chip]
        known &= self.base[chip] is not None
        self.n_judged += known
        self.n_unknown += not known
        if known and not pin.in_service:
            base = self.base[chip] or 0
            words = f"pin {number} of the PICs in service: vector {base + number % N_PINS:#x} injected before its end"
            self.wrong.append(Doubt(row, self.taken_ns[number], at_ns, words, "it ends, and was not injected"))
        # read in place of an acknowledgement (poll), a pin's request ends, too
        pin.in_service, pin.certain = False, False
        pin.edges.clear()

    def _change(self, number: int, value: int, row: int, at_ns: int) -> None:
        """Take a line's change: of three edges that were requests each, one was taken meanwhile."""
        pin, before = self.pins[number], self.pins[number].level
        told = bool(value & TOLD)
        source = value >> SOURCE
        if told and pin.source in (NONE, source):
            pin.source = source
        else:
            pin.source = _SEVERAL
        pin.level = value & UP if told else NONE
        chip = number // N_PINS
        if value & (LEVEL_TRIGGERED | MASKED | COALESCED) or not told or not pin.level:
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

    def _withdraw(self, events: list[PicEvent], times: Numbers) -> None:
        """Take back what an injection that is traced just behind explains: clocks of CPUs may differ."""
        taken = np.array([times[event.row] for event in events if event.what == TAKEN], np.int64)
        if not self.wrong or not len(taken):
            return
        until = np.array([one.until_ns for one in self.wrong], np.int64)
        behind = np.append(taken, 1 << 62)[np.searchsorted(taken, until, "right")]
        near = behind - until < threshold("clocks_differ")
        self.wrong = [one for one, explained in zip(self.wrong, near.tolist(), strict=True) if not explained]


def pics(excerpt: Excerpt) -> Pics:
    """Return what following the PICs through an excerpt found."""
    memory = excerpt.remember("PICs", Pics)
    excerpt.once("PICs", memory.add)
    return memory
