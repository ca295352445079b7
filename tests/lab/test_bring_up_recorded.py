"""Constructions recorded for real on this machine's KVM, beside strace and beside what they did wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvmtrace.bring_up.follow import follow_bring_up
from kvmtrace.formats import open_recording
from tests.lab.strace_log import STRACE, read_strace, recorded_ioctls

pytestmark = pytest.mark.kvm
KVMTRACE = (sys.executable, "-m", "kvmtrace")
# SeaBIOS with two vCPUs, for some hundred ms
START_QEMU = """timeout 3 qemu-system-x86_64 -machine q35 -accel kvm -smp 2 -m 64 -display none \\
    -trace 'kvm_*' -D "${1:-/dev/null}"
true"""
QEMU = ("sh", "-c", START_QEMU, "sh")
WRONG_VMM = Path(__file__).parent / "wrong_vmm.py"


def record(output: Path, *command: str) -> Path:
    done = subprocess.run(
        [*KVMTRACE, "record", "--backend", "ftrace", "-o", output, "--", *command],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return output


def report(path: Path) -> dict[str, Any]:
    done = subprocess.run(
        [*KVMTRACE, "report", "--format", "json", path], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert isinstance(document, dict)
    return document


@pytest.mark.parametrize(
    "command",
    [
        (sys.executable, "-m", "kvmtrace.workload", "lifecycle"),
        (sys.executable, str(WRONG_VMM)),
        QEMU,
    ],
    ids=["workload", "wrong", "qemu"],
)
def test_every_ioctl_that_strace_saw_is_in_the_capture(tmp_path: Path, command: tuple[str, ...]) -> None:
    log = tmp_path / "strace"
    events = open_recording(record(tmp_path / "run.dat", *STRACE, "-o", str(log), *command)).events()
    seen = read_strace(log)
    assert sum(map(len, seen.values())) >= 15
    assert recorded_ioctls(events) == seen


def test_qemus_own_log_agrees_in_every_ioctl_and_userspace_exit(tmp_path: Path) -> None:
    log = tmp_path / "log"
    path = record(tmp_path / "run.dat", *QEMU, str(log))
    events, text = open_recording(path).events(), log.read_text()
    ran = Counter(int(reason) for reason in re.findall(r"kvm_run_exit cpu_index \d+, reason (\d+)", text))
    served = events.field("kvm_userspace_exit", "errno") == 0
    assert Counter(events.field("kvm_userspace_exit", "reason")[served].tolist()) == ran
    assert ran.total() > 100
    asked = Counter(int(cmd, 16) for cmd in re.findall(r"kvm_(?:vm_|vcpu_|device_)?ioctl .*?type (0x[0-9a-f]+)", text))
    recorded = Counter(call.cmd for calls in recorded_ioctls(events).values() for call in calls)
    assert recorded == asked
    made = follow_bring_up(events, processes=open_recording(path).processes)
    assert made is not None
    assert made.n_violations == 0
    assert [item.id for item in made.objects if item.kind == "vcpu"] == ["vm0.vcpu0", "vm0.vcpu1"]
    assert all(len(item.run_tids) == 1 for item in made.objects if item.kind == "vcpu")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = record(tmp_path_factory.mktemp("wrong") / "run.dat", sys.executable, str(WRONG_VMM))
    bring_up = report(path)["bring_up"]
    assert isinstance(bring_up, dict)
    return bring_up


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("KVM_CREATE_IRQCHIP", "vm0", "EEXIST: the VM already has an interrupt chip"),
        ("KVM_CREATE_VCPU", "vm0", "EEXIST: the VM already has a vCPU of this id"),
        ("KVM_CREATE_IRQCHIP", "vm1", "EINVAL: interrupt chips must be created before the first vCPU"),
        ("KVM_SET_IDENTITY_MAP_ADDR", "vm1", "EINVAL: the identity map's address is fixed once a vCPU exists"),
        ("KVM_CREATE_VCPU", "kvm0", "a vm ioctl on a system file"),
        ("KVM_RUN", "vm0.vcpu0", "EINVAL: the argument must be 0"),
        ("KVM_RUN", "vm0.vcpu0", "EIO: a VM belongs to the process (mm) that created it"),
        ("KVM_CREATE_VCPU", "vm1", "vm1 was closed before"),
        ("KVM_RUN", "vm1.vcpu0", "vm1.vcpu0 was closed before"),
    ],
)
def test_each_wrong_step_is_explained(wrong: dict[str, Any], name: str, target: str, words: str) -> None:
    found = [
        step
        for step in wrong["steps"]
        if (step["name"], step["object"]) == (name, target) and words in step["sentence"]
    ]
    assert [step["verdict"] for step in found] == ["explained"]


def test_what_was_done_wrong_is_no_violation_of_kvms(wrong: dict[str, Any]) -> None:
    assert wrong["n_violations"] == 0
    assert wrong["n_explained"] == 9
    assert [step["sentence"] for step in wrong["steps"] if step["verdict"] == "unknown"] == []


def test_two_vms_in_one_process_have_their_own_vcpus(wrong: dict[str, Any]) -> None:
    vcpus = {item["id"]: item for item in wrong["objects"] if item["kind"] == "vcpu"}
    assert set(vcpus) == {"vm0.vcpu0", "vm1.vcpu0"}
    assert vcpus["vm0.vcpu0"]["fd"] != vcpus["vm1.vcpu0"]["fd"]
    assert all(item["mmap_bytes"] > 0 and not item["assumed"] for item in vcpus.values())
