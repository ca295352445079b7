"""An event that was enabled and never fired where its neighbours did is not traced by this KVM: unknown, by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvmtrace.check.engine import Checker
from kvmtrace.formats import open_recording
from kvmtrace.model.injection import NOT_TRACED_BESIDE

CASES = Path(__file__).resolve().parents[1] / "cases"
ENABLED = tuple(f"kvm:{name}" for name in ("kvm_entry", "kvm_exit", "kvm_apic", "kvm_apic_accept_irq", "kvm_eoi"))


@pytest.mark.parametrize("enabled", [True, False])
def test_interrupts_on_a_kvm_that_does_not_trace_their_injection(enabled: bool, tmp_path: Path) -> None:
    lines = (CASES / "eoi-wrong-order.txt").read_text().splitlines(keepends=True)
    path = tmp_path / "pvm.txt"
    path.write_text("".join(line for line in lines if "kvm_inj_virq" not in line))
    recording = open_recording(path)
    events = (*ENABLED, "kvm:kvm_inj_virq") if enabled else ENABLED
    checker = Checker(replace(recording.capture, events=events))
    checker.feed(recording.events())
    outcome = checker.finish()
    assert [violation for violation in outcome.violations if violation.rule == "V11"] == []
    assert outcome.rules["V11"].unknown > 0
    assert any("kvm_inj_virq" in part.missing for part in outcome.not_checked if part.rule == "V11")
    said = [line for line in outcome.cannot_see if "this KVM does not trace it" in line]
    assert [line.partition(" ")[0] for line in said] == (["kvm_inj_virq"] if enabled else [])


def test_where_it_fires_it_is_judged() -> None:
    recording = open_recording(CASES / "eoi-wrong-order.txt")
    checker = Checker(replace(recording.capture, events=(*ENABLED, "kvm:kvm_inj_virq")))
    checker.feed(recording.events())
    assert any(violation.rule == "V11" for violation in checker.finish().violations)


def test_the_table_names_events() -> None:
    assert all(others and event not in others for event, others in NOT_TRACED_BESIDE.items())
