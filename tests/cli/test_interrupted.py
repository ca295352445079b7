"""Reading commands finish what a killed recorder left beside the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kvmtrace.capture.ftrace.assemble import seal
from kvmtrace.capture.ftrace.trace_dat_writer import Tail, build_head
from kvmtrace.capture.spool import Spool
from kvmtrace.cli import interrupted


@pytest.mark.kvm
def test_report_finishes_the_recording_first(tmp_path: Path) -> None:
    tracefs = Path("/sys/kernel/tracing")
    output = tmp_path / "run.dat"
    spool = Spool.create(output)
    spool.write_file("head", build_head(tracefs, tracefs, [("kvm", "kvm_pio")]))
    seal(spool, Tail({}, {}, "[mono]", "test"), {"schema": "kvmtrace.capture/1", "notes": [], "clock": "mono"})
    spool.close()
    done = subprocess.run(
        [sys.executable, "-m", "kvmtrace", "report", str(output), "--format", "json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # another test's command may have been first; the file is there either way
    assert not done.stderr or f"finished the recording of a killed recorder: {output}" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.dat"]


def test_nothing_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted.finish_interrupted([str(tmp_path / "a.dat"), "-", str(tmp_path / "no/such/b.dat")])
    assert capsys.readouterr().err == ""
