"""tracefs: what is said where it cannot be used, and probes among other people's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmtrace.capture import tracefs
from kvmtrace.capture.ftrace.instance import Instance
from kvmtrace.capture.ftrace.probe_events import Probes
from kvmtrace.errors import CapabilityError


@pytest.mark.parametrize(
    ("euid", "lockdown", "says"),
    [
        (1000, None, "sudo kvmtrace"),
        (0, "confidentiality", "boot without lockdown=confidentiality"),
        (0, "integrity", "mount -o remount,rw"),
        (0, None, "mount -o remount,rw"),
    ],
)
def test_no_access_says_what_to_do(monkeypatch: pytest.MonkeyPatch, euid: int, lockdown: str | None, says: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    monkeypatch.setattr(tracefs, "lockdown_mode", lambda: lockdown)
    error = tracefs.no_access(Path("/x"))
    assert says in str(error)
    assert "\n" not in str(error)
    assert error.exit_code == 4


@pytest.mark.parametrize(
    ("text", "mode"),
    [("none [integrity] confidentiality\n", "integrity"), ("[none] integrity confidentiality\n", "none"), ("", None)],
)
def test_lockdown_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, mode: str | None) -> None:
    (tmp_path / "lockdown").write_text(text)
    monkeypatch.setattr(tracefs, "LOCKDOWN", tmp_path / "lockdown")
    assert tracefs.lockdown_mode() == mode


def test_a_kernel_without_tracefs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracefs, "mounted", lambda: None)
    monkeypatch.setattr(tracefs, "MOUNT_POINT", tmp_path / "none")
    with pytest.raises(CapabilityError, match="no tracefs; use a kernel with CONFIG_EVENT_TRACING"):
        tracefs.find_tracefs()


class Kernel:
    """A kprobe_events that only the newest append changes, as the kernel's does."""

    def __init__(self, directory: Path, refuse: str = "") -> None:
        for name in ("kprobe_events", "uprobe_events"):
            (directory / name).write_text("p:other/thing do_sys_openat2\n")
        self.refuse = refuse

    def write(self, probes: Probes, line: str, control: Path | None = None) -> bool:
        if self.refuse and self.refuse in line:
            return False
        control = control or probes.control
        lines = control.read_text().splitlines()
        if line.startswith("-:"):
            lines = [old for old in lines if old.split(" ")[0].partition(":")[2] != line[2:]]
        else:
            lines.append(line)
        control.write_text("".join(f"{text}\n" for text in lines))
        return True


def probes_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: str = "") -> Probes:
    kernel = Kernel(tmp_path, refuse)
    monkeypatch.setattr(Probes, "_write", lambda *arguments: kernel.write(*arguments))  # noqa: PLW0108 (binds self)
    return Probes(tmp_path, "kvmtrace_1_ab")


def test_probes_come_and_go_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = probes_of(tmp_path, monkeypatch)
    assert probes.add(["kvm_vcpu_ioctl", "kvm_vcpu_ioctl_return"]) == ["kvm_vcpu_ioctl", "kvm_vcpu_ioctl_return"]
    text = probes.control.read_text()
    assert "p:kvmtrace_1_ab/kvm_vcpu_ioctl kvm_vcpu_ioctl filp=$arg1:x64 cmd=$arg2:x32 arg=$arg3:x64" in text
    assert "r1024:kvmtrace_1_ab/kvm_vcpu_ioctl_return kvm_vcpu_ioctl ret=$retval:s64" in text
    assert Probes.groups(tmp_path) == ["kvmtrace_1_ab"]
    Probes(tmp_path, "kvmtrace_1_a").remove()  # a prefix of ours is not ours
    assert probes.control.read_text() == text
    assert probes.add_user("qemu_init", "/usr/bin/qemu:0x10", ("a=%di:u64",), is_return=False)
    assert "p:kvmtrace_1_ab/qemu_init /usr/bin/qemu:0x10 a=%di:u64" in probes.user_control.read_text()
    probes.remove()
    for control in (probes.control, probes.user_control):
        assert control.read_text() == "p:other/thing do_sys_openat2\n"


def test_kernels_without_argument_names_get_registers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = probes_of(tmp_path, monkeypatch, refuse="$arg")
    assert probes.add(["svm_vcpu_run"]) == ["svm_vcpu_run"]
    assert "svm_vcpu_run vcpu=%di:x64" in probes.control.read_text()


def test_functions_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = probes_of(tmp_path, monkeypatch, refuse="vmx_vcpu_run")
    assert probes.add(["vmx_vcpu_run", "svm_vcpu_run"]) == ["svm_vcpu_run"]


def test_no_kprobes_at_all(tmp_path: Path) -> None:
    probes = Probes(tmp_path, "kvmtrace_1_ab")
    assert probes.add(["svm_vcpu_run"]) == []
    assert probes.missed() == 0
    assert Probes.groups(tmp_path) == []
    probes.remove()


def test_missed_hits_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = probes_of(tmp_path, monkeypatch)
    probes.add(["svm_vcpu_run", "svm_vcpu_run_return"])
    (tmp_path / "kprobe_profile").write_text(
        "  svm_vcpu_run        100    3\n  svm_vcpu_run_return  97   4\n  thing  5  900\n"
    )
    assert probes.missed() == 7


def test_stats_and_losses(tmp_path: Path) -> None:
    instance = Instance(tmp_path, "kvmtrace-1-ab")
    folder = instance.path / "per_cpu/cpu3"
    folder.mkdir(parents=True)
    (folder / "stats").write_text(
        "entries: 5\noverrun: 7\ncommit overrun: 1\nbytes: 12\n"
        "oldest event ts:  12.5\nnow ts: 13.0\ndropped events: 2\nread events: 40\n"
    )
    assert instance.cpus() == [3]
    assert instance.lost(3) == 10
    assert instance.stats(3)["read events"] == 40
    assert "now ts" not in instance.stats(3)
