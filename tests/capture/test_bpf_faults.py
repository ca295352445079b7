"""The bpf back end in odd surroundings, and killed: what was recorded is readable, nothing stays in the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from kvmtrace.capture.tracefs import mounted
from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from tests.capture.bpf_held import forgotten_programs
from tests.capture.record_twice import wait_until

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.kvm
KVMTRACE = f"{sys.executable} -m kvmtrace"


def in_namespace(script: str) -> subprocess.CompletedProcess[str]:
    """Run a script with mounts of its own."""
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize("change", ["umount -l {}", "mount -o remount,ro,bind {}"])
def test_tracefs_not_mounted_or_read_only(tmp_path: Path, change: str) -> None:
    done = in_namespace(
        f"{change.format(mounted())} && {KVMTRACE} record --backend bpf -o {tmp_path}/m.bpf --guest lifecycle"
    )
    assert done.returncode == 0, done
    assert open_recording(tmp_path / "m.bpf").events().count("kvm_userspace_exit") == 102


def test_read_only_output(tmp_path: Path) -> None:
    done = in_namespace(
        f"mount -t tmpfs -o ro none {tmp_path}; {KVMTRACE} record --backend bpf -o {tmp_path}/m -- true"
    )
    assert done.returncode == 4, done
    assert "Read-only file system" in done.stderr
    assert done.stderr.count("\n") == 1


def test_closed_pipe(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    argv = [*KVMTRACE.split(), "record", "--backend", "bpf", "-o", str(tmp_path / "x.bpf"), "--guest", "lifecycle"]
    with subprocess.Popen(argv, stdout=write, stderr=write) as recorder:
        os.close(write)
        assert recorder.wait(timeout=300) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.bpf"]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    trials, kept = int(os.environ.get("KVMTRACE_TRIALS", "50")), 0
    output = tmp_path / "killed.bpf"
    for trial in range(trials):
        argv = [
            *KVMTRACE.split(),
            "record",
            "--force",
            "--backend",
            "bpf",
            "-o",
            str(output),
            "--guest",
            "storm",
            "--count",
            "100000000",
        ]
        with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as recorder:
            time.sleep(0.2 + 1.2 * (trial * 0.618 % 1))
            recorder.kill()
        wait_until(lambda: not forgotten_programs())
        subprocess.run([*KVMTRACE.split(), "doctor"], capture_output=True, check=False)
        wait_until(lambda: not list(tmp_path.glob(".killed*")))
        if output.exists():
            kept += 1
            recording = open_recording(output)
            recording.events()
            # a kill amid a write leaves a part of a frame, at the end alone
            assert all(damage.offset > output.stat().st_size - 1000 for damage in recording.loss.damage)
            assert not check_recording(recording).n_violations
            output.unlink()
    print(f"{trials} trials, {kept} with something to keep")
    assert kept
