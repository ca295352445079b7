"""Predictions of the bundled guests, held against their known counts and against stories told by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from kvmtrace.errors import UsageError
from kvmtrace.isa import registry
from kvmtrace.kvm.userspace_exits import describe_userspace_exit_reason
from kvmtrace.predict.guest_prediction import predict
from kvmtrace.predict.story import PREDICTABLE, Expected, Facts, Prediction, Step, describe_step
from kvmtrace.workload import GUESTS

ISAS = ("vmx", "svm", "pvm")
SMALL = {"storm": {"count": 101}}
REASONS = {isa.name: isa.names for isa in registry.ISAS}
TRACED = PREDICTABLE - {name for name in PREDICTABLE if "ioctl" in name or "vcpu_run" in name}


def arguments(name: str, **given: int) -> dict[str, int]:
    return {argument.name: argument.default for argument in GUESTS[name].arguments} | SMALL.get(name, {}) | given


def predicted(name: str, isa: str, **facts: object) -> tuple[Prediction, ...]:
    return predict(GUESTS[name], arguments(name), Facts(isa, **facts))


def values(step: Step) -> dict[str, int | bytes]:
    return {item.name: item.value for item in step.fields}


def steps_of(predictions: tuple[Prediction, ...], event: str) -> list[dict[str, int | bytes]]:
    return [values(step) for each in predictions for step in each.steps if step.event == event]


RUNNABLE = [(name, isa) for name, guest in GUESTS.items() for isa in ISAS if isa not in guest.refused]


@pytest.mark.parametrize(("name", "isa"), RUNNABLE)
def test_prediction_has_the_known_counts(name: str, isa: str) -> None:
    """The listing's counts were written by hand, the prediction executes its bytes' text."""
    predictions = predicted(name, isa)
    known = GUESTS[name].on(isa).known_on(isa, arguments(name))
    events = Counter(step.event for each in predictions for step in each.steps)
    assert {event: events[event] for event in known.tracepoints} == known.tracepoints
    exits = [left["reason"] for left in steps_of(predictions, "kvm_userspace_exit") if "reason" in left]
    assert Counter(describe_userspace_exit_reason(reason) for reason in exits) == known.userspace_exits
    ports = Counter(f"{pio['port']:#x}:{'POUT' if pio['rw'] else 'PIN'}" for pio in steps_of(predictions, "kvm_pio"))
    assert not known.ports or ports == known.ports
    msrs = Counter(f"{msr['ecx']:#x}:{'W' if msr['write'] else 'R'}" for msr in steps_of(predictions, "kvm_msr"))
    assert not known.msrs or msrs == known.msrs


@pytest.mark.parametrize("isa", ["vmx", "svm"])
@pytest.mark.parametrize("name", GUESTS)
def test_prediction_has_the_known_vm_exits(name: str, isa: str) -> None:
    predictions = predicted(name, isa)
    exits = Counter(REASONS[isa][left["exit_reason"]] for left in steps_of(predictions, "kvm_exit"))
    known = getattr(GUESTS[name].on(isa).known(arguments(name)), isa)
    assert {reason: exits[reason] for reason in known} == known
    assert "pvm" in GUESTS[name].refused or not steps_of(predicted(name, "pvm"), "kvm_exit")


@pytest.mark.parametrize(("name", "isa"), RUNNABLE)
def test_brackets_close(name: str, isa: str) -> None:
    """FPU load and unload alternate; on VMX and SVM so do entry and exit, each inside its run function."""
    for each in predicted(name, isa):
        fpu = [values(step)["load"] for step in each.steps if step.event == "kvm_fpu"]
        assert fpu == [1, 0] * (len(fpu) // 2)
        names = [step.event for step in each.steps]
        if isa != "pvm":
            run = [f"{isa}_vcpu_run", "kvm_entry", "kvm_exit", f"{isa}_vcpu_run_return"]
            assert [event for event in names if event in run] == run * names.count("kvm_exit")
        assert names[0] == "sys_enter_ioctl"
        assert names[-1] == "sys_exit_ioctl"


def names_of(prediction: Prediction, address: int) -> list[str]:
    """Return the events of the first execution of an instruction."""
    start = next(n for n, step in enumerate(prediction.steps) if step.address == address)
    rest = prediction.steps[start:]
    end = next((n for n, step in enumerate(rest) if step.address != address), len(rest))
    return [step.event for step in rest[:end]]


SENT = ["kvm_apic_ipi", "kvm_apic_accept_irq", "kvm_apic", "kvm_msr"]


def test_ipi_is_sent_on_the_fast_path() -> None:
    """Inside the run function; SVM before Linux 6.5 traces the exit behind it, at the next RIP already."""
    vmx = predicted("smp", "vmx")[0]
    assert names_of(vmx, 0x1064) == ["kvm_exit", *SENT, "vmx_vcpu_run_return"]
    assert names_of(vmx, 0x1045) == ["kvm_exit", "vmx_vcpu_run_return", *SENT]  # INIT has none
    old = predicted("smp", "svm", exit_inside_run=False)[0]
    assert names_of(old, 0x1064) == [*SENT, "svm_vcpu_run_return", "kvm_exit"]
    left = next(values(step) for step in old.steps if step.address == 0x1064 and step.event == "kvm_exit")
    assert left["guest_rip"] == 0x1066
    slow = predicted("smp", "svm", nrips=False)[0]
    assert names_of(slow, 0x1064) == ["kvm_exit", "svm_vcpu_run_return", *SENT, "kvm_emulate_insn"]


def test_apic_virtualisation_spares_injections_and_eoi_exits() -> None:
    plain = Counter(step.event for step in predicted("interrupt", "vmx")[0].steps)
    virtual = Counter(step.event for step in predicted("interrupt", "vmx", apicv=True)[0].steps)
    assert (plain["kvm_inj_virq"], plain["kvm_eoi"]) == (23, 23)
    assert (virtual["kvm_inj_virq"], virtual["kvm_eoi"]) == (0, 0)
    assert plain["kvm_exit"] - virtual["kvm_exit"] == 23


def test_late_kvm_exit() -> None:
    """Before Linux 6.5, SVM traces kvm_exit behind svm_vcpu_run's return."""
    (each,) = predicted("triple-fault", "svm", exit_inside_run=False)
    names = [step.event for step in each.steps if step.event in {"svm_vcpu_run_return", "kvm_exit"}]
    assert names == ["svm_vcpu_run_return", "kvm_exit"] * 6


