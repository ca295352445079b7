"""Names on this machine's KVM: two QEMUs with names of their own, and a VMM that renames its threads all the time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.report.build import ReportOptions, build_report

pytestmark = [pytest.mark.kvm, pytest.mark.slow]

UUIDS = {"web-1": "11111111-2222-3333-4444-555555555555", "web-2": "11111111-2222-3333-4444-666666666666"}
RENAMING = """
import pathlib, threading, time
from kvmtrace.workload import run_guest
def rename():
    for number in range(10**9):
        for task in pathlib.Path("/proc/self/task").iterdir():
            try:
                (task / "comm").write_text(f"CPU {number % 7}/KVM" if number % 2 else f"no name {number}")
            except OSError:
                pass
        time.sleep(0.001)
threading.Thread(target=rename, daemon=True).start()
run_guest("lifecycle", {"count": 100})
"""


def qemu(name: str) -> subprocess.Popen[bytes]:
    """Start a VM whose firmware looks for something to boot."""
    words = ["-accel", "kvm", "-name", f"guest={name},debug-threads=on", "-uuid", UUIDS[name], "-m", "32"]
    quiet = ["-display", "none", "-nodefaults", "-no-user-config", "-serial", "none", "-monitor", "none"]
    return subprocess.Popen(["qemu-system-x86_64", *words, *quiet], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_who_is_who_whatever_threads_are_called(tmp_path: Path) -> None:
    output = tmp_path / "all.dat"
    argv = [sys.executable, "-m", "kvmtrace", "record", "--backend", "ftrace", "-a", "-d", "12", "-o", str(output)]
    recorder = subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        until = time.monotonic() + 30
        while not list(Path("/sys/kernel/tracing/instances").glob(f"kvmtrace-{recorder.pid}-*")):
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(2)
        started |= {name: qemu(name) for name in UUIDS}
        started["renaming"] = subprocess.Popen([sys.executable, "-P", "-c", RENAMING])
        assert recorder.wait(120) == 0
    finally:
        for process in (recorder, *started.values()):
            process.kill()
            process.wait()
    recording = open_recording(output)
    rows = {row["pid"]: row for row in recording.capture.meta["vms"]}
    for name, uuid in UUIDS.items():
        row = rows[started[name].pid]
        assert (row["kind"], row["name"], row["uuid"]) == ("qemu", name, uuid)
        asked = [sys.executable, "-m", "kvmtrace", "report", "--vm", name, "--no-model", "--format", "json"]
        own = json.loads(subprocess.run([*asked, str(output)], check=True, capture_output=True).stdout)
        assert {(vcpu["pid"], vcpu["vm"]) for vcpu in own["vcpus"]} == {(started[name].pid, name)}
    report = build_report(recording, ReportOptions(model=False))
    assert {started[name].pid for name in started} <= {vm.pid for vm in report.vms}
    (vcpu,) = (one for one in report.vcpus if one.pid == started["renaming"].pid)
    assert vcpu.userspace_exits == 101 * 100 + 1, "whatever it is called: of the guest lifecycle, 100 times"
    assert not check_recording(open_recording(output)).n_violations
