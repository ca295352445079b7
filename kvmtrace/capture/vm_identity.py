"""Who a VM is: which VMM a process is, the VM's name and uuid, its vCPU threads.

Everything here is read from /proc, whose texts the processes write themselves: bounded, checked, and gone at any
moment. A process that cannot be read any more keeps what it said before.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.cgroup_path import told_by_cgroups
from kvmtrace.capture.vmm_arguments import told_by_arguments
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PROC = Path("/proc")
DEBUGFS = Path("/sys/kernel/debug/kvm")
MAX_TEXT = 64 << 10  # of a command line
MAX_NAME = 200
MAX_VCPUS = 4096  # KVM_MAX_VCPUS of any kernel
MAX_VMS = 4096
VM_LINK = "anon_inode:kvm-vm"  # virt/kvm/kvm_main.c, kvm_dev_ioctl_create_vm()
# how VMMs name their vCPU threads: QEMU, Cloud Hypervisor, Firecracker, crosvm, kvmtool
VCPU_THREAD = re.compile(r"(?:CPU (\d+)/KVM|vcpu_?(\d+)|fc_vcpu (\d+)|crosvm_vcpu(\d+)|kvm-vcpu-(\d+))\Z")


@dataclass(frozen=True)
class VmIdentity:
    """A process that runs a VM, as far as it and the kernel tell.

    Parameters
    ----------
    pid : int
    started_ticks : when the process began (/proc/PID/stat), to tell it from a later one of the same pid; None unknown
    kind : see vmm_arguments; None if it is no VMM that is known
    comm : name of the process
    name, uuid : of the VM
    name_from : "command line" "qmp" "cgroup" "socket"; None without a name
    unit, pod, container : see cgroup_path
    namespace : of the pod, where KubeVirt's name of the VM tells it
    debugfs : names of its folders under kvm/ in debugfs
    vcpus : tid -> vCPU id
    """

    pid: int
    started_ticks: int | None = None
    kind: str | None = None
    comm: str | None = None
    name: str | None = None
    uuid: str | None = None
    name_from: str | None = None
    unit: str | None = None
    pod: str | None = None
    container: str | None = None
    namespace: str | None = None
    debugfs: tuple[str, ...] = ()
    vcpus: dict[int, int] = field(default_factory=dict)

    def as_meta(self) -> dict[str, Any]:
        """Return the metadata's row of `vms`."""
        row = {name: value for name, value in vars(self).items() if name not in ("debugfs", "vcpus", "started_ticks")}
        return row | {"debugfs": list(self.debugfs), "vcpus": {str(tid): n for tid, n in sorted(self.vcpus.items())}}


def identify(pid: int, argv: Sequence[str] | None = None, debugfs: Sequence[str] = ()) -> VmIdentity | None:
    """Return who a process is; None if it has no VM and is no VMM, or is gone.

    Parameters
    ----------
    argv : what it will be, where it has not begun
    debugfs : its folders in kvm/ of debugfs
    """
    told = told_by_arguments(argv if argv is not None else _argv(pid))
    if told is None and not debugfs and not has_vm(pid):
        return None
    cgroup = told_by_cgroups(_read(PROC / str(pid) / "cgroup", 4096))
    name, name_from = (told.name, told.name_from) if told else (None, None)
    if cgroup.name and name_from != "command line":
        name, name_from = cgroup.name, "cgroup"
    namespace = None
    if cgroup.pod and name and "_" in name and told and told.kind == "qemu":
        namespace, _, name = name.partition("_")  # KubeVirt calls a domain NAMESPACE_NAME
    return VmIdentity(
        pid=pid,
        started_ticks=started_ticks(pid),
        kind=told.kind if told else None,
        comm=bounded(_read(PROC / str(pid) / "comm", 64).rstrip("\n")),
        name=bounded(name),
        uuid=told.uuid if told else None,
        name_from=name_from,
        unit=bounded(cgroup.unit),
        pod=cgroup.pod,
        container=cgroup.container,
        namespace=bounded(namespace),
        debugfs=tuple(debugfs),
        vcpus=_vcpu_threads(pid, debugfs),
    )


