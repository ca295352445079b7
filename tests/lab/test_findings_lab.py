"""docs/findings.md again, in the lab: the reproducers show what the text says, on the kernels that it names."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.lab import Job, run_lab

pytestmark = [pytest.mark.lab]
SOURCE = Path(__file__).parent / "findings" / "finding.c"


def run(mode: str, kernel: str, folder: Path, milliseconds: int = 5000, isa: str = "svm") -> tuple[Path, str]:
    """Record a mode of finding.c in a lab; return the recording and what the program printed."""
    work, out = folder / "work", folder / "out"
    work.mkdir()
    subprocess.run(["cc", "-static", "-O1", "-o", work / "finding", SOURCE], check=True)
    record = ("kvmtrace", "record", "--backend", "ftrace", "-o", "run.dat", "--")
    job = Job(isa, (*record, "./finding", mode, str(milliseconds)), kernel, cwd=work, out=out, retries=1)
    result = run_lab(job)
    assert result.status == 0, result.stderr.decode()
    return out / "run.dat", result.stdout.decode()


@pytest.mark.parametrize(("kernel", "loops"), [("7", True), ("6.12", False)])
def test_int_to_a_device(kernel: str, loops: bool, tmp_path: Path) -> None:
    path, printed = run("int-to-device", kernel, tmp_path)
    verdict = check_recording(open_recording(path))
    assert verdict.n_violations == 0
    assert (verdict.rules["H3"].violated > 0) == loops, printed
    assert ("errno 4" in printed) == loops, "only the alarm ends it"


def test_icebp_under_tcg(tmp_path: Path) -> None:
    _, printed = run("icebp", "6.12", tmp_path)
    assert "port 0x20 value 0x6" in printed, "#UD; a processor raises #DB, 0x1"


def test_int3_under_tcg(tmp_path: Path) -> None:
    path, _ = run("int3-fresh-stack", "6.12", tmp_path)
    events = open_recording(path).events()
    assert 0x80000403 in events.field("kvm_exit", "intr_info"), "type 4; a processor says 3"


def test_a_masked_loop_under_bochs(tmp_path: Path) -> None:
    path, _ = run("masked-loop", "6.1", tmp_path, 20_000, "vmx")
    events = open_recording(path).events()
    entry, leave = events.rows("kvm_entry")[-1], events.rows("kvm_exit")[-1]
    assert events.field("kvm_exit", "exit_reason")[-1] == 12, "HLT"
    assert events.ts_ns[leave] - events.ts_ns[entry] > 100 * 4_000_000, "a hundred ticks of the host's timer"
