"""Who a VM is: from command lines as VMMs have them, cgroups, debugfs and QMP; from processes that lie; and found."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmtrace.capture import vm_identity
from kvmtrace.capture.cgroup_path import told_by_cgroups
from kvmtrace.capture.running_vms import Vms, find_one
from kvmtrace.capture.vm_identity import MAX_NAME, VmIdentity, debugfs_folders, identify
from kvmtrace.capture.vmm_arguments import told_by_arguments
from kvmtrace.errors import UsageError
from kvmtrace.kvm.vm_names import is_meant, vm_label

if TYPE_CHECKING:
    from collections.abc import Iterator

UUID = "1f9c5d2a-7b3e-4c11-9d0f-0a1b2c3d4e5f"
# fmt: off
COMMAND_LINES = [
    # libvirt; the name has a comma, which QEMU doubles
    (["/usr/bin/qemu-system-x86_64", "-name", "guest=web,,3,debug-threads=on", "-S", "-uuid", UUID.upper()],
     ("qemu", "web,3", UUID, "command line")),
    (["qemu-system-x86_64", "-name", "web-3,process=qemu:web-3"], ("qemu", "web-3", None, "command line")),
    # Proxmox gives the uuid to the firmware alone
    (["/usr/bin/kvm", "-id", "100", "-name", "db,debug-threads=on", "-smbios", f"type=1,uuid={UUID}"],
     ("qemu", "db", UUID, "command line")),
    (["/usr/libexec/qemu-kvm", "-nographic"], ("qemu", None, None, None)),
    (["cloud-hypervisor", "--api-socket", "path=/run/ch/web.sock", "--platform", f"num_pci_segments=1,uuid={UUID}"],
     ("cloud-hypervisor", "web", UUID, "socket")),
    # Kata: the directory is the sandbox's
    (["/opt/kata/bin/cloud-hypervisor", "--api-socket=/run/vc/vm/4f2a/clh-api.sock"],
     ("cloud-hypervisor", "4f2a", None, "socket")),
    (["firecracker", "--id", "fn-17", "--api-sock", "/run/firecracker.socket"],
     ("firecracker", "fn-17", None, "command line")),
    (["/usr/bin/firecracker-v1.7.0-x86_64", "--api-sock", "/tmp/firecracker.socket"],
     ("firecracker", None, None, None)),
    (["crosvm", "run", "--name", "term", "--socket", "/run/x.sock"], ("crosvm", "term", None, "command line")),
    (["crosvm", "run", "-s", "/run/vms/term.sock", "vmlinux"], ("crosvm", "term", None, "socket")),
    (["lkvm", "run", "--name", "tiny", "-c", "2"], ("kvmtool", "tiny", None, "command line")),
    ([sys.executable, "-P", "-m", "kvmtrace.workload", "lifecycle", "--count", "3"],
     ("kvmtrace", "lifecycle", None, "command line")),
]
NO_VMMS = [[], ["python3", "kvmtrace", "record", "--", "qemu-system-x86_64"], ["vim", "qemu-system-x86_64"], [""],
           ["bash", "-c", "firecracker --id x"]]
POD = "3d1f6b2c-9a1e-4c55-8f10-6d2b7a5e9c01"
CGROUPS = [
    ("0::/machine.slice/machine-qemu\\x2d3\\x2dweb\\x2d3.scope/libvirt/emulator\n",
     ("web-3", "machine-qemu-3-web-3.scope", None, None)),
    ("12:pids:/x\n1:name=systemd:/machine.slice/machine-qemu\\x2d1\\x2da_b.scope\n0::/\n",
     ("a_b", "machine-qemu-1-a_b.scope", None, None)),
    ("0::/system.slice/system-firecracker.slice/firecracker@fn\\x2d17.service\n",
     ("fn-17", "firecracker@fn-17.service", None, None)),
    ("0::/qemu.slice/100.scope\n", ("100", "100.scope", None, None)),
    ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-r1f.scope\n", (None, "run-r1f.scope", None, None)),
    ("0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + POD.replace("-", "_") + ".slice/"
     f"cri-containerd-{'ab' * 32}.scope\n", (None, f"cri-containerd-{'ab' * 32}.scope", POD, "abababababab")),
    (f"4:memory:/kubepods/burstable/pod{POD}/{'0f' * 32}\n0::/\n", (None, None, POD, "0f0f0f0f0f0f")),
    ("0::/\n", (None, None, None, None)),
    ("", (None, None, None, None)),
    ("garbage\n:::\n0:\n", (None, None, None, None)),
]
# fmt: on


@pytest.mark.parametrize(("argv", "told"), COMMAND_LINES, ids=[row[0][0] for row in COMMAND_LINES])
def test_command_lines(argv: list[str], told: tuple[str | None, ...]) -> None:
    found = told_by_arguments(argv)
    assert found is not None
    assert (found.kind, found.name, found.uuid, found.name_from) == told


@pytest.mark.parametrize("argv", NO_VMMS)
def test_other_programs_are_no_vmm(argv: list[str]) -> None:
    assert told_by_arguments(argv) is None


@pytest.mark.parametrize("argv", [row[0] for row in COMMAND_LINES])
def test_a_command_line_may_end_anywhere(argv: list[str]) -> None:
    for n in range(1, len(argv)):
        told_by_arguments(argv[:n])
        for cut in range(len(argv[n])):
            told_by_arguments([*argv[:n], argv[n][:cut]])


@pytest.mark.parametrize(("text", "told"), CGROUPS)
def test_cgroups(text: str, told: tuple[str | None, ...]) -> None:
    found = told_by_cgroups(text)
    assert (found.name, found.unit, found.pod, found.container) == told


class FakeProc:
    """A /proc with the processes that a test puts there."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        (root / "proc").mkdir()
        monkeypatch.setattr(vm_identity, "PROC", root / "proc")
        monkeypatch.setattr("kvmtrace.capture.running_vms.PROC", root / "proc")
        monkeypatch.setattr(vm_identity, "DEBUGFS", root / "kvm")
        monkeypatch.setattr("kvmtrace.capture.pid_namespace.is_initial", lambda: True)

    def add(self, pid: int, argv: list[str], cgroup: str = "0::/\n", threads: dict[int, str] | None = None) -> None:
        folder = self.root / "proc" / str(pid)
        for tid, comm in (threads or {pid: "main"}).items():
            (folder / "task" / str(tid)).mkdir(parents=True, exist_ok=True)
            (folder / "task" / str(tid) / "comm").write_text(f"{comm}\n")
        (folder / "cmdline").write_bytes(b"\0".join(os.fsencode(word) for word in argv) + b"\0")
        (folder / "comm").write_text(f"{Path(argv[0]).name[:15]}\n")
        (folder / "cgroup").write_text(cgroup)
        (folder / "stat").write_text(f"{pid} (a) b ) S " + " ".join(map(str, range(4, 50))))
        (folder / "status").write_text(f"Name:\tx\nTgid:\t{pid}\n")

    def debugfs(self, folder: str, vcpus: dict[int, int]) -> None:
        for number, tid in vcpus.items():
            (self.root / "kvm" / folder / f"vcpu{number}").mkdir(parents=True)
            (self.root / "kvm" / folder / f"vcpu{number}" / "pid").write_text(f"{tid}\n")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeProc:
    return FakeProc(tmp_path, monkeypatch)