def has_vm(pid: int) -> bool:
    """Say whether a process has a VM open."""
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)  # noqa: PTH208 (thousands of them)
    except OSError:
        return False
    for name in names:
        with contextlib.suppress(OSError):  # closed since
            if os.readlink(f"{folder}/{name}") == VM_LINK:  # noqa: PTH115
                return True
    return False


def descendants(pid: int) -> list[int]:
    """Return a process and what it has started, as far as the kernel tells (CONFIG_PROC_CHILDREN)."""
    found, waiting = [pid], [pid]
    while waiting and len(found) < MAX_VMS:
        parent = waiting.pop()
        for task in numbers(PROC / str(parent) / "task"):
            text = _read(PROC / str(parent) / "task" / str(task) / "children", MAX_TEXT)
            children = [int(word) for word in text.split() if word.isdigit()]
            new = [child for child in children if child not in found]
            found += new
            waiting += new
    return found


def _vcpu_threads(pid: int, debugfs: Iterable[str]) -> dict[int, int]:
    """Return tid -> vCPU id: as the kernel says (Linux 5.19), else as the VMM names its threads."""
    found: dict[int, int] = {}
    for folder in debugfs:
        for path in sorted((DEBUGFS / folder).glob("vcpu[0-9]*"))[:MAX_VCPUS]:
            number, runs = path.name.removeprefix("vcpu"), _read(path / "pid", 32).strip()
            if number.isdigit() and runs.isdigit() and int(runs):
                found[int(runs)] = int(number)
    if found:
        return found
    for tid in numbers(PROC / str(pid) / "task"):
        match = VCPU_THREAD.match(_read(PROC / str(pid) / "task" / str(tid) / "comm", 64).rstrip("\n"))
        if match and len(found) < MAX_VCPUS:
            found[tid] = int(next(group for group in match.groups() if group is not None))
    return found


def debugfs_folders() -> dict[int, list[str]]:
    """Return process -> its folders PID-FD under kvm/ in debugfs; {} where it cannot be read.

    The number is that of the thread that made the VM. Source: virt/kvm/kvm_main.c, kvm_create_vm_debugfs()
    """
    found: dict[int, list[str]] = {}
    try:
        names = os.listdir(DEBUGFS)  # noqa: PTH208 (names alone)
    except OSError:
        return {}
    for name in sorted(names):
        tid, dash, number = name.partition("-")
        if dash and tid.isdigit() and number.isdigit():
            found.setdefault(_process_of(int(tid)), []).append(name)
    return found


def _process_of(tid: int) -> int:
    """Return the process of a thread; the thread itself if it is gone."""
    match = re.search(r"^Tgid:\t(\d+)$", _read(PROC / str(tid) / "status", 4096), re.MULTILINE)
    return int(match[1]) if match else tid


def _argv(pid: int) -> list[str]:
    text = _read(PROC / str(pid) / "cmdline", MAX_TEXT)
    return text.rstrip("\0").split("\0") if text else []


def started_ticks(pid: int) -> int | None:
    """Return when a process began, None if it is gone or has ended.

    It is field 22 of /proc/PID/stat; the second may hold anything, so what stands behind the last ) counts.
    """
    words = _read(PROC / str(pid) / "stat", 1024).rpartition(")")[2].split()
    return int(words[19]) if len(words) > 19 and words[19].isdigit() and words[0] not in "ZX" else None


def bounded(text: str | None) -> str | None:
    """Return a name as it is kept: of bounded length, without half characters; None for an empty one."""
    return text[:MAX_NAME].encode("utf-8", "replace").decode() if text else None


def _read(path: Path, limit: int) -> str:
    try:
        with path.open("rb") as file:
            return file.read(limit).decode("utf-8", "replace")
    except OSError:  # gone, or not ours to read
        return ""


def numbers(path: Path) -> list[int]:
    """Return the entries of a directory that are numbers, ascending; [] if it is gone."""
    try:
        return sorted(int(name) for name in os.listdir(path) if name.isdigit())  # noqa: PTH208 (names alone)
    except OSError:
        return []
