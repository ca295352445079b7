"""The VM's construction, followed call by call and held against the model of `model/bring_up.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtrace.bring_up.calls import ARGUMENTS, count_ioctls, read_calls
from kvmtrace.bring_up.construction import Construction
from kvmtrace.bring_up.followed import BringUp
from kvmtrace.bring_up.qmp_answers import check_qmp
from kvmtrace.bring_up.vmm_start import follow_vmm

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmtrace.table.event_table import EventTable

NO_CALLS = "no KVM ioctl was recorded: the VMM runs without KVM, or the recording began later"


def _forks(events: EventTable, processes: Mapping[int, int]) -> dict[int, int]:
    """Return pid -> pid of its parent, of the processes (not threads) whose making was recorded."""
    if not events.has("sched_process_fork", "child_pid"):
        return {}
    children, parents = (events.field("sched_process_fork", f"{who}_pid").tolist() for who in ("child", "parent"))
    return {
        child: processes.get(parent, parent)
        for child, parent in zip(children, parents, strict=True)
        if processes.get(child) == child
    }


def follow_bring_up(
    events: EventTable,
    *,
    processes: Mapping[int, int] | None = None,
    isa: str | None = None,
    qmp: Any = None,
) -> BringUp | None:
    """Follow the construction of every VM in a recording.

    Parameters
    ----------
    events : EventTable with sys_enter_ioctl and sys_exit_ioctl; openat, mmap and close where recorded
    processes : tid -> pid where known; a KVM file belongs to the process that made it
    isa : Isa.name; it names the kernel's objects
    qmp : what QEMU said of itself, from the capture's metadata

    Returns
    -------
    BringUp, or None if neither a KVM ioctl nor a function of the VMM was recorded
    """
    if not events.has("sys_enter_ioctl", "cmd"):
        return None
    known = processes or {}
    calls = read_calls(events, "ioctl", known)
    if not calls:
        vmm = follow_vmm(events, {})
        return None if vmm is None else BringUp((), (), vmm=vmm, notes=(NO_CALLS,))
    for name in ARGUMENTS:
        if name != "ioctl" and events.has(f"sys_enter_{name}"):
            calls += read_calls(events, name, known)
    construction = Construction(known, isa, _forks(events, known))
    for call in sorted(calls, key=lambda call: call.event_index):
        construction.follow(call)
    steps, objects = tuple(construction.steps), construction.table.finished()
    first = {step.name: step.event_index for step in reversed(steps)}
    return BringUp(
        steps=steps,
        objects=objects,
        ioctl_counts=count_ioctls(events),
        n_explained=sum(step.verdict == "explained" for step in steps),
        n_violations=sum(step.verdict == "violation" for step in steps),
        notes=tuple(construction.table.notes),
        vmm=follow_vmm(events, first),
        qmp=check_qmp(qmp, objects),
    )