def test_threads_are_told_by_their_names(proc: FakeProc) -> None:
    proc.add(70, ["qemu-system-x86_64", "-name", "a"], threads={70: "qemu", 71: "CPU 0/KVM", 72: "CPU 11/KVM", 73: "x"})
    found = identify(70)
    assert found is not None
    assert found.vcpus == {71: 0, 72: 11}
    assert (found.started_ticks, found.comm) == (22, "qemu-system-x86")


def test_the_kernels_word_goes_before_names(proc: FakeProc) -> None:
    """A process that renames its threads does not change who runs its vCPUs."""
    proc.add(70, ["qemu-system-x86_64"], threads={70: "CPU 5/KVM", 71: "CPU 0/KVM", 72: "renamed"})
    proc.debugfs("70-12", {0: 72, 1: 71})
    folders = debugfs_folders()
    assert folders == {70: ["70-12"]}
    found = identify(70, debugfs=folders[70])
    assert found is not None
    assert found.vcpus == {72: 0, 71: 1}
    assert found.debugfs == ("70-12",)


def test_kubevirt_names_its_domains_after_namespace_and_vm(proc: FakeProc) -> None:
    proc.add(7, ["/usr/libexec/qemu-kvm", "-name", "guest=shop_web_1,debug-threads=on"], CGROUPS[5][0])
    found = identify(7)
    assert found is not None
    assert (found.namespace, found.name, found.pod) == ("shop", "web_1", POD)


def test_a_scope_names_a_vm_that_its_command_line_does_not(proc: FakeProc) -> None:
    proc.add(7, ["qemu-system-x86_64"], CGROUPS[0][0])
    proc.add(8, ["qemu-system-x86_64", "-name", "given"], CGROUPS[0][0])
    names = {pid: identify(pid) for pid in (7, 8)}
    assert [(vm.name, vm.name_from) for vm in names.values() if vm] == [("web-3", "cgroup"), ("given", "command line")]


def test_what_a_process_writes_is_bounded(proc: FakeProc) -> None:
    proc.add(7, ["qemu-system-x86_64", "-name", "n" * 5000 + "\x1b[2J\udcff", "-uuid", "not-a-uuid"])
    found = identify(7)
    assert found is not None
    assert len(found.name or "") == MAX_NAME
    assert found.uuid is None
    found.as_meta()["name"].encode()


def test_a_process_that_goes_while_it_is_read(proc: FakeProc) -> None:
    assert identify(12345) is None
    proc.add(7, ["qemu-system-x86_64", "-name", "a"])
    for name in ("cgroup", "comm", "stat", "status"):
        (proc.root / "proc" / "7" / name).unlink()
    found = identify(7)
    assert found is not None
    assert (found.name, found.started_ticks, found.comm) == ("a", None, None)


