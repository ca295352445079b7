"""A KVM/arm64 with deliberately wrong lines, run for real: rules and predictions see what the catalogue says they see.

One kernel holds all faults, switched on by number; one boot of the lab records a guest with each, and all guests with
none, which is the control.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from faults.arm64_build import faulty_kernel
from faults.arm64_catalogue import ARM64_FAULTS, Arm64Fault, number_of
from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.lab import Job, run_lab
from kvmtrace.predict.align_recording import replay_recording
from kvmtrace.workload.arm64_guests import ARM64_GUESTS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.lab, pytest.mark.slow]
PARAMETER = "/sys/module/kvm/parameters/fault"
CONTROL = sorted(ARM64_GUESTS.keys() - {"storm"})


def _line(number: int, name: str, guest: str, seconds: int) -> str:
    record = f"timeout -s INT 120 kvmtrace record -o {name}.dat --guest {guest}"
    return f"echo {number} >{PARAMETER}; {record}" + (f" -d {seconds}" if seconds else "")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory with a recording for each fault, and of each guest without one."""
    folder = tmp_path_factory.mktemp("arm64-faults")
    (folder / "cwd").mkdir()
    script = [_line(0, f"without-{guest}", guest, 0) for guest in CONTROL]
    script += [_line(number_of(fault), fault.name, fault.guest, 2 * fault.endless) for fault in ARM64_FAULTS]
    job = Job(
        "arm64",
        ("sh", "-c", "\n".join(script)),
        cwd=folder / "cwd",
        out=folder,
        kernel_image=faulty_kernel(),
        timeout_s=3600,
    )
    run_lab(job)
    return folder


@pytest.mark.parametrize("guest", CONTROL)
def test_without_a_fault_it_conforms(guest: str, recorded: Path) -> None:
    path = str(recorded / f"without-{guest}.dat")
    verdict = check_recording(open_recording(path))
    assert (verdict.n_violations, verdict.n_suspicions, verdict.unexplained) == (0, 0, {})
    replay = replay_recording(open_recording(path))
    assert replay is not None
    assert replay.differences == ()


@pytest.mark.parametrize("fault", ARM64_FAULTS, ids=lambda fault: fault.name)
def test_the_fault_is_seen_as_told(fault: Arm64Fault, recorded: Path) -> None:
    path = str(recorded / f"{fault.name}.dat")
    verdict = check_recording(open_recording(path))
    broken = {rule for rule, counts in verdict.rules.items() if counts.violated}
    if fault.rules:
        assert broken & fault.rules, fault.what
    else:
        assert broken == set(), fault.why_not
    replay = replay_recording(open_recording(path))
    assert replay is not None
    assert bool(replay.differences) == fault.replay