def test_only_recorded_events_are_predicted() -> None:
    events = frozenset({"kvm_exit", "kvm_entry"})
    (each,) = predicted("lifecycle", "vmx", events=events)
    assert {step.event for step in each.steps} == events


def story(predictions: tuple[Prediction, ...], first: int, last: int) -> list[str]:
    """Return the steps of the instructions in this address range, fields of interest only."""
    names = ("rip", "exit_reason", "info1", "guest_rip", "fault_address", "val", "gpa", "type", "reason")
    return [
        " ".join([step.event, *(f"{n}={v:#x}" for n, v in values(step).items() if n in names)])
        for each in predictions
        for step in each.steps
        if first <= step.address <= last and step.text
    ]


def test_story_of_msr_gp() -> None:
    predictions = predict(GUESTS["msr-gp"], {"count": 1}, Facts("vmx", TRACED))
    assert story(predictions, 0x1000, 0x101D) == [
        "kvm_entry rip=0x1000",
        "kvm_exit exit_reason=0x30 guest_rip=0x1000 info1=0x4",
        "kvm_page_fault guest_rip=0x1000 fault_address=0x1000",
        "kvm_entry rip=0x1000",
        "kvm_exit exit_reason=0x30 guest_rip=0x1000 info1=0x2",
        "kvm_page_fault guest_rip=0x1000 fault_address=0x34",
        "kvm_entry rip=0x1000",
        "kvm_exit exit_reason=0x30 guest_rip=0x100c info1=0x2",
        "kvm_page_fault guest_rip=0x100c fault_address=0x2ffe",
        "kvm_entry rip=0x100c",
        "kvm_exit exit_reason=0x20 guest_rip=0x101d info1=0x0",
        "kvm_msr",
        "kvm_inj_exception",
        "kvm_entry rip=0x101d",
    ]
    after = predictions[0].steps[
        next(i for i, s in enumerate(predictions[0].steps) if s.event == "kvm_inj_exception") :
    ]
    # the handler adds 2 to the return address: the guest goes on behind WRMSR, not at it
    assert after[1].path == (0x101D, 0x1026, 0x1027, 0x1029, 0x102D, 0x102E, 0x101F, 0x1020, 0x1022, 0x1024)


