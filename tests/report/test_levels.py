"""`report --level`: the VM-exits of the guest, or of its guests, alone; together they are all."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmtrace.errors import UsageError
from kvmtrace.formats import open_recording
from kvmtrace.report.build import ReportOptions, build_report
from kvmtrace.report.selection import Selection

if TYPE_CHECKING:
    from kvmtrace.report.document import Report

FIXTURES = Path(__file__).parents[2] / "fixtures"
NESTED = FIXTURES / "svm-6.12-nested.dat"


def report_of(level: int | None, path: Path = NESTED) -> Report:
    return build_report(open_recording(path), ReportOptions(Selection(level=level), model=False))


def counts(report: Report) -> Counter[str]:
    return Counter({row.name: row.count for row in report.exits})


def test_each_level_has_what_the_listing_says() -> None:
    l1, l2 = counts(report_of(1)), counts(report_of(2))
    for one in (l1, l2):  # the host's, whenever they came
        del one["interrupt"]
    assert l1 == {"vmrun": 28, "msr": 2, "npf": 3, "io": 1}
    assert l2 == {"msr": 7, "io": 7, "cpuid": 7, "DE excp": 7, "hlt": 7, "npf": 4}


def test_both_are_all() -> None:
    whole, one, two = report_of(None), report_of(1), report_of(2)
    assert counts(one) + counts(two) == counts(whole)
    for name in ("samples", "total_ns", "to_userspace", "guest_before_ns"):
        parts = Counter[str]()
        for report in (one, two):
            parts += Counter({row.name: getattr(row, name) or 0 for row in report.exits})
        assert parts == +Counter({row.name: getattr(row, name) or 0 for row in whole.exits}), name
    assert sum(row.count for report in (one, two) for row in report.userspace_exits) == whole.userspace_exits[0].count
    slow = {row.number for report in (one, two) for row in report.slowest}
    assert {row.number for row in whole.slowest} <= slow


def test_accesses_are_those_of_the_level() -> None:
    assert [(row.port, row.count) for row in report_of(2).detail.ports] == [(0x3F8, 7)]
    assert [row.port for row in report_of(1).detail.ports] == [0xF4]
    assert [row.msr for row in report_of(2).detail.msrs] == [0x277]


def test_the_rest_stays_whole_and_the_report_says_so() -> None:
    whole, one = report_of(None), report_of(1)
    assert one.capture.selection == "VM-exits of L1"
    assert (one.vcpus, one.nested, one.perf_compatible) == (whole.vcpus, whole.nested, whole.perf_compatible)


def test_a_level_that_nothing_tells_is_refused() -> None:
    with pytest.raises(UsageError, match="tells of no VM-exit of L2"):
        report_of(2, FIXTURES / "svm-6.12-storm.dat")
