"""Faults in KVM's nested SVM code, run for real, all in one boot: the comparison with the model names each.

The same guests on the same modules without a fault are the control.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from history.run import record
from history.steps import Step

from faults.catalogue import Edit
from faults.nested import NESTED_FAULTS
from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording

if TYPE_CHECKING:
    from pathlib import Path

    from faults.catalogue import Fault
    from kvmtrace.check.verdict import Comparison

CONTROLS = {f"healthy-{target[-1]}": target for target in dict.fromkeys(fault.target for fault in NESTED_FAULTS)}
STEPS = (
    *(Step(name, (), (), target) for name, target in CONTROLS.items()),
    *(
        Step(fault.name, (Edit(fault.file, fault.function, fault.pattern, fault.replacement),), (), fault.target)
        for fault in NESTED_FAULTS
    ),
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with NAME.dat of every step."""
    out = tmp_path_factory.mktemp("nested")
    record("svm", STEPS, out)
    return out


def compare(path: Path) -> Comparison:
    """Compare a recording with the model."""
    return check_recording(open_recording(str(path)))


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.parametrize("fault", NESTED_FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_named(fault: Fault, recorded: Path) -> None:
    comparison = compare(recorded / f"{fault.name}.dat")
    broken = {rule for rule, counts in comparison.rules.items() if counts.violated}
    assert broken & fault.rules, f"{fault.what} Broken rules: {sorted(broken) or 'none'}"
    assert comparison.n_violations


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROLS)
def test_the_same_modules_without_a_fault_conform(name: str, recorded: Path) -> None:
    comparison = compare(recorded / f"{name}.dat")
    assert (comparison.n_violations, comparison.n_suspicions) == (0, 0), comparison.first_divergence
    assert comparison.rules["N6"].checked > 4
