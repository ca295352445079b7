"""The report's section on nested guests: counts, who had the time, and how it is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from spans.test_nested_chains import STORY, recorded

from kvmtrace.check.explain import explain_exit
from kvmtrace.formats import open_recording
from kvmtrace.render.headline import headline
from kvmtrace.render.html.nested_tables import nested_tables
from kvmtrace.render.text.report_text import render_text
from kvmtrace.render.text.story_sentence import describe_story
from kvmtrace.report.build import build_report
from kvmtrace.report.json_document import from_json, to_json

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.report.document import Report


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return build_report(recorded(STORY, tmp_path))


def test_counts(report: Report) -> None:
    (row,) = report.nested or ()
    assert (row.entries, row.failed_entries, row.l1_exits, row.l2_exits, row.reflected) == (2, 0, 3, 3, 1)
    assert {(one.name, one.reflected, one.count, one.samples) for one in row.exits} == {
        ("EXTERNAL_INTERRUPT", False, 1, 1),
        ("CPUID", True, 1, 1),
        ("HLT", False, 1, 0),
    }
    assert {(one.name, one.count) for one in row.l1_work} == {("VMWRITE", 1), ("VMRESUME", 1)}


def test_the_parts_are_the_wall_time(report: Report) -> None:
    (row,) = report.nested or ()
    parts = vars(row.budget).values()
    assert sum(part or 0 for part in parts) == row.wall_ns
    assert row.budget.l2_guest_ns == 3000
    for one in row.exits:
        split = (one.l0_ns, one.l1_guest_ns, one.userspace_ns, one.waiting_ns, one.preempted_ns, one.unknown_ns)
        assert one.total_ns is None or sum(part or 0 for part in split) == one.total_ns


def test_what_was_not_seen_to_end_has_no_time(report: Report) -> None:
    (row,) = report.nested or ()
    (halt,) = (one for one in row.exits if one.name == "HLT")
    assert (halt.total_ns, halt.max_ns, halt.l1_exits) == (None, None, None)


def test_it_is_told(report: Report) -> None:
    text = render_text(report)
    assert "Nested guests" in text
    assert "What L1 did about them" in text
    assert headline(report).startswith("Nested guest: exits of L2 took")
    assert from_json(to_json(report)) == report


def test_nothing_is_said_without_nested_guests() -> None:
    report = build_report(open_recording("fixtures/svm-6.12-storm.dat"))
    assert report.nested is None
    assert "Nested" not in render_text(report)


def test_an_exit_that_l1_handles_is_told_as_the_chain(tmp_path: Path) -> None:
    events = recorded(STORY, tmp_path).events()
    assert describe_story(explain_exit(events, 3)) == (
        "The guest's guest (L2) asked what its processor can do (CPUID); KVM passed it on to the hypervisor in the "
        "guest (L1), which took 2 VM-exits of its own (VMWRITE, VMRESUME) and entered L2 again after 8.00us."
    )
    own = describe_story(explain_exit(events, 2))
    assert own.endswith("; KVM served it in the kernel, and the guest ran again after 2.00us.")


def test_the_page_has_it(report: Report) -> None:
    tables = nested_tables(report)
    assert [table.title for table in tables] == [
        "Nested guests",
        "L2's exits of vCPU 0",
        "What L1 did about them, vCPU 0",
    ]
