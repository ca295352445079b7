"""Predicted and recorded events of a bundled guest, side by side, every difference marked.

    from kvmtrace.predict.align_recording import replay_recording

    replay = replay_recording(open_recording("lifecycle.dat"))
    print(render_replay(replayed(replay)))

The prediction (`model.prediction`) knows nothing of the recording but its capabilities. Asynchronous events
(`alignment_observed`) and events that no prediction speaks of are no differences.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from kvmtrace.isa.registry import BY_NUMBER, run_functions
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.predict.observed import Observed, observe
from kvmtrace.predict.story import PREDICTABLE, Prediction, Step, describe_step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtrace.table.event_table import EventTable

MATCHED, DIFFERS, MISSING, UNEXPECTED = "matched", "differs", "missing", "unexpected"
ASYNCHRONOUS, ABSENT = "asynchronous", "absent"
DIFFERENCES = frozenset({DIFFERS, MISSING, UNEXPECTED})
LOOK_AHEAD = 40  # events on either side that may be skipped to find the thread again
AGREE = 3  # so many steps in a row have to match there
_FAULTS = frozenset({"kvm_page_fault", "kvm_guest_fault"})
_OF_A_WAIT = frozenset({"kvm_wfx_arm64", "kvm_vcpu_wakeup"})
_PROBES = frozenset({*run_functions(), *run_functions("_return")})


@dataclass(frozen=True, slots=True)
class AlignedStep:
    """One line of an alignment; its words are made when somebody reads them.

    Parameters
    ----------
    outcome : "matched"; "differs" (a field); "missing" (predicted, not recorded); "unexpected" (recorded, not
        predicted); "asynchronous" (recorded, the host's doing); "absent" (predicted as depending on timing,
        not recorded)
    step : the predicted event, None if none
    item : the recorded event, None if none
    note : which fields differ, or why it is asynchronous, or what the step is for
    """

    outcome: str
    step: Step | None
    item: Observed | None
    note: str = ""

    @property
    def address(self) -> int | None:
        """Linear address of the instruction that it belongs to."""
        return self.step.address if self.step is not None else None

    @property
    def text(self) -> str:
        """That instruction, "" where none is predicted."""
        return self.step.text if self.step is not None else ""

    @property
    def predicted(self) -> str:
        """The predicted event in words."""
        return describe_step(self.step, why=False) if self.step is not None else ""

    @property
    def observed(self) -> str:
        """The recorded event in words: the fields that were predicted, or those worth showing."""
        names = tuple(expected.name for expected in self.step.fields) if self.step is not None else ()
        return self.item.describe(names) if self.item is not None else ""

    @property
    def row(self) -> int | None:
        """The recorded event's row of the event table."""
        return self.item.row if self.item is not None else None

    @property
    def ts_ns(self) -> int | None:
        """The recorded event's time stamp."""
        return self.item.ts_ns if self.item is not None else None


@dataclass(frozen=True)
class Alignment:
    """A vCPU's prediction beside its recording.

    Parameters
    ----------
    vcpu_id, tid : the vCPU and its thread
    n_steps : predicted steps, those that were absent because of timing left out
    n_matched : steps whose event and fields were recorded as predicted
    n_asynchronous : recorded events that the host caused
    steps : all lines, in order
    """

    vcpu_id: int
    tid: int
    n_steps: int
    n_matched: int
    n_asynchronous: int
    steps: tuple[AlignedStep, ...]

    @property
    def differences(self) -> tuple[AlignedStep, ...]:
        """The lines that disagree."""
        return tuple(step for step in self.steps if step.outcome in DIFFERENCES)


@dataclass(frozen=True)
class Replay:
    """The report document's `replay`: a bundled guest, predicted and recorded.

    Parameters
    ----------
    guest, arguments, isa : what was predicted
    events : the event names that prediction and recording have in common
    n_steps, n_matched : sums over the vCPUs
    n_lost : events the recorder lost (None: unknown how many); differences may be theirs
    vcpus : one Alignment per vCPU
    """

    guest: str
    arguments: dict[str, int]
    isa: str
    events: tuple[str, ...]
    n_steps: int
    n_matched: int
    n_lost: int | None
    vcpus: tuple[Alignment, ...] = field(default=())

    @property
    def differences(self) -> tuple[AlignedStep, ...]:
        """The lines of all vCPUs that disagree."""
        return tuple(step for vcpu in self.vcpus for step in vcpu.differences)


