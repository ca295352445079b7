"""Predictions of the arm64 guests, held against their known counts; faults put into what was predicted are found."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from kvmtrace.cli.main import cli
from kvmtrace.errors import UsageError
from kvmtrace.isa.arm64_words import decode_data_abort, decode_system_register, encode_abort, encode_system_register
from kvmtrace.isa.registry import BY_NAME
from kvmtrace.kvm.userspace_exits import describe_userspace_exit_reason
from kvmtrace.predict.align import DIFFERENCES, align
from kvmtrace.predict.guest_prediction import predict
from kvmtrace.predict.story import PREDICTABLE, Facts, Prediction, Step
from kvmtrace.table.event_table import COMMON_DTYPES, EventKind, EventTable
from kvmtrace.table.payload import ColumnPayload
from kvmtrace.workload.arm64_guests import ARM64_GUESTS

SMALL = {"storm": {"count": 101}, "interrupt": {"count": 3}, "smp": {"count": 3}, "smc": {"count": 2}}
ARM64 = BY_NAME["arm64"]


def arguments(name: str) -> dict[str, int]:
    return {each.name: each.default for each in ARM64_GUESTS[name].arguments} | SMALL.get(name, {})


def predicted(name: str) -> tuple[Prediction, ...]:
    return predict(ARM64_GUESTS[name], arguments(name), Facts("arm64"))


def values(step: Step) -> dict[str, int]:
    return {item.name: item.value for item in step.fields}


@pytest.mark.parametrize("name", ARM64_GUESTS)
def test_prediction_has_the_known_counts(name: str) -> None:
    """The counts were written by hand, the prediction executes the listing."""
    steps = [step for each in predicted(name) for step in each.steps]
    known = ARM64_GUESTS[name].known(arguments(name))
    events = Counter(step.event for step in steps)
    assert {event: events[event] for event in known.tracepoints} == known.tracepoints
    left = [values(step)["reason"] for step in steps if step.event == "kvm_userspace_exit"]
    assert Counter(describe_userspace_exit_reason(reason) for reason in left) == known.userspace_exits
    exits = Counter(ARM64.names[values(step)["exit_reason"]] for step in steps if step.event == "kvm_exit")
    assert {reason: exits[reason] for reason in known.arm64} == known.arm64


@pytest.mark.parametrize("name", ARM64_GUESTS)
def test_brackets_close(name: str) -> None:
    for each in predicted(name):
        names = [step.event for step in each.steps]
        world = [event for event in names if event in {"kvm_entry", "kvm_exit"}]
        assert world == ["kvm_entry", "kvm_exit"] * names.count("kvm_exit")
        assert (names[0], names[-1]) == ("sys_enter_ioctl", "sys_exit_ioctl")
        assert not {"kvm_fpu", "kvm_msr", "kvm_page_fault"} & set(names)


def test_an_entry_shows_where_the_exit_was() -> None:
    """KVM steps over the instruction after it traced the entry; the guest then runs on behind it."""
    (each,) = predicted("lifecycle")
    at = next(n for n, step in enumerate(each.steps) if step.event == "kvm_mmio")
    entered = next(step for step in each.steps[at:] if step.event == "kvm_entry")
    assert values(entered)["rip"] == 0x1008
    assert entered.path[:2] == (0x1008, 0x100C)


def test_first_touches_of_pages_that_vcpus_race_for_are_left_open() -> None:
    for each in predicted("smp"):
        faults = [step for step in each.steps if step.event == "kvm_exit" and values(step)["exit_reason"] == 0xA0]
        shared = {values(step)["guest_rip"] & ~0xFFF: step.optional for step in faults}
        assert shared == {0x1000 * (1 + each.vcpu_id): False, 0x3000: True, 0x4000: True}


def test_syndromes_survive_a_round_trip() -> None:
    found = decode_system_register(encode_system_register("icc_sgi1r_el1", 7, write=True))
    assert (found.name, found.register, found.write) == ("ICC_SGI1R_EL1", 7, True)
    abort = replace(decode_data_abort(0x93950047), fault="")
    value, mask = encode_abort(abort)
    assert value & mask == 0x93950047 & mask
    assert replace(decode_data_abort(value), fault="") == abort


def as_table(steps: list[Step], tid: int) -> EventTable:
    """Write steps down as events of a thread."""
    names = sorted(PREDICTABLE)
    columns = {name: np.zeros(len(steps), dtype) for name, dtype in COMMON_DTYPES.items()}
    columns["ts_ns"] = np.arange(len(steps), dtype=np.int64)
    columns["tid"] += tid
    columns["kind"] = np.array([names.index(step.event) for step in steps], np.uint16)
    kinds, payloads = [], {}
    for index, name in enumerate(names):
        own = [values(step) for step in steps if step.event == name]
        fields = sorted({field for each in own for field in each})
        made = {field: np.array([each.get(field, 0) for each in own], np.int64) for field in fields}
        kinds.append(EventKind(name, "kvm", {field: column.dtype for field, column in made.items()}))
        if own:
            payloads[index] = ColumnPayload(made)
    return EventTable(columns, kinds, payloads)


def outcomes(prediction: Prediction, steps: list[Step]) -> set[str]:
    aligned = align(prediction, as_table(steps, 100), 100)
    return {line.outcome for line in aligned.steps}


def without_optional(prediction: Prediction) -> list[Step]:
    steps, number = [], 0
    while number < len(prediction.steps):
        if not prediction.steps[number].optional:
            steps.append(prediction.steps[number])
        number += 1 + prediction.steps[number].goes_with
    return steps


@pytest.mark.parametrize("name", [name for name in ARM64_GUESTS if name != "storm"])
def test_what_happened_as_predicted_matches(name: str) -> None:
    for each in predicted(name):
        assert not DIFFERENCES & outcomes(each, list(each.steps))
        assert not DIFFERENCES & outcomes(each, without_optional(each))


@pytest.mark.parametrize("name", ["undefined", "stage2", "dabt-split", "interrupt"])
def test_every_single_fault_is_found(name: str) -> None:
    (each,) = predicted(name)
    steps = [step for step in each.steps if step.event != "kvm_vcpu_wakeup"]
    for n, step in enumerate(steps[: 1 + len(steps) // 2]):
        waits = step.optional and step.goes_with
        if not waits:
            assert DIFFERENCES & outcomes(each, steps[:n] + steps[n + 1 :]), f"drop {n} {step}"
        for number, field in enumerate(step.fields):
            if field.name not in {"hsr", "isa"}:
                wrong = replace(field, value=field.value ^ 4)
                fields = (*step.fields[:number], wrong, *step.fields[number + 1 :])
                assert DIFFERENCES & outcomes(each, [*steps[:n], replace(step, fields=fields), *steps[n + 1 :]])


def test_a_wait_may_be_repeated() -> None:
    (each,) = predicted("interrupt")
    steps = list(each.steps)
    at = next(n for n, step in enumerate(steps) if step.optional and step.goes_with)
    wait = steps[at : at + steps[at].goes_with + 1]
    assert not DIFFERENCES & outcomes(each, [*steps[: at + len(wait)], *wait, *steps[at + len(wait) :]])


def test_the_command_prints_it() -> None:
    done = CliRunner().invoke(cli, ["model", "--replay", "smc", "--isa", "arm64"])
    assert done.exit_code == 0
    assert "kvm_exit exit_reason=0x97 guest_rip=0x1004" in done.stdout
    done = CliRunner().invoke(cli, ["model", "--replay", "triple-fault", "--isa", "arm64"])
    assert isinstance(done.exception, UsageError)
    assert "there are lifecycle, storm" in str(done.exception)