def test_vms_come_go_and_reuse_a_pid(proc: FakeProc) -> None:
    vms = Vms(None)
    proc.add(7, ["qemu-system-x86_64", "-name", "first"])
    proc.add(9, ["sleep", "1"])
    vms.look(force=True)
    (proc.root / "proc" / "7" / "stat").write_text("7 (q) S " + " ".join(map(str, range(104, 150))))
    (proc.root / "proc" / "7" / "cmdline").write_bytes(b"qemu-system-x86_64\0-name\0second\0")
    vms.look(force=True)
    assert [vm.name for vm in vms.rows()] == ["first", "second"]
    (proc.root / "proc" / "7" / "cmdline").write_bytes(b"")
    vms.look(force=True)
    assert [vm.name for vm in vms.rows()] == ["first", "second"], "what is gone is remembered"


def test_a_command_that_was_too_quick_to_be_looked_at(proc: FakeProc) -> None:
    vms = Vms(7, ["/usr/bin/qemu-system-x86_64", "-name", "quick"])
    vms.look(force=True)
    assert [(vm.name, vm.comm) for vm in vms.rows()] == [("quick", "qemu-system-x86")]


def test_qemus_own_word_goes_first(proc: FakeProc) -> None:
    proc.add(7, ["qemu-system-x86_64", "-name", "argv"], threads={7: "q", 8: "CPU 0/KVM"})
    vms = Vms(7)
    vms.look(force=True)
    cpus = [{"cpu-index": 0, "thread-id": 9}, {"cpu-index": "x"}, None, {"cpu-index": -1, "thread-id": 5}]
    vms.add_qmp({"name": {"name": "own"}, "uuid": {"UUID": UUID}, "cpus": cpus})
    (vm,) = vms.rows()
    assert (vm.name, vm.name_from, vm.uuid, vm.vcpus) == ("own", "qmp", UUID, {8: 0, 9: 0})
    for answer in (None, {}, {"error": "x"}, {"name": {"error": "?"}, "uuid": 7, "cpus": {"error": ""}}):
        vms.add_qmp(answer)
    assert vms.rows() == [vm]


@pytest.mark.parametrize(
    ("wanted", "is_it"),
    [
        ("web-3", True),
        ("web-*", True),
        ("WEB-3", False),
        (UUID.upper(), True),
        ("db", False),
        ("", False),
        ("[", False),
    ],
)
def test_vm_means(wanted: str, is_it: bool) -> None:
    assert is_meant(wanted, "web-3", UUID) is is_it


def test_a_name_like_a_pattern_means_itself() -> None:
    assert is_meant("a[1]", "a[1]", None)
    assert not is_meant("a", None, None)
    assert vm_label(None, "qemu", "q", 5) == "qemu 5"


def test_a_vm_is_found_by_its_name(proc: FakeProc) -> None:
    for pid, name in ((7, "web-1"), (8, "web-2")):
        proc.add(pid, ["qemu-system-x86_64", "-name", name])
    assert find_one("web-2").pid == 8
    with pytest.raises(UsageError, match="means 2 VMs"):
        find_one("web-*")
    with pytest.raises(UsageError, match="there is web-1, web-2"):
        find_one("db")


def own_cgroup() -> Iterator[Path]:
    """Yield a cgroup directory of any hierarchy that this process may make one in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for root in (f"/sys/fs/cgroup/{controllers.removeprefix('name=')}", "/sys/fs/cgroup"):
            place = Path(root + path)
            if place.is_dir() and (place / "cgroup.procs").exists():
                yield place


def test_names_of_real_processes_in_cgroups_of_ours(tmp_path: Path) -> None:
    """Two processes called qemu, one in libvirt's scope, one in a pod; and one that has gone when it is looked at."""
    program = tmp_path / "qemu-system-x86_64"
    program.symlink_to("/bin/sleep")
    made: list[Path] = []
    names = ("machine-qemu\\x2d7\\x2dscoped.scope", f"kubepods-pod{POD.replace('-', '_')}.slice")
    running = [subprocess.Popen(["/bin/sleep", "60"], executable=program) for _ in names]
    try:
        for process, name in zip(running, names, strict=True):
            for place in own_cgroup():
                try:
                    (place / name).mkdir()
                    made.append(place / name)
                    (place / name / "cgroup.procs").write_text(str(process.pid))
                    break
                except OSError:
                    continue
            else:
                pytest.skip("no cgroup can be made here")
        told = [told_by_cgroups(Path(f"/proc/{process.pid}/cgroup").read_text()) for process in running]
        assert (told[0].name, told[1].pod) == ("scoped", POD)
    finally:
        for process in running:
            process.kill()
            process.wait()
        for place in made:
            place.rmdir()
    assert identify(running[0].pid) is None


def test_looking_while_processes_end() -> None:
    """A hundred processes end while they are looked at."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            subprocess.run(["/bin/true"], check=True)

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(5):
            vms = Vms(None)
            vms.look(force=True)
            assert all(isinstance(vm, VmIdentity) for vm in vms.rows())
    finally:
        stop.set()
        thread.join()
