"""What recording asks for: neither root nor more than it needs, and it says in one line what is missing."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmtrace.formats import open_recording
from tests.capture.record_twice import bpf_runs, ftrace_runs, start_guest, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.skipif(os.geteuid() != 0, reason="becoming nobody takes root")]

NOBODY = 65534
# reading tracefs, which is root's alone here; `mount -o remount,gid=GROUP,mode=750` would change it for everybody
READ_TRACEFS = "+dac_read_search"
LIFECYCLE_USERSPACE_EXITS = 102


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory of nobody's that nobody can reach."""
    path = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="kvmtrace-test-"))
    os.chown(path, NOBODY, NOBODY)
    yield path
    shutil.rmtree(path)


def command(folder: Path, capabilities: str, *arguments: str) -> list[str]:
    """Return the argv of kvmtrace run by nobody with these capabilities."""
    setpriv = [
        "setpriv",
        f"--reuid={NOBODY}",
        f"--regid={NOBODY}",
        "--clear-groups",
        f"--inh-caps={capabilities}",
        f"--ambient-caps={capabilities}",
        "--",
    ]
    return ["env", "-C", str(folder), f"HOME={folder}", *setpriv, sys.executable, "-m", "kvmtrace", *arguments]


def run(folder: Path, capabilities: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, capabilities, *arguments), capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    ("capabilities", "arguments", "says"),
    [
        ("-all", ["--backend", "bpf"], "need CAP_BPF and CAP_PERFMON; run it as root"),
        ("+bpf", ["--backend", "bpf"], "need CAP_PERFMON; run it as root"),
        ("+perfmon", ["--backend", "bpf"], "need CAP_BPF; run it as root"),
        ("+perfmon", ["--summary"], "need CAP_BPF; run it as root"),
        ("+bpf,+perfmon", ["--backend", "bpf"], "let a group of yours read it: mount -o remount,gid="),
        ("-all", ["--backend", "ftrace"], "/instances; run it as root"),
        (READ_TRACEFS, ["--backend", "ftrace"], "/instances; run it as root"),
    ],
)
def test_what_is_missing_is_one_line(folder: Path, capabilities: str, arguments: list[str], says: str) -> None:
    done = run(folder, capabilities, "record", *arguments, "-o", "x", "-p", str(os.getpid()), "-d", "1")
    assert done.returncode == 4, done
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in folder.iterdir() if path.name != ".cache"] == []


@pytest.mark.parametrize(
    ("backend", "capabilities"), [("bpf", f"+bpf,+perfmon,{READ_TRACEFS}"), ("ftrace", "+dac_override")]
)
def test_a_user_with_capabilities_records_as_well_as_root(folder: Path, backend: str, capabilities: str) -> None:
    output = folder / "x.dat"
    guest, go = start_guest("lifecycle", [])
    argv = command(folder, capabilities, "record", "--backend", backend, "-o", "x.dat", "-p", str(guest.pid))
    with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as recorder:
        wait_until(lambda: bpf_runs(output) if backend == "bpf" else ftrace_runs(recorder.pid), recorder)
        os.write(go, b"G")
        os.close(go)
        guest.wait()
        errors = recorder.communicate(timeout=300)[1]
    assert recorder.returncode == 0, errors
    recording = open_recording(output)
    assert recording.events().count("kvm_userspace_exit") == LIFECYCLE_USERSPACE_EXITS
    assert recording.loss.events == 0
    status = output.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (NOBODY, NOBODY, 0o600)
    report = run(folder, "-all", "report", "x.dat")  # which takes no privilege at all
    assert (report.returncode, report.stderr) == (0, "")
    assert "KVM_EXIT_IO" in report.stdout
    assert not list(Path("/sys/kernel/tracing/instances").glob(f"kvmtrace-{recorder.pid}-*"))


def test_doctor_says_what_the_capabilities_allow(folder: Path) -> None:
    text = run(folder, f"+bpf,+perfmon,{READ_TRACEFS}", "doctor").stdout
    assert "uid 65534, CAP_BPF, CAP_PERFMON" in text
    assert "--backend bpf: records tracepoints" in text
    assert "--backend ftrace: cannot be used here" in text
    text = run(folder, "+bpf,+perfmon", "doctor").stdout
    assert "--backend bpf: cannot be used here (tracepoints: unknown without access" in text
