"""Real lab hosts that fail: what they had made comes back; two CPUs hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmtrace.lab import Job, LabFailedError, LabRecording, record_in_lab, run_lab

if TYPE_CHECKING:
    from pathlib import Path

PANIC = "echo first >a.txt; rm b.txt; sleep 15; echo c >/proc/sysrq-trigger; sleep 60"


@pytest.mark.lab
@pytest.mark.parametrize("isa", ["svm", "vmx"])
def test_a_panic_at_the_end_loses_nothing(isa: str, tmp_path: Path) -> None:
    (tmp_path / "cwd").mkdir()
    (tmp_path / "cwd" / "b.txt").write_text("b")
    job = Job(isa, ("sh", "-c", PANIC), cwd=tmp_path / "cwd", out=tmp_path / "out")
    with pytest.raises(LabFailedError, match=r"panicked.*1 file that was complete is in"):
        run_lab(job)
    assert (tmp_path / "out" / "a.txt").read_text() == "first\n"


@pytest.mark.lab
@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_two_cpus(kernel: str, tmp_path: Path) -> None:
    job = Job("svm", ("true",), kernel=kernel, cpus=2, out=tmp_path)
    record_in_lab([LabRecording("smp"), LabRecording("interrupt"), LabRecording("lifecycle")], job)
    assert {path.name for path in tmp_path.iterdir()} == {"smp.dat", "interrupt.dat", "lifecycle.dat"}
