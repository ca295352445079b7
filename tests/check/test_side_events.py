"""Events beside the life of a vCPU: each has its place and cause in the model, and what has not is named."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from check.mutations.edits import common_columns, drop, materialise

from kvmtrace.check.engine import checker_of
from kvmtrace.formats import open_recording
from kvmtrace.kvm.tracepoints import LIFECYCLE
from kvmtrace.model.side_events import PLACES, SIDE_EVENTS
from kvmtrace.model.states import BYSTANDERS, FOLLOW_UPS, STEPS
from kvmtrace.table.event_table import EventTable

if TYPE_CHECKING:
    from kvmtrace.check.verdict import Comparison

FIXTURES = Path(__file__).parents[2] / "fixtures"
RECORDING = open_recording(FIXTURES / "svm-6.12-linux-2vcpu.dat")


@pytest.fixture(scope="module")
def table() -> EventTable:
    return materialise(RECORDING.events())


def judge(table: EventTable, pieces: int = 1) -> Comparison:
    checker = checker_of(RECORDING)
    bounds = np.linspace(0, len(table), pieces + 1).astype(int)
    for start, stop in pairwise(bounds):
        checker.feed(table.slice(int(start), int(stop)))
    return checker.finish()


def own_row(table: EventTable, kind: str) -> int:
    """Return a row in the middle of those that vCPU threads traced."""
    vcpu_tids = np.unique(table.tid[table.rows("kvm_entry")])
    rows = table.rows(kind)
    rows = rows[np.isin(table.tid[rows], vcpu_tids)]
    return int(rows[len(rows) // 2])


def test_every_recorded_event_has_its_place() -> None:
    known = {*SIDE_EVENTS, *FOLLOW_UPS, *BYSTANDERS, *(step.kind for step in STEPS.values())}
    assert {event.partition(":")[2] for event in LIFECYCLE} - known == set()
    for row in SIDE_EVENTS.values():
        assert row.place in PLACES
        assert row.source.strip()
        assert row.sentence.endswith(".")
        assert set(row.after) <= SIDE_EVENTS.keys()


def test_healthy_ones_hold_and_are_explained(table: EventTable) -> None:
    verdict = judge(table)
    assert verdict.rules["V14"].checked == verdict.rules["V14"].held > 1000
    assert verdict.unexplained == {}
    assert verdict.rules["V14"].checked >= judge(table, 7).rules["V14"].checked > 1000
    assert judge(table, 7).n_violations == 0


def test_an_ipi_of_another_vector_is_found(table: EventTable) -> None:
    row = own_row(table, "kvm_apic_ipi")
    edited = materialise(table)
    edited.field("kvm_apic_ipi", "icr_low")[edited.position_in_kind[row]] ^= 1
    verdict = judge(edited)
    assert verdict.rules["V14"].violated == 1
    assert [(v.event, v.event_index) for v in verdict.violations if v.rule == "V14"] == [("kvm_apic_ipi", row)]
    assert {v.rule for v in verdict.violations} == {"V14", "I1"}  # nor was it accepted as it was sent


def test_a_pin_that_changes_without_its_line_is_found(table: EventTable) -> None:
    row = own_row(table, "kvm_set_irq")
    verdict = judge(drop(table, row))
    assert verdict.first_divergence is not None
    assert (verdict.first_divergence.rule, verdict.first_divergence.event) == ("V14", "kvm_pic_set_irq")


def test_what_no_table_has_is_named(table: EventTable) -> None:
    kinds = tuple(
        type(kind)("kvm_new_thing", kind.system, kind.fields) if kind.name == "kvm_pv_tlb_flush" else kind
        for kind in table.kinds
    )
    verdict = judge(EventTable(common_columns(table), kinds, dict(table.payloads)))
    assert verdict.unexplained.keys() == {"kvm_new_thing"}
    total = sum(verdict.unexplained.values())
    parts = verdict.explained_events + verdict.environment_events + verdict.unknown_events + total
    assert parts == verdict.n_events
