"""Alignment: faults put into a clean sequence are found, the host's doings are not taken for faults."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from kvmtrace.predict.align import DIFFERENCES, align
from kvmtrace.predict.align_recording import facts_of, find_guest, replay_events, vcpu_threads
from kvmtrace.predict.guest_prediction import predict
from kvmtrace.predict.replayed import replayed
from kvmtrace.predict.story import PREDICTABLE, Facts, Prediction, Step
from kvmtrace.render.text.replay_text import describe_replay, render_replay
from kvmtrace.report.json_document import dump
from kvmtrace.table.event_table import COMMON_DTYPES, TRACE_FLAG_HARDIRQ, TRACE_FLAG_IRQS_OFF, EventKind, EventTable
from kvmtrace.table.payload import ColumnPayload
from kvmtrace.table.recording import Capture
from kvmtrace.workload import GUESTS

EXTINT, WINDOW, EPT_VIOLATION = 1, 7, 48
# fields that the alignment reads although no prediction may name them
ALWAYS = {
    "kvm_exit": ("intr_info", "isa"),
    "kvm_inj_virq": ("reinjected",),
    "kvm_apic_accept_irq": ("apicid", "vec"),
    "kvm_vcpu_wakeup": ("ns", "waited"),
}


@dataclass(frozen=True)
class Event:
    """One event to write: kind and fields; bytes for kvm_emulate_insn's insn."""

    kind: str
    fields: dict[str, int | bytes] = field(default_factory=dict)
    tid: int = 100
    irq_flags: int = 0

    def but(self, **changes: int) -> Event:
        return replace(self, fields={**self.fields, **changes})


def as_events(prediction: Prediction) -> list[Event]:
    """Write a prediction down as if it had happened, optional steps left out."""
    return [
        Event(
            step.event,
            {item.name: item.value for item in step.fields},
            100 + prediction.vcpu_id,
            TRACE_FLAG_IRQS_OFF if step.event in {"kvm_entry", "kvm_exit"} else 0,
        )
        for step in prediction.steps
        if not step.optional
    ]


def column(values: list[int | bytes]) -> np.ndarray:
    if any(isinstance(value, bytes) for value in values):
        padded = b"".join((value if isinstance(value, bytes) else b"").ljust(15, b"\0") for value in values)
        return np.frombuffer(padded, np.uint8).reshape(len(values), 15)
    return np.array(values, np.int64)


def table(events: list[Event]) -> EventTable:
    names = sorted({event.kind for event in events} | PREDICTABLE)
    fields = {name: set(ALWAYS.get(name, ())) for name in names}
    for event in events:
        fields[event.kind] |= set(event.fields)
    columns = {name: np.zeros(len(events), dtype) for name, dtype in COMMON_DTYPES.items()}
    columns["ts_ns"] = np.arange(len(events), dtype=np.int64) * 10
    columns["tid"] = np.array([event.tid for event in events], np.int32)
    columns["irq_flags"] = np.array([event.irq_flags for event in events], np.uint8)
    columns["kind"] = np.array([names.index(event.kind) for event in events], np.uint16)
    kinds, payloads = [], {}
    for index, name in enumerate(names):
        own = [event for event in events if event.kind == name]
        made = {each: column([event.fields.get(each, 0) for event in own]) for each in sorted(fields[name])}
        kinds.append(EventKind(name, "kvm", {each: values.dtype for each, values in made.items()}))
        if own:
            payloads[index] = ColumnPayload(made)
    return EventTable(columns, kinds, payloads)


def predicted(name: str, isa: str = "vmx", **arguments: int) -> tuple[Prediction, ...]:
    guest = GUESTS[name]
    return predict(guest, {each.name: each.default for each in guest.arguments} | arguments, Facts(isa))


def outcomes(prediction: Prediction, events: list[Event]) -> list[str]:
    aligned = align(prediction, table(events), 100 + prediction.vcpu_id)
    return [step.outcome for step in aligned.steps]


SMALL = {
    "lifecycle": {"count": 1},
    "interrupt": {"count": 3},
    "smp": {"count": 2},
    "mmio-split": {"count": 1},
    "string-io": {"count": 1},
    "triple-fault": {"count": 2},
    "msr-gp": {"count": 2},
    "nested": {"count": 2},
}


def on_isas(*names: str) -> list[tuple[str, str]]:
    return [(name, isa) for name in names for isa in ("vmx", "svm", "pvm") if isa not in GUESTS[name].refused]


@pytest.mark.parametrize(("name", "isa"), on_isas(*SMALL))
def test_what_happened_as_predicted_matches(name: str, isa: str) -> None:
    for prediction in predicted(name, isa, **SMALL[name]):
        events = as_events(prediction)
        aligned = align(prediction, table(events), 100 + prediction.vcpu_id)
        assert aligned.differences == ()
        assert aligned.n_matched == aligned.n_steps == len(events)


