"""The model's tables are closed: every name exists, every step leads to one state, every row is cited."""

from __future__ import annotations

from itertools import product

import pytest

from kvmtrace.check.alphabet import CLASS_NAMES, N_CLASSES
from kvmtrace.check.batch import EXPECTATIONS
from kvmtrace.check.guards import guard_holds
from kvmtrace.check.payloads import CLAIMS, NEEDED
from kvmtrace.check.predicates import PREDICATE_COLUMNS
from kvmtrace.check.state_machine import next_states, rows_for
from kvmtrace.isa.svm import SVM_EXITS
from kvmtrace.isa.vmx import VMX_EXITS
from kvmtrace.model.rules import CHECKS, PREDICATES, RULES, SUSPICION, VIOLATION
from kvmtrace.model.states import BYSTANDERS, FOLLOW_UPS, STATES, STEPS
from kvmtrace.model.transitions import FOLLOW_UP_STATES, GUARDS, LATE_EXIT_STATES, TRAITS, TRANSITIONS

ROWS = [row for row in EXPECTATIONS if row is not None]
KERNELS = [
    frozenset(traits) for traits in product(("entry_in_run", "entry_before_run"), ("exit_irqs_on", "exit_irqs_off"))
]
KERNELS += [kernel | {"old_fastpath"} for kernel in KERNELS]


def test_transitions_use_known_names() -> None:
    for row in TRANSITIONS:
        assert {row.state, row.next} <= STATES.keys(), row
        assert row.event in STEPS, row
        assert row.guard in {"", *GUARDS}, row
        assert row.only in {"", *TRAITS}, row
        assert row.source.strip(), row
        assert row.sentence.endswith("."), row
    assert len(set(TRANSITIONS)) == len(TRANSITIONS)


@pytest.mark.parametrize("traits", KERNELS, ids=lambda traits: "+".join(sorted(traits)))
def test_each_step_leads_to_one_state(traits: frozenset[str]) -> None:
    after = next_states(rows_for(traits))
    assert after["VM-entry"] == "guest"
    assert after["VM-exit"] == "exited"
    assert after["userspace exit"] == "left"


@pytest.mark.parametrize("traits", KERNELS, ids=lambda traits: "+".join(sorted(traits)))
def test_every_state_is_reached_from_userspace(traits: frozenset[str]) -> None:
    reached, rows = {"user"}, rows_for(traits)
    for _ in STATES:
        reached |= {row.next for row in rows if row.state in reached}
    optional = {"unknown"} | ({"switched_out"} if "exit_irqs_off" in traits else set())
    optional |= {"switching_in"} if "entry_before_run" in traits else set()
    assert reached >= STATES.keys() - optional


def test_state_sets_name_states() -> None:
    assert STATES.keys() >= FOLLOW_UP_STATES | LATE_EXIT_STATES


def test_classes_fit_a_mask_and_are_unique() -> None:
    assert N_CLASSES <= 64
    assert len(set(CLASS_NAMES)) == len(CLASS_NAMES)
    assert not set(FOLLOW_UPS) & set(BYSTANDERS)


def test_every_guard_predicate_and_check_is_implemented() -> None:
    assert PREDICATES.keys() == PREDICATE_COLUMNS.keys()
    assert {"entry_failed", "early_error", "init_reset", "other_ioctl", "fastpath_exit"} == GUARDS.keys()
    assert callable(guard_holds)
    named = {name for row in ROWS for name in row.checks}
    assert named <= CHECKS.keys()
    assert CLAIMS.keys() <= CHECKS.keys()
    assert NEEDED.keys() <= CHECKS.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.handler.split()[0]}-{row.code:#x}")
def test_exit_rows_use_known_names(row) -> None:
    unless = {name for must in row.must for name in must.unless} | {name for name, _ in row.rip_when}
    assert unless <= PREDICATES.keys()
    known = {*FOLLOW_UPS, *BYSTANDERS, "kvm_inj_exception", "kvm_inj_virq", "kvm_vcpu_wakeup"}
    assert {event for must in row.must for event in must.events} | row.may <= known
    assert all(0 <= reason < 64 for reason in row.userspace)
    assert row.handler


def test_unknown_reason_has_no_expectation() -> None:
    assert EXPECTATIONS[0] is None
    assert len(ROWS) == len(VMX_EXITS) + len(SVM_EXITS)


def test_rules_are_complete() -> None:
    assert [f"V{i}" for i in range(1, 14)] == [name for name in RULES if name.startswith("V")]
    assert [f"J{i}" for i in range(1, 9)] == [name for name in RULES if name.startswith("J")]
    for name, rule in RULES.items():
        assert rule.id == name
        assert rule.severity == (SUSPICION if name.startswith("H") else VIOLATION)
        assert rule.sentence.endswith(".")
        assert rule.source
        assert rule.needs
