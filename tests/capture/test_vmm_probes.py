"""uprobes on the VMM: which binary is probed, with what, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmtrace.bring_up.follow import follow_bring_up
from kvmtrace.capture.ftrace import vmm_probes
from kvmtrace.capture.ftrace.vmm_probes import add_vmm_probes, vmm_binary
from kvmtrace.capture.settings import META_MAGIC, TargetSpec
from kvmtrace.capture.tracefs import mounted
from kvmtrace.formats import open_recording
from kvmtrace.kvm.vmm_symbols import VMM_FUNCTIONS
from kvmtrace.model.bring_up import VMM_ORDER

if TYPE_CHECKING:
    from collections.abc import Iterable

KVMTRACE = (sys.executable, "-m", "kvmtrace")
QEMU = "qemu-system-x86_64"
GUEST = (QEMU, "-accel", "kvm", "-m", "64", "-display", "none", "-nodefaults", "-smp", "2")


class FakeProbes:
    """Takes what it is given, but for the events in `refused`."""

    def __init__(self, refused: Iterable[str] = ()) -> None:
        self.refused = set(refused)
        self.lines: dict[str, tuple[str, tuple[str, ...], bool]] = {}

    def add_user(self, name: str, place: str, fields: tuple[str, ...], *, is_return: bool) -> bool:
        if name in self.refused:
            return False
        assert name not in self.lines
        self.lines[name] = (place, fields, is_return)
        return True


def command(*argv: str) -> TargetSpec:
    return TargetSpec("command", command=argv)


def qemu_path() -> Path:
    found = shutil.which(QEMU)
    assert found
    return Path(found).resolve()


@pytest.mark.parametrize(
    "argv",
    [
        GUEST,
        ("timeout", "1", *GUEST),
        ("strace", "-f", "-o", "log", *GUEST),
        ("sh", "-c", f"exec {QEMU} -accel kvm"),
        (f"/usr/bin/{QEMU}",),
    ],
)
def test_qemu_is_found_also_behind_a_wrapper(argv: tuple[str, ...]) -> None:
    assert vmm_binary(command(*argv)) == qemu_path()


@pytest.mark.parametrize(
    "target",
    [
        command("true"),
        command("no-such-program"),
        command(sys.executable, "-m", "kvmtrace.workload", "lifecycle"),
        command("cat", "qemu-notes.txt"),
        TargetSpec("guest", guest="lifecycle"),
        TargetSpec("all"),
    ],
)
def test_other_targets_have_no_vmm_that_is_known(target: TargetSpec) -> None:
    assert vmm_binary(target) is None
    probes = FakeProbes()
    assert add_vmm_probes(probes, target) == []
    assert probes.lines == {}


def test_a_script_named_qemu_is_none(tmp_path: Path) -> None:
    script = tmp_path / QEMU
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert vmm_binary(command(str(script))) is None


def test_qemu_is_found_in_a_script(tmp_path: Path) -> None:
    script = tmp_path / "start-guest"
    script.write_text(f"#!/bin/sh\nset -e\n{QEMU} -accel kvm \\\n  -m 64\n")
    script.chmod(0o755)
    assert vmm_binary(command(str(script))) == qemu_path()
    script.write_text("#!/bin/sh\nls qemu-images/*\n")
    assert vmm_binary(command(str(script))) is None


def test_a_process_is_its_executable() -> None:
    target = TargetSpec("pid", pid=os.getpid())
    assert vmm_binary(target) == Path(sys.executable).resolve()
    assert add_vmm_probes(FakeProbes(), target) == []  # Python is no VMM
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    assert vmm_binary(TargetSpec("pid", pid=ended.pid)) is None


def test_every_function_that_the_binary_has_gets_its_probe() -> None:
    probes = FakeProbes()
    rows = add_vmm_probes(probes, command(*GUEST))
    listing = subprocess.run(["nm", "-D", "--defined-only", qemu_path()], capture_output=True, text=True, check=True)
    symbols = {line.split()[-1].partition("@")[0] for line in listing.stdout.splitlines()}
    there = [function for function in VMM_FUNCTIONS if symbols.intersection(function.symbols)]
    # QEMU 7.2 has them all; 10.0 keeps x86_cpu_new to itself
    assert {"vmm_cpu_new"} >= {function.role for function in VMM_FUNCTIONS} - {function.role for function in there}
    assert {row["event"] for row in rows} == {function.role for function in there}
    assert [row["event"] for row in rows] == list(probes.lines)
    for function in there:
        place, fields, is_return = probes.lines[function.role]
        assert place.startswith(f"{qemu_path()}:0x")
        assert (fields, is_return) == (function.fields, function.is_return)
    both = [probes.lines[role] for role in ("vmm_accel_init_machine", "vmm_accel_init_machine_return")]
    assert both[0][0] == both[1][0]
    assert {row["how"] for row in rows} == {"uprobe", "uretprobe"}


def test_a_refused_probe_is_not_claimed() -> None:
    rows = add_vmm_probes(FakeProbes({"vmm_init", "vmm_cpu_new"}), command(*GUEST))
    assert len(rows) == len(VMM_FUNCTIONS) - 2
    assert {"vmm_init", "vmm_cpu_new"}.isdisjoint(row["event"] for row in rows)


def test_an_older_symbol_serves_where_the_newest_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = {"accel_find": 1, "accel_init_machine": 2, "pc_cpus_init": 3, "pc_new_cpu": 4, "kvm_init_vcpu": 5}
    monkeypatch.setattr(
        vmm_probes, "find_functions", lambda _binary, names: {n: offsets[n] for n in names if n in offsets}
    )
    probes = FakeProbes()
    rows = add_vmm_probes(probes, command(*GUEST))
    assert {row["event"]: row["function"].rpartition(":")[2] for row in rows} == {
        "vmm_accel_find": "accel_find",
        "vmm_accel_init_machine": "accel_init_machine",
        "vmm_accel_init_machine_return": "accel_init_machine",
        "vmm_cpus_init": "pc_cpus_init",
        "vmm_cpu_new": "pc_new_cpu",
        "vmm_kvm_init_vcpu": "kvm_init_vcpu",
    }
    assert probes.lines["vmm_cpus_init"][0].endswith(":0x3")


def test_field_names_are_none_that_must_be_numbers() -> None:
    from kvmtrace.table.credible import FLAGS, NUMBERS

    texts = {field.split("=")[0] for function in VMM_FUNCTIONS for field in function.fields if "string" in field}
    assert texts
    assert texts.isdisjoint(NUMBERS | FLAGS)


def uprobes_of(pid: int) -> list[str]:
    tracefs = mounted()
    assert tracefs is not None
    return [line for line in (tracefs / "uprobe_events").read_text().splitlines() if f"kvmtrace_{pid}_" in line]


def record_argv(output: Path, *target: str) -> list[str]:
    return [*KVMTRACE, "record", "--backend", "ftrace", "-o", str(output), "--", *target]


@pytest.mark.kvm
def test_qemus_start_is_recorded_in_the_models_order(tmp_path: Path) -> None:
    output = tmp_path / "run.dat"
    with subprocess.Popen(record_argv(output, "timeout", "2", *GUEST), stderr=subprocess.PIPE) as recorder:
        recorder.communicate(timeout=300)
    assert uprobes_of(recorder.pid) == []
    data = output.read_bytes()
    length = struct.unpack("<Q", data[-24:-16])[0]
    assert data.endswith(META_MAGIC)
    assert "vmm_accel_find" in json.dumps(json.loads(data[-24 - length : -24]))
    recording = open_recording(output)
    made = follow_bring_up(recording.events(), processes=recording.processes)
    assert made is not None
    assert made.vmm is not None
    roles = [step.role for step in made.vmm.steps]
    assert {role for pair in VMM_ORDER for role in pair if role.startswith("vmm_")} <= set(roles)
    assert next(s.argument for s in made.vmm.steps if s.role == "vmm_accel_find") == "accel kvm"
    assert [s.argument for s in made.vmm.steps if s.role == "vmm_cpu_new"] == ["apic_id 0", "apic_id 1"]
    assert made.vmm.findings == ()
    assert ("kvm-accel", "accel", "object") in made.vmm.inheritance
    assert made.vmm.n_types > 100
    assert made.n_violations == 0
    # the thread of kvm_init_vcpu is the one that runs the vCPU
    threads = [s.tid for s in made.vmm.steps if s.role == "vmm_kvm_init_vcpu"]
    assert threads == [item.tid for item in made.objects if item.kind == "vcpu"]


@pytest.mark.kvm
def test_probes_of_a_killed_recorder_are_removed_by_the_next_command(tmp_path: Path) -> None:
    with subprocess.Popen(
        record_argv(tmp_path / "run.dat", "timeout", "3", *GUEST), stderr=subprocess.DEVNULL
    ) as recorder:
        until = time.monotonic() + 3000
        while not uprobes_of(recorder.pid):
            assert time.monotonic() < until
            time.sleep(0.02)
        recorder.send_signal(signal.SIGKILL)
    until = time.monotonic() + 300
    while uprobes_of(recorder.pid):
        assert time.monotonic() < until, uprobes_of(recorder.pid)
        subprocess.run([*KVMTRACE, "doctor"], check=True, capture_output=True, timeout=300)
        time.sleep(0.1)
