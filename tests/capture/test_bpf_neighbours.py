"""Recording with BPF takes nothing from others who watch the same tracepoints, and goes away."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from kvmtrace.formats import open_recording
from tests.capture.bpf_held import forgotten_programs
from tests.capture.record_twice import wait_until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.kvm, pytest.mark.slow]


def test_perf_sees_its_events_while_we_record(tmp_path: Path) -> None:
    perf = subprocess.Popen(
        ["perf", "record", "-q", "-a", "-e", "kvm:kvm_userspace_exit", "-o", str(tmp_path / "perf.data"), "sleep", "4"],
        stderr=subprocess.DEVNULL,
    )
    time.sleep(0.7)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "kvmtrace",
            "record",
            "--backend",
            "bpf",
            "--guest",
            "lifecycle",
            "-o",
            str(tmp_path / "l.bpf"),
        ],
        check=True,
        capture_output=True,
    )
    perf.wait(30)
    ours = open_recording(tmp_path / "l.bpf").events().count("kvm_userspace_exit")
    shown = subprocess.run(
        ["perf", "report", "-i", str(tmp_path / "perf.data"), "--stats"], capture_output=True, text=True, check=True
    ).stdout
    match = re.search(r"SAMPLE events:\s+(\d+)", shown)
    assert ours == 102
    assert match is not None
    assert int(match[1]) >= ours


def test_no_program_stays_loaded(tmp_path: Path) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "kvmtrace",
            "record",
            "--backend",
            "bpf",
            "--events",
            "minimal",
            "--guest",
            "lifecycle",
            "-o",
            str(tmp_path / "l.bpf"),
        ],
        check=True,
        capture_output=True,
    )
    wait_until(lambda: not forgotten_programs())
