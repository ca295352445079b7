"""The transition table is unambiguous on every kernel, whatever was recorded of it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from kvmtrace.check.observability import Evidence, find_capability
from kvmtrace.check.state_machine import compile_automaton, next_states, rows_for
from kvmtrace.formats import open_recording

FIXTURES = Path(__file__).parents[2] / "fixtures"

LATE = [
    {"exit_irqs_on"},
    {"exit_irqs_off"},
    {"exit_irqs_on", "exit_irqs_unknown"},
    {"exit_irqs_off", "exit_irqs_unknown"},
]
OLD: list[set[str]] = [set(), {"old_fastpath"}, {"old_fastpath", "entry_before_run"}]


@pytest.mark.parametrize(("late", "old", "refused"), list(product(LATE, OLD, (False, True))))
def test_a_step_leads_to_one_state(late: set[str], old: set[str], refused: bool) -> None:
    inside = refused and "exit_irqs_on" not in late
    traits = late | old | ({"refused_nested_entries"} if inside else set())
    assert next_states(rows_for(frozenset(traits)))


@pytest.mark.parametrize("name", ["svm-6.1-nested", "svm-6.12-nested"])
def test_refused_nested_entries_are_followed(name: str) -> None:
    recording = open_recording(FIXTURES / f"{name}.dat")
    events = recording.events()
    evidence = Evidence(set())
    evidence.look_at(events)
    assert events.count("kvm_nested_vmenter_failed") == recording.capture.meta["guest_run"]["arguments"]["count"]
    capability = find_capability(recording.capture, events, evidence)
    late = "exit_irqs_on" in capability.traits
    assert late == ("6.1-" in name)
    assert ("refused_nested_entries" in capability.traits) != late
    assert compile_automaton(capability)
