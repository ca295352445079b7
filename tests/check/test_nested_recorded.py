"""Nested guests of real recordings: levels as trace-cmd's text has them, and faults put into them are found."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from mutations.edits import materialise
from mutations.harness import Base, Outcome, inner, run_mutation, sample
from mutations.plan import plan

from kvmtrace.check.engine import Checker
from kvmtrace.formats import open_recording
from kvmtrace.report.build import build_report
from kvmtrace.spans.vm_exits import collect_vm_exits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mutations.plan import Mutation

    from kvmtrace.table.event_table import EventTable

FOLDER = Path(__file__).parent / "recorded"
# name -> (exits of L1, exits of L2, passed on, nested entries), counted in `trace-cmd report -N`
COUNTS = {
    "svm-6.12-nested-hyperv": (62, 26, 8, 8),
    "svm-6.12-nested-exceptions": (38, 16, 2, 2),
    "svm-6.12-nested": (35, 40, 21, 21),
    "svm-6.1-nested": (35, 40, 21, 21),
    "vmx-6.1-nested": (101, 39, 21, 21),
}
FIXTURES = Path(__file__).parents[2] / "fixtures"
# what KVM decoded for an exit that L1 gets has no further consequence
UNSEEN = {("kvm_emulate_insn", variant) for variant in ("len+1", "len-1", "rip+1")}
MUTATED = ("kvm_exit", "kvm_entry", "kvm_page_fault", "kvm_msr", "kvm_emulate_insn", "kvm_inj_exception")


def path_of(name: str) -> Path:
    recorded = FOLDER / f"{name}.dat"
    return recorded if recorded.exists() else FIXTURES / f"{name}.dat"


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_of_trace_cmd(name: str) -> None:
    recording = open_recording(path_of(name))
    rows = collect_vm_exits(recording.iter_events())
    (vcpu,) = build_report(recording).nested or ()
    l1, l2, passed_on, entries = COUNTS[name]
    assert np.bincount(rows["level"], minlength=3).tolist() == [0, l1, l2]
    assert (vcpu.l1_exits, vcpu.l2_exits, vcpu.reflected, vcpu.entries) == (l1, l2, passed_on, entries)


@pytest.mark.parametrize("name", COUNTS)
def test_every_rule_of_nested_guests_is_checked(name: str) -> None:
    recording = open_recording(path_of(name))
    checker = Checker(recording.capture)
    checker.feed(recording.events())
    rules = checker.finish().rules
    assert all(rules[rule].checked and not rules[rule].violated for rule in ("N1", "N2", "N3", "N5", "N6"))


def _in_l2(table: EventTable, row: int) -> bool:
    """Say whether an event stands behind a VM-exit of L2."""
    exits, told = table.rows("kvm_exit"), table.rows("kvm_nested_vmexit")
    at = int(np.searchsorted(exits, row, "right"))
    begin, end = (int(exits[at - 1]) if at else 0), (int(exits[at]) if at < len(exits) else len(table))
    return bool(((told > begin) & (told < end)).any())


def _of_nested_guests(base: Base) -> Iterator[Mutation]:
    for mutation in inner(base, plan(base.table)):
        if mutation.event.startswith("kvm_nested") or (
            mutation.event in MUTATED and mutation.operation != "insert" and _in_l2(base.table, mutation.row)
        ):
            yield mutation


def _outcomes(per_group: int, limit: int) -> list[Outcome]:
    rng, found = random.Random(1), []
    # in the other one the VMM injects exceptions, and what it does no event tells
    for name in ("svm-6.12-nested-hyperv", "svm-6.1-nested", "svm-6.12-nested", "vmx-6.1-nested"):
        recording = open_recording(path_of(name))
        table = recording.events()
        told = table.rows("kvm_nested_vmexit")
        part = table.slice(max(int(told[0]) - 150, 0), min(int(told[-1]) + 150, len(table)))
        base = Base(name, recording.capture, materialise(part))
        mutations = sample(_of_nested_guests(base), per_group, rng)
        found += [run_mutation(base, mutation) for mutation in rng.sample(mutations, min(limit, len(mutations)))]
    return found


def _missed(outcomes: list[Outcome]) -> list[str]:
    return [f"{one.base}: {one.mutation}" for one in outcomes if not one.caught and not one.excuse]


def test_faults_of_nested_guests_are_found() -> None:
    outcomes = _outcomes(1, 60)
    assert len(_missed(outcomes)) <= 0.05 * len(outcomes), _missed(outcomes)


@pytest.mark.slow
def test_more_faults_of_nested_guests_are_found() -> None:
    outcomes = _outcomes(3, 1000)
    counted = [one for one in outcomes if one.caught or not one.excuse]
    print(len(counted), "mutations,", *_missed(outcomes), sep="\n")
    assert len(_missed(outcomes)) <= 0.05 * len(counted), _missed(outcomes)
