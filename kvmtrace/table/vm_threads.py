"""Which VM a thread belongs to, as far as the recorder noted (the metadata's `vms` and `threads`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmtrace.table.recording import Recording


def recorded_vms(recording: Recording) -> list[dict[str, Any]]:
    """Return the metadata's rows of `vms`, checked when they were read; [] for recordings without any."""
    return recording.capture.meta.get("vms") or []


def processes_of(recording: Recording) -> dict[int, int]:
    """Return tid -> pid, from whatever the recording says of its threads."""
    meta = recording.capture.meta
    threads = {int(tid): int(pid) for tid, (pid, _) in (meta.get("threads") or {}).items() if int(pid) > 0}
    vcpus = {int(tid): vm["pid"] for vm in recorded_vms(recording) for tid in vm.get("vcpus") or {}}
    guest_run = meta.get("guest_run") or {}
    ours = dict.fromkeys((guest_run.get("vcpu_tids") or {}).values(), guest_run.get("pid"))
    told = {int(tid): int(pid) for tid, pid in ours.items() if pid is not None}
    return {**told, **vcpus, **threads, **recording.processes}


def names_of_processes(recording: Recording) -> dict[int, str]:
    """Return pid -> name of its VM, of VMs that have one; where a pid was given twice, of the later one."""
    return {vm["pid"]: vm["name"] for vm in recorded_vms(recording) if vm.get("name")}


def labels_of_threads(recording: Recording) -> dict[int, str]:
    """Return tid -> name of its VM, or else of its process, as far as known: what tables say in the column `vm`."""
    names = {**recording.comms, **names_of_processes(recording)}
    return {tid: names[pid] for tid, pid in processes_of(recording).items() if pid in names}


def names_of_threads(recording: Recording) -> dict[int, str]:
    """Return tid -> name of its VM, of threads of VMs that have one."""
    names = names_of_processes(recording)
    return {tid: names[pid] for tid, pid in processes_of(recording).items() if pid in names}
