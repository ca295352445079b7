"""KVM modules with a deliberately wrong line, run for real: the comparison with the model names the fault.

Each fault is built from Debian's kernel source (a minute once, then some seconds), loaded in the lab, made to
happen by a guest, and recorded by kvmtrace. The same modules without a fault are the control.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from faults.build import build_modules
from faults.catalogue import FAULTS, Fault
from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.lab.job import Job
from kvmtrace.lab.lab_run import run_lab

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.check.verdict import Comparison

pytestmark = [pytest.mark.lab, pytest.mark.slow]


def record(folder: Path, isa: str, modules: Path, target: tuple[str, ...], kernel_args: tuple[str, ...] = ()) -> Path:
    """Record a target on a lab host with these modules; a broken guest may well end badly."""
    work, out = folder / "work", folder / "out"
    work.mkdir()
    command = ("kvmtrace", "record", "--backend", "ftrace", "-o", "run.dat", *target)
    run_lab(
        Job(isa=isa, command=command, cwd=work, out=out, timeout_s=240, module_dir=modules, kernel_args=kernel_args)
    )
    return out / "run.dat"


def compare(path: Path) -> Comparison:
    """Compare a recording with the model."""
    return check_recording(open_recording(str(path)))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_named(fault: Fault, tmp_path: Path) -> None:
    modules = build_modules(fault, tmp_path)
    comparison = compare(record(tmp_path, fault.isa, modules, fault.target, fault.kernel_args))
    broken = {rule for rule, counts in comparison.rules.items() if counts.violated}
    assert broken & fault.rules, f"{fault.what} Broken rules: {sorted(broken) or 'none'}"
    assert comparison.n_violations or fault.suspicion
    first = comparison.first_divergence
    assert first is not None
    assert first.expected != first.observed


@pytest.mark.parametrize("isa", ["vmx", "svm"])
def test_the_same_modules_without_a_fault_conform(isa: str, tmp_path: Path) -> None:
    modules = build_modules(None, tmp_path)
    comparison = compare(record(tmp_path, isa, modules, ("--guest", "lifecycle", "--count", "2")))
    assert comparison.conforms, comparison.first_divergence
    assert comparison.n_suspicions == 0
    assert comparison.rules["V6"].checked > 100