def align(prediction: Prediction, events: EventTable, tid: int, recorded: frozenset[str] = PREDICTABLE) -> Alignment:
    """Align a vCPU's prediction with the events of its thread.

    Parameters
    ----------
    prediction : made with the facts of this recording
    events : EventTable; other threads' rows are ignored
    tid : the vCPU's thread
    recorded : events to look at: those the prediction was made for
    """
    walk = _Walk(prediction, observe(events, tid, recorded & PREDICTABLE))
    walk.run()
    outcomes = [line.outcome for line in walk.lines]
    n_steps = sum(outcome in {MATCHED, DIFFERS, MISSING} for outcome in outcomes)
    return Alignment(
        prediction.vcpu_id, tid, n_steps, outcomes.count(MATCHED), outcomes.count(ASYNCHRONOUS), tuple(walk.lines)
    )


class _Walk:
    """Two fingers, one on the prediction and one on the recording."""

    def __init__(self, prediction: Prediction, items: Sequence[Observed]) -> None:
        self.vcpu_id = prediction.vcpu_id
        self.steps = prediction.steps
        self.items = items
        self.at = 0  # next predicted step
        self.here = 0  # next recorded event
        self.lines: list[AlignedStep] = []
        self.mapped: set[int] = set()  # pages whose first touch was seen
        self.path: tuple[int, ...] = ()  # where an asynchronous VM-exit may strike now
        self.waited: int | None = None  # RIP of the last exit to wait, where timing decides how often there is one
        self.certain = _certain_steps(prediction.steps)

    def run(self) -> None:
        while self.here < len(self.items) or self.at < len(self.steps):
            if self._take_asynchronous():
                continue
            item = self.items[self.here] if self.here < len(self.items) else None
            step = self.steps[self.at] if self.at < len(self.steps) else None
            if item is not None and step is not None and agrees(step, item):
                self._match(step, item)
            elif step is not None and step.optional:
                self._absent(1 + step.goes_with)
            elif item is None and step is not None:
                self._missing(step)
            elif item is not None and not self._take_incidental(item):
                self._find_again()

    def _take_asynchronous(self) -> bool:
        if self.here >= len(self.items) or not self.items[self.here].asynchronous:
            return False
        item = self.items[self.here]
        self.here += 1
        rip = item.number("guest_rip") if item.event == "kvm_exit" else -1
        if rip >= 0 and self.path and rip not in self.path:
            self.lines.append(AlignedStep(UNEXPECTED, None, item, f"the guest cannot be at {rip:#x} here"))
        else:
            self.lines.append(AlignedStep(ASYNCHRONOUS, None, item, item.asynchronous))
        return True

    def _absent(self, n_steps: int) -> None:
        for step in self.steps[self.at : self.at + n_steps]:
            self.lines.append(AlignedStep(ABSENT, step, None, step.why))
        self.at += n_steps

    def _take_incidental(self, item: Observed) -> bool:
        """Take an event whose moment, unlike its kind, is the host's choice; False if it is none."""
        why, n_taken = "", 1
        if item.event == "kvm_vcpu_wakeup":
            why = "blocked once more"
        elif item.event == "kvm_apic_accept_irq" and item.number("apicid") == self.vcpu_id:
            why = "an interrupt arrives"
        elif refault := self._refault():
            why, n_taken = "the host had taken the page away", refault
        elif again := self._waits_again():
            why, n_taken = "nothing to wake up for yet: waits once more", again
        for taken in self.items[self.here : self.here + n_taken] if why else ():
            self.lines.append(AlignedStep(ASYNCHRONOUS, None, taken, why))
        self.here += n_taken if why else 0
        return bool(why)

    def _waits_again(self) -> int:
        """Return how many events here are the last wait once more, at the same instruction; 0 if none."""
        left = self.items[self.here]
        if left.event != "kvm_exit" or self.waited is None or left.number("guest_rip") != self.waited:
            return 0
        for index in range(self.here + 1, min(self.here + 4, len(self.items))):
            item = self.items[index]
            if item.event == "kvm_entry":
                return index + 1 - self.here if item.number("rip") == self.waited else 0
            if item.event not in _OF_A_WAIT:
                return 0
        return 0

    def _refault(self) -> int:
        """Return how many events here are a fault on RAM that was mapped before and is mapped again; 0 if none."""
        near = range(self.here, min(self.here + 5, len(self.items)))
        found = [index for index in near if self.items[index].event not in _PROBES][:3]
        kinds = [self.items[index].event for index in found]
        if kinds[::2] != ["kvm_exit", "kvm_entry"] or kinds[1] not in _FAULTS:
            return 0
        left, fault, entered = (self.items[index] for index in found)
        known = fault.number("fault_address") >> 12 in self.mapped
        same = _is_of(left, "second_level_fault", "memory_fault") and left.number("guest_rip") == entered.number("rip")
        return found[-1] + 1 - self.here if known and same else 0

    def _match(self, step: Step, item: Observed) -> None:
        self.lines.append(AlignedStep(MATCHED, step, item, step.why))
        if step.event == "kvm_entry":
            self.path = step.path
        elif step.event == "kvm_exit":
            self.path = ()
            self.waited = item.number("guest_rip") if step.optional and _is_of(item, "halt") else None
        elif step.event in _FAULTS:
            self.mapped.add(item.number("fault_address") >> 12)
        self.at += 1
        self.here += 1

    def _missing(self, step: Step) -> None:
        self.lines.append(AlignedStep(MISSING, step, None, step.why))
        self.at += 1

    def _find_again(self) -> None:
        """Find the nearest place where prediction and recording agree again; mark what lies before it."""
        steps = [index for index in range(self.at, len(self.steps)) if index in self.certain]
        items = [index for index in range(self.here, len(self.items)) if not self.items[index].asynchronous]
        skip_steps, skip_items = self._nearest(steps[: LOOK_AHEAD + AGREE], items[: LOOK_AHEAD + AGREE])
        steps_end = steps[skip_steps] if skip_steps < len(steps) else len(self.steps)
        items_end = items[skip_items] if skip_items < len(items) else len(self.items)
        waiting = [self.steps[index] for index in range(self.at, steps_end) if index in self.certain]
        self._mark(waiting, self.items[self.here : items_end])
        self.at, self.here = steps_end, items_end
        self.path = ()

    def _nearest(self, steps: list[int], items: list[int]) -> tuple[int, int]:
        for distance in range(1, 2 * LOOK_AHEAD):
            # first one skipped on both sides: an event whose fields differ
            pairs = [(a, distance - a) for a in range(distance + 1)]
            for a, b in sorted(pairs, key=lambda pair: abs(pair[0] - pair[1])):
                if a < len(steps) and b < len(items) and self._agree_from(steps[a:], items[b:]):
                    return a, b
        return len(self.steps), len(self.items)

    def _agree_from(self, steps: list[int], items: list[int]) -> bool:
        length = min(AGREE, len(steps), len(items))
        pairs = zip(steps[:length], items[:length], strict=True)
        return length > 0 and all(agrees(self.steps[a], self.items[b]) for a, b in pairs)

    def _mark(self, waiting: list[Step], items: Sequence[Observed]) -> None:
        """Mark a stretch that disagrees: equal events in order as differing, the others as they are."""
        for item in items:
            if item.asynchronous:
                self.lines.append(AlignedStep(ASYNCHRONOUS, None, item, item.asynchronous))
                continue
            ahead = next((n for n, step in enumerate(waiting) if step.event == item.event), None)
            if ahead is None:
                self.lines.append(AlignedStep(UNEXPECTED, None, item, "not predicted"))
                continue
            self.lines += [AlignedStep(MISSING, step, None, step.why) for step in waiting[:ahead]]
            step = waiting[ahead]
            wrong = disagreements(step, item)
            self.lines.append(AlignedStep(DIFFERS if wrong else MATCHED, step, item, wrong or step.why))
            del waiting[: ahead + 1]
        self.lines += [AlignedStep(MISSING, step, None, step.why) for step in waiting]


def _certain_steps(steps: Sequence[Step]) -> frozenset[int]:
    """Return the numbers of the steps that happen whatever the timing."""
    found: list[int] = []
    number = 0
    while number < len(steps):
        if not steps[number].optional:
            found.append(number)
        number += 1 + steps[number].goes_with
    return frozenset(found)


def agrees(step: Step, item: Observed) -> bool:
    """Say whether a recorded event is the predicted one; fields that the recording lacks are not compared."""
    if step.event != item.event:
        return False
    for expected in step.fields:
        value = item.get(expected.name)
        if value is not None and not expected.holds(value):
            return False
    return True


def disagreements(step: Step, item: Observed) -> str:
    """Return the fields that differ, in words; "" if none."""
    wrong = []
    for expected in step.fields:
        value = item.get(expected.name)
        if value is not None and not expected.holds(value):
            wrong.append(expected.name)
    return f"{', '.join(wrong)} differ{'s' if len(wrong) == 1 else ''}" if wrong else ""


def _is_of(item: Observed, *kinds: str) -> bool:
    """Say whether a kvm_exit is of one of these EXIT_KINDS."""
    isa = BY_NUMBER.get(item.number("isa"))
    return isa is not None and item.number("exit_reason") in isa.codes(*kinds)
