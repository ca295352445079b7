"""KVM's own selftests in the lab: whatever they do, healthy KVM is called healthy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from selftests.build import build_selftests
from selftests.plan import ENVIRONMENT, split
from selftests.run import PASSED, SKIPPED, run_selftests

if TYPE_CHECKING:
    from pathlib import Path

    from selftests.run import Outcome

HOSTS = [
    *(("svm", kernel, None) for kernel in ("6.1", "6.12", "7")),
    ("vmx", "6.1", None),
    ("arm64", "6.1", "vhe"),
    ("arm64", "6.12", "nvhe"),
]


def row(outcome: Outcome) -> tuple[str, int, int]:
    """Return a line of the table, and the violations and suspicions found."""
    if outcome.recording is None:
        return f"{outcome.name:34} {outcome.word:12} no recording", 0, 0
    verdict = check_recording(open_recording(outcome.recording))
    broken = ", ".join(f"{rule} {result.violated}" for rule, result in verdict.rules.items() if result.violated)
    line = f"{outcome.name:34} {outcome.word:12} {verdict.n_events:>9,} events  {broken or 'conforms'}"
    return line, verdict.n_violations, verdict.n_suspicions


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.parametrize(("isa", "kernel", "mode"), HOSTS)
def test_selftests_conform(isa: str, kernel: str, mode: str | None, tmp_path: Path) -> None:
    outcomes = run_selftests(isa, kernel, tmp_path, mode=mode)
    found = [(outcome, *row(outcome)) for outcome in outcomes]
    selftests = build_selftests(isa, kernel)
    _, left_out = split(isa, selftests.built)
    print(f"\nselftests of linux-source {selftests.version} on {isa} {kernel}")
    print("\n".join(line for _, line, _, _ in found))
    print("\n".join(f"{name:34} not run: {why}" for name, why in left_out.items()))
    print("\n".join(f"{name:34} does not compile in this source" for name in selftests.not_built))
    assert not [line for _, line, violations, suspicions in found if violations or suspicions]
    failed = {outcome.name for outcome in outcomes if outcome.status not in (PASSED, SKIPPED)}
    assert failed <= ENVIRONMENT.keys(), failed
    assert sum(outcome.status == PASSED for outcome in outcomes) > len(outcomes) // 3


def test_what_is_left_out_has_a_reason() -> None:
    run, left_out = split("svm", ("smm_test", "vmx_msrs_test", "rseq_test"))
    assert run == ["smm_test"]
    assert left_out == {"vmx_msrs_test": "of the other instruction set", "rseq_test": left_out["rseq_test"]}
    assert "load test" in left_out["rseq_test"]
