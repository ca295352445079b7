"""The world switch table: complete, in order, and tied to events that can be recorded."""

from __future__ import annotations

import json

import pytest

from kvmtrace.isa.probes import PROBES
from kvmtrace.model.states import STEPS
from kvmtrace.model.world_switch import BRACKETS, PHASES, STEPS_BY_ISA, SwitchStep, steps_as_dicts

KINDS = {event.kind for event in STEPS.values()} | set(PROBES)
ALL_STEPS = [step for steps in STEPS_BY_ISA.values() for step in steps]


@pytest.mark.parametrize("isa", STEPS_BY_ISA)
def test_every_phase_of_the_lifecycle_is_there(isa: str) -> None:
    phases = [step.phase for step in STEPS_BY_ISA[isa]]
    assert set(phases) == set(PHASES)
    # first appearances come in the order of the lifecycle
    assert sorted(PHASES, key=phases.index) == list(PHASES)


@pytest.mark.parametrize("step", ALL_STEPS, ids=lambda step: step.title)
def test_brackets_are_recordable_events(step: SwitchStep) -> None:
    assert set(step.after.split("|")) <= KINDS
    assert set(step.before.split("|")) <= KINDS
    assert step.kvm or step.hardware
    assert step.function


def test_isas_do_not_mix() -> None:
    for isa, other in (("vmx", "svm_"), ("svm", "vmx_")):
        text = json.dumps(steps_as_dicts(isa)) + json.dumps(BRACKETS[isa])
        assert other not in text


def test_nothing_can_be_probed_between_entry_and_exit() -> None:
    inside = [step for step in STEPS_BY_ISA["vmx"] if step.phase in PHASES[2:6]]
    assert {(step.after, step.before) for step in inside} == {("kvm_entry", "kvm_exit")}


def test_hardware_acts_alone_in_guest_mode() -> None:
    for steps in STEPS_BY_ISA.values():
        guest = [step for step in steps if step.phase == "guest mode"]
        assert len(guest) == 1
        assert not guest[0].kvm


@pytest.mark.parametrize("isa", BRACKETS)
def test_brackets_chain_into_a_circle(isa: str) -> None:
    chain = BRACKETS[isa]
    assert [row[1] for row in chain[:-1]] == [row[0] for row in chain[1:]]
    assert chain[-1][1] == "kvm_entry"
