"""Every rule carries a healthy trace, which holds, and a broken one, which that rule finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.check.examples import text_trace
from kvmtrace.check.rule_registry import all_rules
from kvmtrace.formats import open_recording

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.check.rule import Rule
    from kvmtrace.check.verdict import Comparison

RULES = all_rules().values()
# J3 counts the losses that V9 excuses
WITHOUT_BROKEN = {"J3"}


def outcome(example: str, tmp_path: Path) -> Comparison:
    path = tmp_path / "example.txt"
    path.write_text(text_trace(example))
    return check_recording(open_recording(path))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_healthy_example_holds(rule: Rule, tmp_path: Path) -> None:
    comparison = outcome(rule.healthy, tmp_path)
    assert [(v.rule, v.expected, v.observed) for v in comparison.violations] == []
    assert comparison.rules[rule.id].checked > 0 or rule.id in WITHOUT_BROKEN, comparison.not_checked


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.id not in WITHOUT_BROKEN], ids=lambda rule: rule.id)
def test_broken_example_is_found_by_its_rule(rule: Rule, tmp_path: Path) -> None:
    comparison = outcome(rule.broken, tmp_path)
    assert rule.id in {violation.rule for violation in comparison.violations}, comparison.not_checked


def test_examples_are_short() -> None:
    for rule in RULES:
        assert len(rule.healthy.splitlines()) <= 24, rule.id
        assert len(rule.broken.splitlines()) <= 24, rule.id
