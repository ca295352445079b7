"""A recording without KVM events says so and why; in a container's PID namespace a target is refused."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvmtrace.capture import nothing_of_kvm, pid_namespace
from kvmtrace.capture.bpf.kvm_presence import KvmPresence
from kvmtrace.capture.ftrace.raw_pages import event_ids
from kvmtrace.capture.nothing_of_kvm import is_of_kvm, say_nothing, vcpus_of
from kvmtrace.capture.settings import RecordSettings, TargetSpec
from kvmtrace.capture.target import Target
from kvmtrace.capture.threads import Threads
from kvmtrace.errors import CapabilityError


def test_the_initial_namespace_is_told_by_its_inode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pid_namespace, "OWN", tmp_path / "missing")
    assert pid_namespace.is_initial()
    (tmp_path / "ns").touch()
    monkeypatch.setattr(pid_namespace, "OWN", tmp_path / "ns")
    assert not pid_namespace.is_initial()


@pytest.mark.parametrize("spec", [TargetSpec("command", command=("true",)), TargetSpec("pid", pid=os.getpid())])
def test_a_target_in_a_container_is_refused(spec: TargetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pid_namespace, "is_initial", lambda: False)
    with pytest.raises(CapabilityError, match="--pid=host"):
        Target(spec)
    Target(TargetSpec("all")).close()


def test_names_of_a_containers_processes_are_not_taken_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pid_namespace, "is_initial", lambda: False)
    threads = Threads(None)
    threads.look(force=True)
    assert threads.known == {}


@pytest.mark.parametrize(
    ("target", "n_vcpus", "meta", "says"),
    [
        (TargetSpec("command", command=("x",)), None, {}, "the command ran no VM itself"),
        (TargetSpec("pid", pid=7), 0, {}, "process 7 has no VM"),
        (TargetSpec("pid", pid=7), 2, {}, "none of the 2 vCPUs of process 7"),
        (TargetSpec("pid", pid=7), None, {}, "process 7 ended"),
        (TargetSpec("all"), None, {}, "no VM ran"),
        (TargetSpec("guest", guest="smp"), None, {}, "before it ran"),
        (TargetSpec("all"), None, {"loss": {"events": 5}}, "--buffer-size"),
        (TargetSpec("all"), None, {"filtered_events": 5}, "filters"),
    ],
)
def test_the_likely_reason(target: TargetSpec, n_vcpus: int | None, meta: dict[str, Any], says: str) -> None:
    text = say_nothing(RecordSettings(Path("x"), target), {"loss": {"events": 0}} | meta, n_vcpus)
    assert text.startswith("no KVM event was recorded: ")
    assert says in text


def test_minimal_events_on_pvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nothing_of_kvm, "kvm_modules", lambda: ["kvm", "kvm_pvm"])
    settings = RecordSettings(Path("x"), TargetSpec("all"), event_set="minimal")
    assert "--events lifecycle" in say_nothing(settings, {"loss": {"events": 0}}, None)


def test_a_vcpu_is_counted_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = os.open(tmp_path / "vcpu", os.O_CREAT | os.O_RDWR)
    again, second = os.dup(first), os.open(tmp_path / "vcpu", os.O_RDWR)
    statistics = os.open(tmp_path / "vcpu", os.O_RDWR)
    links = {first: "kvm-vcpu:0", again: "kvm-vcpu:0", second: "kvm-vcpu:0", statistics: "kvm-vcpu-stats:0"}
    monkeypatch.setattr(os, "readlink", lambda path: f"anon_inode:{links.get(int(path.split('/')[-1]), 'other')}")
    try:
        assert vcpus_of(os.getpid()) == 2, "two VMs may have a vCPU 0 each; a duplicate and statistics are none"
    finally:
        for one in links:
            os.close(one)


def test_vcpus_are_counted_by_open_files() -> None:
    assert vcpus_of(os.getpid()) == 0
    assert vcpus_of(None) is None
    assert vcpus_of(4194305) is None


def test_what_counts_as_kvms() -> None:
    assert is_of_kvm("kvm", "kvm_exit")
    assert is_of_kvm("kvmtrace_12_ab", "kvm_vcpu_ioctl")
    assert not is_of_kvm("kvmtrace_12_ab", "kvm_cpu_exec")  # a uprobe on the VMM
    assert not is_of_kvm("sched", "sched_switch")


def test_event_ids_of_a_page() -> None:
    small = struct.pack("<IHH", 1 | 5 << 5, 300, 0)  # type_len 1: one word of data
    large = struct.pack("<IIHHI", 0, 12, 301, 0, 0)  # length in the next word
    page = (struct.pack("<QQ", 1, len(small + large)) + small + large).ljust(4096, b"\0")
    assert list(event_ids(page)) == [300, 301]


def record_of(kind: int, n_data: int) -> bytes:
    return struct.pack("<II", 24 + n_data, 0) + (bytes(20) + struct.pack("<HBB", kind, 0, 0) + bytes(n_data)).ljust(
        24 + n_data + 7 & ~7, b"\0"
    )


def test_presence_in_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    presence = KvmPresence({2, 3})
    presence.look(memoryview(record_of(0, 4) + record_of(1, 9)))
    assert presence.seen is False
    presence.look(memoryview(record_of(1, 16) + record_of(3, 0)))
    assert presence.seen is True
    monkeypatch.setattr("kvmtrace.capture.bpf.kvm_presence.SCAN_BYTES", 40)
    presence = KvmPresence({2})
    presence.look(memoryview(record_of(0, 16)))
    assert presence.seen is None  # too much to look through


def kvmtrace(*arguments: str, inside: bool = False) -> subprocess.CompletedProcess[str]:
    prefix = ["unshare", "-p", "-m", "--fork", "--mount-proc"] if inside else []
    return subprocess.run(
        [*prefix, sys.executable, "-m", "kvmtrace", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.kvm
@pytest.mark.parametrize("backend", ["ftrace", "bpf"])
class TestForReal:
    def test_a_command_without_a_vm(self, backend: str, tmp_path: Path) -> None:
        done = kvmtrace("record", "--backend", backend, "-o", str(tmp_path / "x.dat"), "--", "true")
        assert done.returncode == 0
        assert "note: no KVM event was recorded: the command ran no VM itself" in done.stderr
        done = kvmtrace(
            "record", "--backend", backend, "-o", str(tmp_path / "x.dat"), "--strict", "--force", "--", "true"
        )
        assert done.returncode == 5

    def test_a_guest_is_seen(self, backend: str, tmp_path: Path) -> None:
        # KVM's events alone: a scheduler event that an interrupt hides from a BPF program is a loss of its own
        recorder = ["--backend", backend, "--events", "minimal", "--strict"]
        done = kvmtrace("record", *recorder, "-o", str(tmp_path / "x.dat"), "--guest", "lifecycle")
        assert (done.returncode, "no KVM event" in done.stderr) == (0, False), done.stderr

    def test_in_a_pid_namespace(self, backend: str, tmp_path: Path) -> None:
        arguments = ["record", "--backend", backend, "--force", "-o", str(tmp_path / "x.dat")]
        done = kvmtrace(*arguments, "--guest", "lifecycle", inside=True)
        assert (done.returncode, done.stderr.count("\n")) == (4, 1)
        assert "container's PID namespace" in done.stderr
        done = kvmtrace(*arguments, "-a", "-d", "0.2", inside=True)
        assert done.returncode == 0, done.stderr
        assert kvmtrace("top", "-p", "1", "-n", "1", inside=True).returncode == 4
