"""`kvmtrace doctor` on this host and on imagined ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from kvmtrace.capture import diagnosis as doctor
from kvmtrace.capture import host, host_checks
from kvmtrace.capture.diagnosis import Diagnosis
from kvmtrace.capture.host_checks import MISSING, OK, OPTIONAL, Check
from kvmtrace.cli.doctor import render

if TYPE_CHECKING:
    from pathlib import Path


def run(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmtrace", "doctor", *args],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **more,
    )


def test_json_agrees_with_the_exit_code() -> None:
    done = run("--format", "json")
    report = json.loads(done.stdout)
    assert report["schema"] == "kvmtrace.doctor/1"
    assert done.returncode == (0 if report["can_record"] else 4)
    assert {check["state"] for check in report["checks"]} <= {OK, MISSING, OPTIONAL}
    assert all(check["remedy"] for check in report["checks"] if check["state"] == MISSING)


def test_text_fits_and_has_no_colour_in_a_pipe() -> None:
    done = run()
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "\x1b" not in done.stdout
    assert "--backend ftrace" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming nobody takes root")
def test_nobody_can_record_nothing() -> None:
    done = run("--format", "json", user=65534, group=65534, extra_groups=[], cwd="/")
    report = json.loads(done.stdout)
    assert done.returncode == 4, done.stderr
    assert not done.stderr
    states = {check["name"]: check for check in report["checks"]}
    assert states["privileges"]["state"] == MISSING
    assert "sudo" in states["tracefs"]["remedy"]
    assert not report["backends"]["ftrace"]["usable"]


def states(**changed: Check) -> dict[str, Check]:
    names = ["privileges", "lockdown", "tracefs", "tracepoints", "kprobes", "bcc"]
    return {name: Check(name, OK, "none") for name in names} | changed


def test_backends_follow_from_the_checks() -> None:
    assert doctor._ftrace(states())["records"] == ["tracepoints", "kprobes"]
    locked = states(lockdown=Check("lockdown", OPTIONAL, "confidentiality"))
    assert not doctor._ftrace(locked)["usable"]
    assert not doctor._bpf(locked)["usable"]
    no_bcc = states(bcc=Check("bcc", OPTIONAL, "not importable"))
    assert doctor._ftrace(no_bcc)["usable"]
    assert "bcc: not importable" in doctor._bpf(no_bcc)["why"]
    unmounted = Check("tracefs", OPTIONAL, "not mounted")
    unknown = Check("tracepoints", OPTIONAL, "unknown without access to tracefs")
    assert doctor._bpf(states(tracefs=unmounted, tracepoints=unknown))["usable"]
    assert not doctor._bpf(states(tracepoints=unknown))["usable"]
    no_probes = states(kprobes=Check("kprobes", OPTIONAL, "not in this kernel"))
    assert doctor._ftrace(no_probes)["records"] == ["tracepoints"]


def test_rendering_wraps_remedies() -> None:
    long = Check("thing", MISSING, "not there", "do this " * 30)
    diagnosis = Diagnosis(
        {"host": "h", "kernel": "6.1", "cpu_model": None},
        (long,),
        {"ftrace": {"usable": False, "records": [], "why": "thing: not there"}},
    )
    lines = render(diagnosis, 60)
    assert not diagnosis.can_record
    assert max(len(line) for line in lines if not line.startswith("\x1b")) <= 60
    assert "unknown CPU" in lines[0]


@pytest.mark.parametrize(("there", "state"), [(True, OK), (False, OPTIONAL)])
def test_arm64_has_neither_vmx_nor_svm(
    there: bool, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There KVM needs EL2, and nothing is switched on in the firmware of a host whose /dev/kvm works."""
    monkeypatch.setattr(host_checks.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(host_checks, "DEVICE", tmp_path / "kvm")
    if there:
        (tmp_path / "kvm").touch()
    check = host_checks.check_hardware()
    assert check.state == state
    assert "VMX" not in check.found
    assert check.remedy == "" if there else "--isa arm64" in check.remedy


def test_an_arm_cpu_is_named_by_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd07\nCPU revision\t: 0\n")
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    assert host.cpu_model() == "Arm CPU of implementer 0x41, part 0xd07"