def test_story_of_a_page_crossing_mmio_read() -> None:
    predictions = predict(GUESTS["mmio-split"], {"count": 1}, Facts("vmx", TRACED))
    assert story(predictions, 0x102A, 0x102A) == [
        "kvm_entry rip=0x102a",
        "kvm_exit exit_reason=0x31 guest_rip=0x102a",
        "kvm_emulate_insn rip=0x102a",
        "kvm_mmio type=0x0 gpa=0x9ff4 val=0x0",  # once, with the length of the part in the second page
        "kvm_fpu",
        "kvm_userspace_exit reason=0x6",
        "kvm_fpu",
        "kvm_fpu",
        "kvm_userspace_exit reason=0x6",
        "kvm_fpu",
        "kvm_fpu",
        "kvm_userspace_exit reason=0x6",
        "kvm_fpu",
        "kvm_mmio type=0x1 gpa=0x9ffc val=0x201f1e1d1c1b1a19",
    ]


def test_without_next_rip_svm_decodes_what_it_skips() -> None:
    with_nrips = Counter(step.event for step in predicted("lifecycle", "svm")[0].steps)
    without = Counter(step.event for step in predicted("lifecycle", "svm", nrips=False)[0].steps)
    assert without["kvm_emulate_insn"] - with_nrips["kvm_emulate_insn"] == 13 + 11 + 7 + 5
    assert {**without, "kvm_emulate_insn": 0} == {**with_nrips, "kvm_emulate_insn": 0}


def test_rep_ins_stops_at_the_page() -> None:
    reads = [pio for pio in steps_of(predicted("string-io", "svm"), "kvm_pio") if not pio["rw"]]
    assert [(pio["size"], pio["count"], pio["val"]) for pio in reads] == [
        (1, 16, 0x01),
        (1, 25, 0x11),
        (4, 7, 0x2D2C2B2A),
    ]


def test_interrupts_of_smp_reach_the_other_vcpu() -> None:
    first, second = predicted("smp", "vmx")
    assert len(steps_of((first,), "kvm_inj_virq")) == 18
    assert len(steps_of((second,), "kvm_inj_virq")) == 17
    assert [ipi["dest_id"] for ipi in steps_of((first,), "kvm_apic_ipi")] == [1] * 19
    assert values(second.steps[4]) == {"errno": -11 & 0xFFFFFFFF}  # woken by INIT and SIPI


def test_values_the_listing_does_not_tell_are_not_predicted() -> None:
    """CPUID's results are the host's: the second CPUID's ECX is not known, the first one's is."""
    inputs = steps_of(predicted("storm", "vmx"), "kvm_cpuid")
    assert inputs[0] == {"function": 0, "index": 0}
    assert all(each == {"function": 0} for each in inputs[1:])


def test_limits() -> None:
    with pytest.raises(UsageError, match="longer than 1000 predicted events"):
        predict(GUESTS["storm"], {"count": 10_000}, Facts("vmx"), max_steps=1000)
    with pytest.raises(UsageError, match="ISA vax"):
        predict(GUESTS["storm"], {"count": 1}, Facts("vax"))


@pytest.mark.parametrize(
    ("expected", "value", "holds"),
    [
        (Expected("a", 5), 5, True),
        (Expected("a", 5), 6, False),
        (Expected("a", 4, 6), 0xFD, True),
        (Expected("a", -11 & 0xFFFFFFFF, 0xFFFFFFFF), -11, True),
        (Expected("a", b"\x0f\xa2"), b"\x0f\xa2\x00\x00", True),
        (Expected("a", b"\x0f\xa2"), b"\x0f\x30\x00", False),
    ],
)
def test_expected_holds(expected: Expected, value: object, holds: bool) -> None:
    assert expected.holds(value) is holds


def test_describe_step() -> None:
    fields = (Expected("exit_reason", 48), Expected("info1", 2, 7), Expected("insn", b"\xf4"))
    step = Step("kvm_exit", fields, why="MMIO")
    assert describe_step(step) == "kvm_exit exit_reason=0x30 info1=2/0x7 insn=f4  (MMIO)"
    failed = Step("kvm_userspace_exit", (Expected("errno", 0xFFFFFFF5, 0xFFFFFFFF),))
    assert describe_step(failed) == "kvm_userspace_exit errno=-11"