def mutations(events: list[Event]) -> list[tuple[str, list[Event]]]:
    """Return every sequence with one event dropped, doubled, swapped with the next, or one field altered."""
    made = []
    for n, event in enumerate(events):
        made.append((f"drop {n} {event.kind}", events[:n] + events[n + 1 :]))
        made.append((f"double {n} {event.kind}", events[: n + 1] + events[n:]))
        if n + 1 < len(events) and events[n + 1].kind != event.kind:
            made.append((f"swap {n} {event.kind}", [*events[:n], events[n + 1], event, *events[n + 2 :]]))
        for name, value in event.fields.items():
            if isinstance(value, int):
                other = [*events[:n], event.but(**{name: value ^ 4}), *events[n + 1 :]]
                made.append((f"alter {n} {event.kind}.{name}", other))
    return made


@pytest.mark.parametrize(("name", "isa"), on_isas("triple-fault", "msr-gp", "interrupt", "mmio-split", "nested"))
def test_every_single_fault_is_found(name: str, isa: str) -> None:
    (prediction,) = predicted(name, isa, **{**SMALL[name], "count": 1})
    events = as_events(prediction)
    made = mutations(events)
    made = made[:: max(1, len(made) // 600)]
    assert [what for what, wrong in made if not DIFFERENCES & set(outcomes(prediction, wrong))] == []


def test_a_difference_is_marked_where_it_is_and_nowhere_else() -> None:
    (prediction,) = predicted("lifecycle")
    events = as_events(prediction)
    place = next(n for n, event in enumerate(events) if n > 200 and event.kind == "kvm_pio")
    events[place] = events[place].but(port=0x60)
    aligned = align(prediction, table(events), 100)
    (wrong,) = aligned.differences
    assert (wrong.outcome, wrong.note, wrong.row) == ("differs", "port differs", place)
    assert "port=0x3f8" in wrong.predicted
    assert "port=0x60" in wrong.observed
    assert wrong.text == "out dx, al"
    assert aligned.n_matched == aligned.n_steps - 1


def entry(events: list[Event], after: int = 0) -> int:
    return next(n for n, event in enumerate(events) if n > after and event.kind == "kvm_entry")


def bounce(rip: int, reason: int = EXTINT) -> list[Event]:
    """Return an asynchronous exit at `rip` and the entry behind it, with their probes."""
    exit_fields = {"exit_reason": reason, "guest_rip": rip, "isa": 1, "vcpu_id": 0}
    return [
        Event("kvm_exit", exit_fields),
        Event("vmx_vcpu_run_return"),
        Event("vmx_vcpu_run"),
        Event("kvm_entry", {"rip": rip, "vcpu_id": 0}),
    ]


def test_host_interrupts_are_no_differences() -> None:
    (prediction,) = predicted("lifecycle")
    events = as_events(prediction)
    places = [n for n, event in enumerate(events) if event.kind == "kvm_entry"][::3]
    for place in reversed(places):
        steps = [step for step in prediction.steps if not step.optional]
        path = steps[place].path
        events[place + 1 : place + 1] = [*bounce(path[0]), *bounce(path[-1])]
    marks = outcomes(prediction, events)
    assert not DIFFERENCES & set(marks)
    assert marks.count("asynchronous") == 8 * len(places)
    assert marks.count("matched") == len(as_events(prediction))


def test_the_guest_cannot_be_interrupted_where_it_is_not() -> None:
    (prediction,) = predicted("lifecycle")
    events = as_events(prediction)
    place = entry(events, 100)
    events[place + 1 : place + 1] = bounce(0x1055)
    assert outcomes(prediction, events).count("unexpected") == 1


def test_a_signal_is_no_difference() -> None:
    (prediction,) = predicted("lifecycle")
    events = as_events(prediction)
    place = entry(events, 100)
    left = [
        Event("kvm_fpu", {"load": 0}),
        Event("kvm_userspace_exit", {"reason": 10, "errno": -4}),
        Event("kvm_vcpu_ioctl_return", {"ret": -4}),
        Event("sys_exit_ioctl", {"ret": -4}),
        Event("sys_enter_ioctl", {"cmd": 0xAE80}),
        Event("kvm_vcpu_ioctl", {"cmd": 0xAE80}),
        Event("kvm_fpu", {"load": 1}),
    ]
    before = events[:place] if events[place - 1].kind != "vmx_vcpu_run" else events[: place - 1]
    events = before + left + events[len(before) :]
    marks = outcomes(prediction, events)
    assert not DIFFERENCES & set(marks)
    assert marks.count("asynchronous") == len(left)


def test_interrupt_window_before_the_injection() -> None:
    """With the interrupt there already, KVM enters, waits for the window, and injects at the second entry."""
    prediction = predicted("smp", count=2)[1]
    events = as_events(prediction)
    injection = next(n for n, event in enumerate(events) if event.kind == "kvm_inj_virq")
    rip = events[entry(events, injection)].fields["rip"]
    window = [
        Event("vmx_vcpu_run", {}, 101),
        Event("kvm_entry", {"rip": rip, "vcpu_id": 1}, 101),
        Event("kvm_exit", {"exit_reason": WINDOW, "guest_rip": rip, "isa": 1, "vcpu_id": 1}, 101),
        Event("vmx_vcpu_run_return", {}, 101),
    ]
    marks = outcomes(prediction, events[:injection] + window + events[injection:])
    assert not DIFFERENCES & set(marks)
    assert marks.count("asynchronous") == 4


def test_a_cancelled_injection_is_no_difference_but_a_lost_one_is() -> None:
    (prediction,) = predicted("interrupt", count=2)
    events = as_events(prediction)
    place = next(n for n, event in enumerate(events) if event.kind == "kvm_inj_virq")
    again = [events[place], events[place].but(reinjected=1)]
    assert not DIFFERENCES & set(outcomes(prediction, events[:place] + again + events[place + 1 :]))
    assert DIFFERENCES & set(outcomes(prediction, events[:place] + events[place + 1 :]))
    assert DIFFERENCES & set(outcomes(prediction, [*events[:place], events[place], *events[place:]]))


def test_a_delivery_that_the_host_interrupts_is_no_difference() -> None:
    """VM-entry with an injection, EXTERNAL_INTERRUPT before it is delivered, the same injection again."""
    (prediction,) = predicted("interrupt", count=2)
    events = as_events(prediction)
    place = next(n for n, event in enumerate(events) if event.kind == "kvm_inj_virq")
    behind = entry(events, place) + 1
    left, *entered = bounce(int(events[behind - 1].fields["rip"]))
    again = [left, entered[0], events[place].but(reinjected=1), *entered[1:]]
    marks = outcomes(prediction, events[:behind] + again + events[behind:])
    assert not DIFFERENCES & set(marks)
    assert marks.count("asynchronous") == len(again)


def test_blocking_arrivals_and_interrupt_context() -> None:
    (prediction,) = predicted("interrupt", count=2)
    events = as_events(prediction)
    place = next(n for n, event in enumerate(events) if event.kind == "kvm_inj_virq")
    events[place:place] = [
        Event("kvm_vcpu_wakeup", {"ns": 5}),
        Event("kvm_vcpu_wakeup", {"ns": 5}),
        Event("kvm_apic_accept_irq", {"apicid": 0, "vec": 0x20}),
    ]
    events.insert(5, Event("kvm_apic_accept_irq", {"apicid": 7, "vec": 1}, irq_flags=TRACE_FLAG_HARDIRQ))
    marks = outcomes(prediction, events)
    assert not DIFFERENCES & set(marks)
    assert marks.count("asynchronous") == 2  # the first wake-up is a predicted, optional step


def test_a_page_that_the_host_took_away() -> None:
    (prediction,) = predicted("msr-gp", count=2)
    events = as_events(prediction)
    fault = next(n for n, event in enumerate(events) if event.kind == "kvm_page_fault")
    first = events[fault - 2 : fault + 3]
    assert [event.kind for event in first] == [
        "kvm_exit",
        "vmx_vcpu_run_return",
        "kvm_page_fault",
        "vmx_vcpu_run",
        "kvm_entry",
    ]
    assert not DIFFERENCES & set(outcomes(prediction, events[: fault + 3] + first + events[fault + 3 :]))


def test_a_recording_that_ends_early() -> None:
    (prediction,) = predicted("msr-gp", count=2)
    events = as_events(prediction)
    marks = outcomes(prediction, events[:20])
    assert marks[:20] == ["matched"] * 20
    assert marks[20:] == ["missing"] * (len(events) - 20)


CAPTURE = Capture(
    path="x.dat",
    format="kvmtrace-bpf",
    events=tuple(f"kvm:{name}" for name in sorted(PREDICTABLE)),
    meta={
        "target": {"kind": "guest", "guest": "smp", "guest_arguments": {"count": 2}},
        "guest_run": {"isa": "vmx", "vcpu_tids": {"0": 100, "1": 101}},
    },
)


def test_replay_of_two_vcpus() -> None:
    first, second = (as_events(prediction) for prediction in predicted("smp", count=2))
    mixed = [event for pair in zip(first, second, strict=False) for event in pair]
    mixed += first[len(second) :] + second[len(first) :]
    replay = replay_events(CAPTURE, table(mixed))
    assert replay is not None
    assert (replay.guest, replay.arguments, replay.isa) == ("smp", {"count": 2}, "vmx")
    assert replay.n_matched == replay.n_steps == len(mixed)
    assert [vcpu.tid for vcpu in replay.vcpus] == [100, 101]
    document = json.loads(json.dumps(dump(replayed(replay))))
    assert document["differences"] == []
    assert len(document["vcpus"][1]["steps"]) >= len(second)
    assert describe_replay(replayed(replay)) == (
        f"smp on vmx: {len(mixed)} of {len(mixed)} predicted steps recorded, no difference, 0 asynchronous events"
    )


def test_text_shows_the_difference_and_its_surroundings() -> None:
    first, second = (as_events(prediction) for prediction in predicted("smp", count=2))
    place = next(n for n, event in enumerate(second) if event.kind == "kvm_apic_ipi")
    second[place] = second[place].but(dest_id=5)
    replay = replay_events(CAPTURE, table(first + second))
    assert replay is not None
    text = render_replay(replayed(replay))
    assert "1 difference" in text.splitlines()[0]
    assert "   !   predicted kvm_apic_ipi icr_low=0x4021 dest_id=0" in text
    assert "       recorded  kvm_apic_ipi icr_low=0x4021 dest_id=5   (dest_id differs)" in text
    assert "  403e  wrmsr" in text
    assert len(text.splitlines()) < 20
    assert len(render_replay(replayed(replay), everything=True).splitlines()) > len(first + second)
    assert replayed(replay).differences[0].vcpu_id == 1


def test_what_is_not_a_guest_has_no_replay() -> None:
    other = replace(CAPTURE, meta={"target": {"kind": "command"}})
    assert find_guest(other) is None
    assert find_guest(replace(CAPTURE, meta={"guest_run": {"guest": "smp", "arguments": 5}})) is None
    events = table(as_events(predicted("msr-gp", count=1)[0]))
    assert replay_events(other, events) is None
    assert replay_events(CAPTURE, events, max_events=3) is None


def test_facts_come_from_the_recording() -> None:
    silent = replace(CAPTURE, meta={})
    events = as_events(predict(GUESTS["lifecycle"], {"count": 1}, Facts("svm", nrips=False))[0])
    facts = facts_of(silent, table(events))
    assert facts is not None
    assert (facts.isa, facts.nrips, facts.exit_inside_run) == ("svm", False, True)
    late = [replace(event, irq_flags=0) if event.kind == "kvm_exit" else event for event in events]
    facts = facts_of(silent, table(late))
    assert facts is not None
    assert not facts.exit_inside_run
    facts = facts_of(silent, table(as_events(predicted("lifecycle", "svm")[0])))
    assert facts is not None
    assert facts.nrips
    facts = facts_of(silent, table(as_events(predicted("lifecycle", "pvm")[0])))
    assert facts is not None
    assert facts.isa == "pvm"
    assert "kvm_exit" not in facts.events


def test_facts_of_emulated_instructions_whose_exits_are_all_missing() -> None:
    events = as_events(predict(GUESTS["lifecycle"], {"count": 1}, Facts("svm", nrips=False))[0])
    rest = [event for event in events if event.kind != "kvm_exit"]
    assert any(event.kind == "kvm_emulate_insn" for event in rest)
    facts = facts_of(replace(CAPTURE, meta={"guest_run": {"isa": "svm"}}), table(rest))
    assert facts is not None
    assert facts.isa == "svm"


def test_threads_are_found_without_metadata() -> None:
    silent = replace(CAPTURE, meta={})
    first, second = (as_events(prediction) for prediction in predicted("smp", count=2))
    assert vcpu_threads(silent, table(first + second)) == {0: 100, 1: 101}
    renames = [Event("task_rename", {"pid": 31 + n, "newcomm": b"CPU %d/KVM" % n}) for n in range(2)]
    assert vcpu_threads(silent, table(renames)) == {0: 31, 1: 32}
    assert vcpu_threads(silent, table([Event("kvm_fpu", {"load": 1}, 55)])) == {0: 55}


def test_steps_of_the_same_kind_pair_up() -> None:
    """Of two events predicted and one recorded, the one that agrees is the match."""
    steps = (Step("kvm_fpu"), Step("kvm_pio"), Step("kvm_pio"), Step("kvm_entry"))
    prediction = Prediction(0, steps)
    assert outcomes(prediction, [Event("kvm_fpu"), Event("kvm_pio"), Event("kvm_entry")]).count("missing") == 1
