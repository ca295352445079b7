"""The PICs of a VM: the vector of each pin, as the guest set it, from a line's edge to the end of its interrupt.

No event names its VM. What one vCPU's thread writes, takes and ends is of one VM for sure: the PICs are that thread's,
and nothing is known of them any more when another one writes to some, too. What is in service is known from what is
injected; a pin that nothing is known of counts as unknown, never as wrong.
Source: kvm_pic_read_irq, pic_intack, pic_set_irq1, pic_ioport_write, kvm_pic_reset (i8259.c)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvmtrace.check.doubts import Doubt
from kvmtrace.check.interrupt_log import NONE
from kvmtrace.check.pic_events import (
    ACK,
    CLOSED,
    COALESCED,
    COMMAND,
    DATA,
    ELSEWHERE,
    FORGET,
    LEFT,
    LEVEL_TRIGGERED,
    LINE,
    MASK,
    MASKED,
    ODD,
    SOURCE,
    TAKEN,
    TOLD,
    UP,
    OpenLines,
    PicEvent,
    pic_events,
)
from kvmtrace.check.routing_changes import Follower
from kvmtrace.check.vcpu_owners import NOBODY, vcpu_owners
from kvmtrace.kvm.pic import (
    AUTO_EOI,
    BASE_MASK,
    CASCADE_PIN,
    FIRST_LAPIC_VECTOR,
    HAS_LAST_WORD,
    INITIALIZE,
    N_PINS,
    SPURIOUS_PIN,
    ends_named_pin,
    ends_some_pin,
    rotates,
)
from kvmtrace.model.nesting import LEVEL_EVENTS
from kvmtrace.model.thresholds import threshold

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt

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
class Chip:
    """What is known of a PIC.

    Parameters
    ----------
    base : vector of its first pin, None if it is not known
    words : how many words of an initialization it waits for
    last_word : ... the last one among them
    automatic : it ends interrupts by itself
    rotated : the order of its pins was changed
    mask : of its pins, None if it is not known
    """

    base: int | None = None
    words: int = 0
    last_word: bool = False
    automatic: bool = False
    rotated: bool = False
    mask: int | None = None
    pins: list[Pin] = field(default_factory=lambda: [Pin() for _ in range(N_PINS)])

    def initialize(self, *, last_word: bool) -> None:
        """Forget what was known: an initialization begins."""
        self.base, self.mask, self.automatic, self.rotated = None, None, False, False
        self.words, self.last_word = 3 if last_word else 2, last_word
        self.pins = [Pin(source=pin.source) for pin in self.pins]


@dataclass
class Pics:
    """The PICs that one thread programs.

    Parameters
    ----------
    owner : tid of the thread, None if there is none yet
    several : threads program PICs that may be the same, or not
    foreign : a chip's mask is another one than its guest wrote: lines may be another VM's
    since_ns : what was lost since then may have changed what is known
    open : the write that is under way, and whether some pin was told of an end by it
    explained : times of edges that an injection behind them explains: clocks of CPUs may differ
    n_judged, n_unknown : ends of interrupts and edges in this excerpt
    wrong, lost_edges : what differs
    """

    chips: tuple[Chip, Chip] = field(default_factory=lambda: (Chip(), Chip()))
    owner: int | None = None
    several: bool = False
    foreign: bool = False
    since_ns: int = 0
    open: tuple[PicEvent, bool] | None = None
    lines: OpenLines = field(default_factory=OpenLines)
    explained: set[int] = field(default_factory=set)
    late: list[tuple[int, int]] = field(default_factory=list)
    n_judged: int = 0
    n_unknown: int = 0
    wrong: list[Doubt] = field(default_factory=list)
    lost_edges: list[Doubt] = field(default_factory=list)
    follower: Follower = field(default_factory=Follower)

    def add(self, excerpt: Excerpt) -> bool:
        """Follow the PICs through an excerpt's new rows."""
        self.n_judged, self.n_unknown, self.wrong, self.lost_edges = 0, 0, [], []
        if self.follower.missed_some(excerpt):
            self._forget()
            self.lines.of_lane.clear()
        bases = [chip.base for chip in self.chips if chip.base is not None]
        if any(chip.words for chip in self.chips):
            bases.append(0)
        writer = self.open[0].tid if self.open is not None else None
        vcpu_of, times = vcpu_owners(excerpt).vcpu_of, excerpt.whole.table.ts_ns
        for event in pic_events(excerpt, bases, writer, self.lines):
            self._take(event, int(times[event.row]), vcpu_of)
        if self.owner is not None:
            self.several |= vcpu_of.get(self.owner) == NOBODY or excerpt.whole.tids.tolist().count(self.owner) > 1
        return True

    def holds(self, excerpt: Excerpt) -> bool:
        """Say whether what differs was of one VM, and not of a nested guest."""
        return not self.several and excerpt.capability.seen.isdisjoint(LEVEL_EVENTS)

    def edges_hold(self, excerpt: Excerpt) -> bool:
        """Say whether the lines were of the thread's VM, too."""
        return self.holds(excerpt) and not self.foreign and not vcpu_owners(excerpt).ambiguous

    def _forget(self) -> None:
        self.chips = Chip(), Chip()
        self.open = None

    def _take(self, event: PicEvent, at_ns: int, vcpu_of: dict[int, int]) -> None:
        what = event.what
        if what == FORGET:
            self._forget()
        elif what in (COMMAND, DATA, ODD, ACK):
            self._meet(event.tid, vcpu_of)
            if self.several:
                self.n_unknown += what == ACK
            elif what == ACK:
                self._end(event.about, event.row, at_ns)
            else:
                self._begin_write(event, at_ns)
        elif what == LINE:
            self._change(event, at_ns)
        elif event.tid != self.owner:
            self._take_elsewhere(event, at_ns)
        elif what == LEFT:
            self._forget()  # userspace has the PICs, perhaps
        elif what in (CLOSED, TAKEN, ELSEWHERE):
            self._end_write(at_ns)
            if what == TAKEN:
                self._inject(event, at_ns)

    def _meet(self, tid: int, vcpu_of: dict[int, int]) -> None:
        """Take note of who writes: another thread with the vCPU of the one before is another VM's."""
        if self.owner in (None, tid):
            self.owner = tid
            return
        mine, other = vcpu_of.get(self.owner or 0, NOBODY), vcpu_of.get(tid, NOBODY)
        self.several |= mine == NOBODY or mine != other
        self.owner = tid
        self._forget()

    def _begin_write(self, event: PicEvent, at_ns: int) -> None:
        self._end_write(at_ns)
        chip = self.chips[event.about]
        if event.what == ODD:
            self._forget()
            return
        self.open = event, False
        if event.what == COMMAND and event.value & INITIALIZE:
            if self.since_ns == 0 or all(one.base is None for one in self.chips):
                self.since_ns = at_ns
            chip.initialize(last_word=bool(event.value & HAS_LAST_WORD))
        elif event.what == DATA and not chip.words:
            chip.mask = None
        chip.rotated |= event.what == COMMAND and rotates(event.value)

    def _end_write(self, at_ns: int) -> None:
        """Take what the write that was under way did: KVM handled it."""
        if self.open is None:
            return
        (event, told), self.open = self.open, None
        what, value, chip = event.what, event.value, self.chips[event.about]
        if what == DATA:
            self._take_word(chip, value)
        elif value & INITIALIZE:
            chip.initialize(last_word=bool(value & HAS_LAST_WORD))
            chip.mask = 0
        elif (ends_some_pin(value) or ends_named_pin(value)) and not told and chip.base is not None:
            certain = [i for i, pin in enumerate(chip.pins) if pin.certain]
            self.n_judged += bool(certain)
            if certain and (ends_some_pin(value) or value & SPURIOUS_PIN in certain):
                number = value & SPURIOUS_PIN if ends_named_pin(value) else certain[0]
                words = f"pin {number} of the PICs, which is in service, told that its interrupt ended"
                self._differ(event.row, at_ns, words, "no pin is told")
                chip.pins[number].certain = False

    def _take_word(self, chip: Chip, value: int) -> None:
        """Take a word of an initialization: vector base, wiring, modes; else it is a mask."""
        left = chip.words
        if not left:
            chip.mask = value
            return
        if left == 2 + chip.last_word:
            chip.base = value & BASE_MASK
        elif left == 1 and chip.last_word:
            chip.automatic = bool(value & AUTO_EOI)
        chip.words = left - 1

    def _inject(self, event: PicEvent, at_ns: int) -> None:
        """Take a fresh injection by the thread: of a pin whose vector it is, if it is not a LAPIC's."""
        for first, chip in enumerate(self.chips):
            if chip.base is None or event.value & BASE_MASK != chip.base:
                continue
            self._serve(first * N_PINS + event.value - chip.base, at_ns)
            if first:
                self._serve(CASCADE_PIN, at_ns)
            elif event.value < FIRST_LAPIC_VECTOR:
                self._take_for_sure(event.value - chip.base, event, at_ns)

    def _take_for_sure(self, number: int, event: PicEvent, at_ns: int) -> None:
        """Take an injection that no LAPIC can have asked for: of a pin that is not masked, or of none at all."""
        chip = self.chips[0]
        if number == SPURIOUS_PIN:
            return
        chip.pins[number].certain = not chip.automatic
        if chip.mask is not None:
            self.n_judged += 1
            if chip.mask >> number & 1:
                words = f"nothing of pin {number} of the PICs, which is masked"
                self._differ(event.row, at_ns, words, f"its vector {event.value:#x} injected")

    def _take_elsewhere(self, event: PicEvent, at_ns: int) -> None:
        """Take an injection by another thread: of the same VM, or not."""
        for number in range(2 * N_PINS):
            chip = self.chips[number // N_PINS]
            if event.what == TAKEN and chip.base == event.value & BASE_MASK:
                self._serve(number, at_ns)
            self._clear_edges(number, at_ns)

    def _serve(self, number: int, at_ns: int) -> None:
        self._pin(number).in_service = True
        self._clear_edges(number, at_ns)

    def _clear_edges(self, number: int, at_ns: int) -> None:
        self._pin(number).edges.clear()
        for one in [one for one in self.late if one[0] == number]:
            self.late.remove(one)
            if at_ns - one[1] < threshold("clocks_differ"):
                self.explained.add(one[1])

    def _pin(self, number: int) -> Pin:
        return self.chips[number // N_PINS].pins[number % N_PINS]

    def _end(self, number: int, row: int, at_ns: int) -> None:
        """Take the end of a pin's interrupt: the one that a write names, or only one in service."""
        pin = self._pin(number)
        write, told = self.open or (None, False)
        if write is None or write.what != COMMAND or not (ends_some_pin(write.value) or ends_named_pin(write.value)):
            self.n_unknown += 1
        elif told or write.about != number // N_PINS:
            self.n_judged += 1
            expected = "one pin of the PIC that was written to told that its interrupt ended"
            self._differ(row, at_ns, expected, f"pin {number} is, too")
        elif ends_named_pin(write.value):
            self.n_judged += 1
            if write.value & SPURIOUS_PIN != number % N_PINS:
                named = write.about * N_PINS + (write.value & SPURIOUS_PIN)
                self._differ(row, at_ns, f"pin {named} of the PICs told that its interrupt ended", f"pin {number}")
        else:
            self._end_some(number, row, at_ns)
        if write is not None:
            self.open = write, True
        # read in place of an acknowledgement (poll), a pin's request ends, too
        pin.in_service, pin.certain = False, False
        self._clear_edges(number, at_ns)

    def _end_some(self, number: int, row: int, at_ns: int) -> None:
        pin, chip = self._pin(number), self.chips[number // N_PINS]
        highest = next((i for i, one in enumerate(chip.pins) if one.certain), N_PINS)
        if highest < number % N_PINS and not chip.rotated:
            self.n_judged += 1
            expected = f"pin {number - number % N_PINS + highest} of the PICs, the highest in service, told of its end"
            self._differ(row, at_ns, expected, f"pin {number}")
            return
        known = pin.in_service is not None and chip.base is not None and not chip.automatic
        # another chip's vectors raise this pin
        known &= number != CASCADE_PIN or self.chips[1].base is not None
        self.n_judged += known
        self.n_unknown += not known
        if known and not pin.in_service:
            vector = (chip.base or 0) + number % N_PINS
            words = f"pin {number} of the PICs in service: vector {vector:#x} injected before its end"
            self._differ(row, at_ns, words, "it ends, and was not injected")

    def _change(self, event: PicEvent, at_ns: int) -> None:
        """Take a line's change: of three edges that were requests each, one was taken meanwhile."""
        number, value = event.about, event.value
        chip, pin = self.chips[number // N_PINS], self._pin(number)
        told, source, before = bool(value & TOLD), value >> SOURCE, pin.level
        self.foreign |= self.open is None and chip.mask is not None and value >> MASK & 0xFF != chip.mask
        pin.source = source if told and pin.source in (NONE, source) else _SEVERAL
        pin.level = value & UP if told else NONE
        if value & (LEVEL_TRIGGERED | MASKED | COALESCED) or not told or not pin.level:
            return
        if pin.source == _SEVERAL or before == NONE or chip.base is None or chip.automatic or self.open is not None:
            pin.edges.clear()
            self.n_unknown += 1
            return
        self.n_judged += 1
        if before:
            return
        pin.edges.append(at_ns)
        if len(pin.edges) > _MERGED:
            vector = chip.base + number % N_PINS
            expected = f"vector {vector:#x} injected: pin {number} of the PICs rose three times, each a new request"
            self.lost_edges.append(Doubt(event.row, min(self.since_ns, pin.edges[0]), at_ns, expected, "it was not"))
            self.late.append((number, at_ns))
            pin.edges.clear()

    def _differ(self, row: int, at_ns: int, expected: str, observed: str) -> None:
        self.wrong.append(Doubt(row, self.since_ns, at_ns, expected, observed))


def pics(excerpt: Excerpt) -> Pics:
    """Return what following the PICs through an excerpt found."""
    memory = excerpt.remember("PICs", Pics)
    excerpt.once("PICs", memory.add)
    return memory
