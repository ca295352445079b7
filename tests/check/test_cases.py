"""Small text traces with their verdict: tests/cases/NAME.txt, `# expect: clean` or the rules that are broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.check.rule_registry import all_rules
from kvmtrace.formats import open_recording

RULES = all_rules()
CASES = sorted((Path(__file__).parents[1] / "cases").glob("*.txt"))


def verdict(path: Path) -> set[str]:
    lines = [line for line in path.read_text().splitlines() if line.startswith("# expect:")]
    assert len(lines) == 1, "each case states its verdict once"
    rules = set(lines[0].removeprefix("# expect:").split())
    return rules - {"clean"}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path) -> None:
    comparison = check_recording(open_recording(path))
    found = {violation.rule for violation in comparison.violations}
    assert found == verdict(path), [(v.rule, v.event, v.expected, v.observed) for v in comparison.violations]


def test_cases_exist_for_each_rule() -> None:
    covered = set().union(*(verdict(path) for path in CASES))
    # J3 counts legal losses, J5 needs kernels from 6.14 on
    assert covered == RULES.keys() - {"J3", "J5"}


def test_violations_locate_and_explain() -> None:
    path = next(path for path in CASES if path.stem == "cpuid-not-skipped")
    comparison = check_recording(open_recording(path))
    violation = comparison.first_divergence
    assert violation is not None
    assert (violation.rule, violation.event, violation.tid, violation.vcpu_id) == ("V6", "kvm_entry", 100, 0)
    assert "CPUID" in violation.expected
    assert "0x1010" in violation.observed
    assert violation.why == RULES["V6"].sentence
    assert [event.event for event in violation.context][-1] == "kvm_entry"
    assert comparison.n_violations == 1
