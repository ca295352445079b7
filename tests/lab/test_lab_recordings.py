"""Recordings made in the labs: the guests' known counts, and trace-cmd beside us, on real kvm_intel and kvm_amd."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from lab.counting import count_with_trace_cmd

from kvmtrace.formats import open_recording
from kvmtrace.isa.registry import BY_NAME
from kvmtrace.lab import Job, LabRecording, record_in_lab, run_lab
from kvmtrace.workload.result import GuestRun

if TYPE_CHECKING:
    from pathlib import Path

GUESTS = ("lifecycle", "interrupt", "smp", "string-io", "mmio-split", "triple-fault", "msr-gp")
RUN_PROBE = {"vmx": "vmx_vcpu_run", "svm": "svm_vcpu_run"}
# wall-clock goals once cached, seconds; twice that on a machine that does other things too
GOAL_S = {"vmx": 90, "svm": 25}


def record(isa: str, kernel: str, out: Path, recordings: list[LabRecording]) -> float:
    job = Job(isa, ("true",), kernel, out=out, timeout_s=1200)
    return record_in_lab(recordings, job).wall_s


def check_counts(path: Path, isa: str) -> None:
    """The recording holds what the guest is known to have done, and its KVM_RUNs are bracketed by probes."""
    recording = open_recording(str(path))
    table = recording.events()
    run = GuestRun.from_dict(recording.capture.meta["guest_run"])
    assert run.isa == isa
    assert run.succeeded
    assert recording.loss.events == 0
    for name, count in run.known.tracepoints.items():
        assert len(table.rows(name)) == count, name
    exits = Counter(BY_NAME[isa].describe(int(reason)) for reason in table.field("kvm_exit", "exit_reason"))
    known = run.known.vmx if isa == "vmx" else run.known.svm
    assert {name: exits[name] for name in known} == known
    entries = len(table.rows("kvm_entry"))
    assert len(table.rows(RUN_PROBE[isa])) == len(table.rows(f"{RUN_PROBE[isa]}_return")) == entries > 0
    assert len(table.rows("kvm_vcpu_ioctl")) == len(table.rows("kvm_vcpu_ioctl_return")) > 0


def check_against_trace_cmd(path: Path) -> None:
    """trace-cmd, recording at the same time, saw the same KVM events and exit reasons."""
    table = open_recording(str(path)).events()
    events, reasons = count_with_trace_cmd(path.with_suffix(".trace-cmd.dat"))
    for name in ("kvm_entry", "kvm_exit", "kvm_userspace_exit", "kvm_pio", "kvm_mmio", "kvm_cpuid", "kvm_msr"):
        ours = len(table.rows(name)) if any(kind.name == name for kind in table.kinds) else 0
        assert ours == events[name], name
    assert Counter(map(int, table.field("kvm_exit", "exit_reason"))) == reasons


@pytest.mark.lab_smoke
@pytest.mark.parametrize("isa", ["svm", "vmx"])
def test_lifecycle_in_the_lab(isa: str, tmp_path: Path):
    wall_s = record(isa, "6.1", tmp_path, [LabRecording("lifecycle", with_trace_cmd=True)])
    check_counts(tmp_path / "lifecycle.dat", isa)
    check_against_trace_cmd(tmp_path / "lifecycle.dat")
    # the first run also fetches kernels and builds images
    assert wall_s < 600


@pytest.mark.lab
@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
@pytest.mark.parametrize("isa", ["svm", "vmx"])
def test_every_guest(isa: str, kernel: str, tmp_path: Path):
    recordings = [LabRecording(guest, with_trace_cmd=True) for guest in GUESTS]
    record(isa, kernel, tmp_path, [*recordings, LabRecording("storm", count=997)])
    for guest in (*GUESTS, "storm"):
        check_counts(tmp_path / f"{guest}.dat", isa)
    for guest in GUESTS:
        check_against_trace_cmd(tmp_path / f"{guest}.dat")


@pytest.mark.lab
@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("isa", ["svm", "vmx"])
def test_qemu_boots_linux(isa: str, vcpus: int, tmp_path: Path):
    record(isa, "6.1", tmp_path, [LabRecording("linux", vcpus, with_trace_cmd=True)])
    path = tmp_path / f"linux-{vcpus}vcpu.dat"
    check_against_trace_cmd(path)
    table = open_recording(str(path)).events()
    assert len(table.rows("kvm_exit")) > 2000
    assert set(map(int, table.field("kvm_entry", "vcpu_id"))) == set(range(vcpus))
    assert len(table.rows(RUN_PROBE[isa])) >= len(table.rows("kvm_entry"))


@pytest.mark.lab
@pytest.mark.parametrize("isa", ["svm", "vmx"])
def test_wall_clock_goal(isa: str, tmp_path: Path):
    run_lab(Job(isa, ("true",), cwd=tmp_path))  # fetch and build
    start = time.monotonic()
    record(isa, "6.1", tmp_path / "out", [LabRecording("lifecycle")])
    assert time.monotonic() - start < 2 * GOAL_S[isa]


@pytest.mark.lab_smoke
def test_exit_code_files_and_isolation(tmp_path: Path):
    """The command's exit code comes back, its files only with -o, and the real directory stays as it is."""
    (tmp_path / "given").write_text("from outside")
    (tmp_path / "gone").touch()
    script = (
        "cat given; rm gone; mkdir d; echo made >d/new; echo changed >given; uname -r | tee /dev/stderr >d/u; rm d/u"
    )
    job = Job("svm", ("sh", "-c", f"{script}; exit 7"), "6.12", cwd=tmp_path, out=tmp_path / "out")
    result = run_lab(job)
    assert (result.status, result.stdout) == (7, b"from outside")
    assert result.stderr.decode().strip() == result.kernel
    assert result.files == ("d/new", "given")
    assert (tmp_path / "given").read_text() == "from outside"
    assert (tmp_path / "gone").exists()
    assert (tmp_path / "out" / "given").read_text() == "changed\n"
