"""H3: faults that come again while the VM's memory is being changed are KVM's way to wait."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.check.examples import text_trace
from kvmtrace.check.rule_registry import all_rules
from kvmtrace.formats import open_recording
from kvmtrace.model.thresholds import threshold

if TYPE_CHECKING:
    from pathlib import Path

STUCK = text_trace(all_rules()["H3"].broken)
UNMAP = (
    "             vmm-99    [001] ..... {:.9f}: kvm_unmap_hva_range: mmu notifier unmap range: 0x7f0000 -- 0x7f1000\n"
)
TIME = re.compile(r" (\d+\.\d+): ")


def found(text: str, tmp_path: Path) -> set[str]:
    path = tmp_path / "trace.txt"
    path.write_text(text)
    return {violation.rule for violation in check_recording(open_recording(path)).violations}


def first_time() -> float:
    match = TIME.search(STUCK)
    assert match is not None
    return float(match[1])


def with_unmap(seconds_before: float) -> str:
    line = UNMAP.format(first_time() - seconds_before)
    events = STUCK.splitlines(keepends=True)
    at = next(i for i, event in enumerate(events) if TIME.search(event))
    return "".join([*events[:at], line, *events[at:]])


def test_without_a_change_nothing_is_waited_for(tmp_path: Path) -> None:
    assert found(STUCK, tmp_path) == {"H3"}


@pytest.mark.parametrize(("share", "rules"), [(0.001, set()), (0.5, set()), (1.5, {"H3"})])
def test_faults_are_retried_while_memory_is_changed(share: float, rules: set[str], tmp_path: Path) -> None:
    assert found(with_unmap(share * threshold("remap_takes") / 1e9), tmp_path) == rules
