"""The text report: width, units, escapes, the sentence on top."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmtrace.render.headline import headline
from kvmtrace.render.terminal import Column, Style, duration, escape, percent, table
from kvmtrace.render.text import text_tables
from kvmtrace.render.text.report_text import SHOW, TextOptions, render_text
from kvmtrace.report.anonymize import anonymized
from kvmtrace.report.build import ReportOptions, build_report
from kvmtrace.report.json_document import dump, to_json

from .tables import Row, TableRecording, make_table

if TYPE_CHECKING:
    from kvmtrace.report.document import Report


def rows(n: int = 200) -> list[Row]:
    found: list[Row] = [(1000, 0, 5, "kvm_entry", {})]
    for i in range(n):
        base = 10_000 * (i + 1)
        reason = 10 + i % 60
        found += [
            (base, 0, 5, "kvm_exit", {"exit_reason": reason, "isa": 1, "guest_rip": 0xFFFFFFFF81000000 + i}),
            (base + 5, 0, 5, "kvm_msr", {"ecx": 0x10 + i, "write": 1, "exception": i % 2}),
            (base + 6, 0, 5, "kvm_mmio", {"type": 2, "gpa": 0xFEE00000 + 0x10 * i}),
            (base + 7, 0, 5, "kvm_pio", {"port": 0x3F8, "rw": 1}),
            (base + 9, 0, 5, "kvm_userspace_exit", {"reason": 2 + i % 5, "errno": 0}),
            (base + 3000 + i, 0, 5, "kvm_entry", {}),
        ]
    return found


def report(comm: str = "CPU 0/KVM") -> Report:
    recording = TableRecording(make_table(rows()), host="secret-host", kernel="6.1", cpu_model="Model")
    recording.comms = {5: comm}
    return build_report(recording, ReportOptions(model=False))


@pytest.mark.parametrize("width", [60, 80, 100, 140])
@pytest.mark.parametrize("by", [None, "all", "slowest", *text_tables.TABLES])
def test_no_line_is_wider_than_it_may_be(by: str | None, width: int) -> None:
    options = {
        "all": TextOptions(show=frozenset(SHOW)),
        "slowest": TextOptions(slowest=20),
    }.get(by or "", TextOptions(by=by))
    text = render_text(report(), options, Style(width=width))
    assert max(len(line) for line in text.splitlines()) <= width
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_the_sentence_on_top_names_what_dominates() -> None:
    words = headline(report())
    assert words.startswith("Writing to CPU_BASED_VM_EXEC_CONTROL") or "exits, in" in words
    assert "of the host's work on VM-exits" in words
    assert "in the VMM" in words


def test_control_characters_of_a_trace_do_not_reach_the_terminal() -> None:
    found = report(comm="\x1b[2J\u202e")
    text = render_text(found)
    assert "\\x1b[2J\\u202e" in text
    assert "\x1b" not in text


def test_colours_only_when_wanted() -> None:
    assert "\x1b[" in render_text(report(), style=Style(colour=True))
    assert "\x1b" not in render_text(report(), style=Style(colour=False))


def test_anonymized_keeps_repetitions_and_drops_names() -> None:
    plain = report(comm="secret-comm")
    hidden = anonymized(plain)
    text = to_json(hidden)
    for word in ("secret-host", "secret-comm", "test.dat", "Model"):
        assert word not in text
    assert hidden.exits == plain.exits
    assert len({row.gpa for row in hidden.detail.gpas}) == len({row.gpa for row in plain.detail.gpas})
    assert {row.gpa & 0xFFF for row in hidden.detail.gpas} == {row.gpa & 0xFFF for row in plain.detail.gpas}
    assert not {row.gpa >> 12 for row in hidden.detail.gpas} & {row.gpa >> 12 for row in plain.detail.gpas}
    assert hidden.vcpus[0].comm == "thread-1"


def test_absent_is_null_never_zero() -> None:
    vcpu = dump(report().vcpus[0])
    assert vcpu["budget"]["preempted_ns"] is None
    assert vcpu["budget"]["entry_exit_ns"] is None
    assert vcpu["pid"] is None


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (None, "-"),
        (0, "0ns"),
        (999, "999ns"),
        (1000, "1.00us"),
        (9994, "9.99us"),
        (9996, "10.0us"),
        (99_960, "100us"),
        (999_600, "1.00ms"),
        (12_345_678, "12.3ms"),
        (1_500_000_000, "1.50s"),
        (3_600_000_000_000, "3,600s"),
    ],
)
def test_durations_have_three_digits(ns: int | None, text: str) -> None:
    assert duration(ns) == text


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (None, 5, "-"),
        (1, 0, "-"),
        (0, 5, "0"),
        (1, 10_000, "<0.1%"),
        (1, 3, "33.3%"),
        (99_999, 100_000, "100%"),
    ],
)
def test_percentages(part: int | None, whole: int, text: str) -> None:
    assert percent(part, whole) == text


def test_flexible_columns_give_way() -> None:
    lines = table([Column("name", ["x" * 200], left=True, flexible=True), Column("n", ["123"])], Style(width=40))
    assert max(map(len, lines)) <= 40
    assert ".." in lines[1]
    assert lines[1].endswith("123")


def test_escape_keeps_ordinary_text() -> None:
    assert escape("CPU 0/KVM ä") == "CPU 0/KVM ä"
