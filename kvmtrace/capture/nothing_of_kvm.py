"""A recording in which nothing of KVM is: that is said, with the likely reason."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.host import kvm_modules
from kvmtrace.isa.probes import PROBES
from kvmtrace.kvm.tracepoints import PROBE_SYSTEM

if TYPE_CHECKING:
    from kvmtrace.capture.settings import RecordSettings, TargetSpec

KVM_SYSTEMS = ("kvm", "kvmmmu")
# virt/kvm/kvm_main.c, create_vcpu_fd(); "kvm-vcpu-stats:0" is a vCPU's statistics
VCPU_LINK = re.compile(r"anon_inode:kvm-vcpu(:\d+)?\Z")
SYS_KCMP = {"x86_64": 312, "aarch64": 272}
KCMP_FILE = 0
BEGINNING = "no KVM event was recorded"


def is_of_kvm(system: str, name: str) -> bool:
    """Say whether an event comes from KVM, a probe on one of its functions included."""
    return system in KVM_SYSTEMS or (system.startswith(PROBE_SYSTEM) and name in PROBES)


def vcpus_of(pid: int | None) -> int | None:
    """Return how many vCPUs a process has open; None if it has ended or may not be looked at."""
    if pid is None:
        return None
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)  # noqa: PTH208 (thousands of them)
    except OSError:
        return None
    found: dict[str, list[int]] = {}  # link -> descriptors of different open files
    for name in names:
        with contextlib.suppress(OSError):  # closed since
            link = os.readlink(f"{folder}/{name}")  # noqa: PTH115
            if VCPU_LINK.match(link) and not any(_same_file(pid, int(name), one) for one in found.get(link, ())):
                found.setdefault(link, []).append(int(name))
    return sum(map(len, found.values()))


def _same_file(pid: int, one: int, other: int) -> bool:
    """Say whether two descriptors of a process are one open file (Python's mmap duplicates what it maps)."""
    number = SYS_KCMP.get(os.uname().machine)
    if number is None:
        return False
    import ctypes

    arguments = (ctypes.c_long(value) for value in (number, pid, pid, KCMP_FILE, one, other))
    return int(ctypes.CDLL(None).syscall(*arguments)) == 0


def say_nothing(settings: RecordSettings, meta: dict[str, Any], n_vcpus: int | None) -> str:
    """Return the note for a recording without KVM events.

    Parameters
    ----------
    settings : what was asked for
    meta : the metadata with loss, filters and the target's end
    n_vcpus : from `vcpus_of`, before the target ended
    """
    return f"{BEGINNING}: {_reason(settings, meta, n_vcpus)}"


def _reason(settings: RecordSettings, meta: dict[str, Any], n_vcpus: int | None) -> str:
    if meta["loss"]["events"] != 0:
        return "events were lost; try a larger --buffer-size"
    if meta.get("filtered_events"):
        return "the filters let none of them through"
    if settings.event_set == "minimal" and "kvm_pvm" in kvm_modules():
        return "this KVM (PVM) traces no VM-entry and VM-exit; try --events lifecycle"
    return _reason_of_target(settings.target, n_vcpus)


def _reason_of_target(spec: TargetSpec, n_vcpus: int | None) -> str:
    if spec.kind == "pid" and n_vcpus is None:
        return f"process {spec.pid} ended without running a VM"
    if spec.kind == "pid" and n_vcpus:
        return f"none of the {n_vcpus} vCPUs of process {spec.pid} did anything: the VM is paused, or idle"
    return {
        "pid": f"process {spec.pid} has no VM; -a records whoever has one",
        "all": "no VM ran on this machine in that time",
        "guest": "the guest ended before it ran",
        "command": "the command ran no VM itself; if it asked a service to (libvirt, a container), record that one's "
        "process with -p PID, or the machine with -a",
    }[spec.kind]
