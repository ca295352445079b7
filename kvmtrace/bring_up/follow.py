"""The VM's construction, followed call by call and held against the model of `model/bring_up.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.bring_up.construction import Construction
from kvmtrace.bring_up.construction_steps import Call
from kvmtrace.bring_up.qmp_answers import check_qmp
from kvmtrace.bring_up.vmm_start import follow_vmm
from kvmtrace.kvm import ioctls
from kvmtrace.model.bring_up import RUN_AGAIN, STRUCTURAL
from kvmtrace.spans.syscalls import pair_syscalls
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kvmtrace.bring_up.construction_steps import KvmObject, Step
    from kvmtrace.bring_up.qmp_answers import QmpCheck
    from kvmtrace.bring_up.vmm_start import VmmStart
    from kvmtrace.table.event_table import EventTable

NO_CALLS = "no KVM ioctl was recorded: the VMM runs without KVM, or the recording began later"
MAX_CALLS = 20_000  # of one construction; QEMU with a large guest needs some hundreds


@dataclass(frozen=True)
class BringUp:
    """The report document's `bring_up`.

    Parameters
    ----------
    steps : the calls in recorded order
    objects : what they made
    ioctl_counts : ioctl name -> calls in the whole recording
    n_explained : calls that KVM refused as its contract says
    n_violations : calls whose result contradicts the contract
    notes : what the recording does not show
    vmm : the VMM's own start, None if its functions were not probed
    qmp : what QEMU itself said, beside what the trace shows; None if it was not asked
    """

    steps: tuple[Step, ...]
    objects: tuple[KvmObject, ...]
    ioctl_counts: dict[str, int] = field(default_factory=dict)
    n_explained: int = 0
    n_violations: int = 0
    notes: tuple[str, ...] = ()
    vmm: VmmStart | None = None
    qmp: QmpCheck | None = None

    @property
    def conforms(self) -> bool:
        """Say whether KVM kept its contract in every recorded call."""
        return self.n_violations == 0


def _interesting_ioctls(
    events: EventTable, rows: NDArray[np.intp], returns: NDArray[np.intp], processes: Mapping[int, int]
) -> NDArray[np.bool_]:
    """Mask the ioctls worth a step.

    All of the construction (up to the last vCPU's first KVM_RUN), then only what makes an object or fails;
    of KVM_RUN the first of each thread and open descriptor, and the failing ones.
    """
    position = np.searchsorted(events.rows("sys_enter_ioctl"), rows)
    cmd = events.field("sys_enter_ioctl", "cmd")[position].astype(np.uint32)
    fd = events.field("sys_enter_ioctl", "fd")[position].astype(np.int64)
    is_kvm = (cmd >> 8 & 0xFF) == ioctls.KVMIO
    is_run = cmd == ioctls.KVM_RUN
    runs = np.flatnonzero(is_run)
    first = np.zeros(len(rows), bool)
    if len(runs):
        who = events.tid[rows[runs]].astype(np.int64) << 32 | fd[runs] & 0xFFFFFFFF
        closed = _times_closed(events, rows[runs], fd[runs], processes)
        if closed.any():  # the descriptor's number went to another file
            who = np.unique(who, return_inverse=True)[1].reshape(-1) * (closed.max() + 1) + closed
        first[runs[np.unique(who, return_index=True)[1]]] = True
    ret = _returns(events, "sys_exit_ioctl", returns)
    failed = (ret < 0) & ~among(-ret, RUN_AGAIN) & (returns >= 0)
    last = rows[np.flatnonzero(first)[-1]] if first.any() else len(events)
    wanted = among(cmd, STRUCTURAL) | failed | (rows <= last)
    mask: NDArray[np.bool_] = is_kvm & np.where(is_run, first | failed, wanted)
    return mask


def _files(
    events: EventTable, rows: NDArray[np.intp], fd: NDArray[np.int64], processes: Mapping[int, int]
) -> NDArray[np.int64]:
    """Return a number for each call's process and descriptor."""
    tids, inverse = np.unique(events.tid[rows], return_inverse=True)
    pids = np.array([processes.get(tid, tid) for tid in tids.tolist()], np.int64)
    return pids[inverse.reshape(-1)] << 32 | fd & 0xFFFFFFFF


def _times_closed(
    events: EventTable, rows: NDArray[np.intp], fd: NDArray[np.int64], processes: Mapping[int, int]
) -> NDArray[np.int64]:
    """Return how often its process had closed each call's descriptor before the call."""
    closed = np.zeros(len(rows), np.int64)
    if not events.has("sys_enter_close", "fd"):
        return closed
    closes = events.rows("sys_enter_close")
    file = _files(events, rows, fd, processes)
    closed_file = _files(events, closes, events.field("sys_enter_close", "fd").astype(np.int64), processes)
    for one in np.intersect1d(file, closed_file):
        own = np.flatnonzero(file == one)
        closed[own] = np.searchsorted(closes[closed_file == one], rows[own])
    return closed


def _returns(events: EventTable, name: str, exit_rows: NDArray[np.intp]) -> NDArray[np.int64]:
    """Return `ret` of each exit row; 0 where there is none."""
    ret = np.zeros(len(exit_rows), np.int64)
    there = exit_rows >= 0
    if there.any():
        position = np.searchsorted(events.rows(name), exit_rows[there])
        ret[there] = events.field(name, "ret")[position]
    return ret


def _calls(events: EventTable, name: str, fields: tuple[str, ...], processes: Mapping[int, int]) -> list[Call]:
    """Return the system calls `name` as Calls; `fields` are fd, cmd, arg in that order ("" for none)."""
    enter, leave = pair_syscalls(events, name)
    if name == "ioctl" and len(enter):
        mask = _interesting_ioctls(events, enter, leave, processes)
        enter, leave = enter[mask], leave[mask]
    enter, leave = enter[:MAX_CALLS], leave[:MAX_CALLS]
    position = np.searchsorted(events.rows(f"sys_enter_{name}"), enter)
    columns = [
        events.field(f"sys_enter_{name}", column)[position].astype(np.int64)
        if column
        else np.zeros(len(enter), np.int64)
        for column in fields
    ]
    ret = _returns(events, f"sys_exit_{name}", leave)
    return [
        Call(
            name,
            int(row),
            int(events.ts_ns[row]),
            int(events.ts_ns[out] - events.ts_ns[row]) if out >= 0 else None,
            int(events.tid[row]),
            int(fd) if fd < 1 << 31 else -1,
            int(cmd) & 0xFFFFFFFF,
            int(arg) & 0xFFFFFFFFFFFFFFFF,
            int(value) if out >= 0 else None,
        )
        for row, out, fd, cmd, arg, value in zip(enter, leave, *columns, ret, strict=True)
    ]


def _counts(events: EventTable) -> dict[str, int]:
    cmd = events.field("sys_enter_ioctl", "cmd").astype(np.uint32)
    values, counts = np.unique(cmd[(cmd >> 8 & 0xFF) == ioctls.KVMIO], return_counts=True)
    named = [(ioctls.describe_ioctl(int(v)), int(n)) for v, n in zip(values, counts, strict=True)]
    return dict(sorted(named, key=lambda item: -item[1]))


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
    isa : "vmx" or "svm", names the kernel's objects
    qmp : what QEMU said of itself, from the capture's metadata

    Returns
    -------
    BringUp, or None if neither a KVM ioctl nor a function of the VMM was recorded
    """
    if not events.has("sys_enter_ioctl", "cmd"):
        return None
    calls = _calls(events, "ioctl", ("fd", "cmd", "arg"), processes or {})
    if not calls:
        vmm = follow_vmm(events, {})
        return None if vmm is None else BringUp((), (), vmm=vmm, notes=(NO_CALLS,))
    for name, fields in (("openat", ("", "", "")), ("mmap", ("fd", "", "len")), ("close", ("fd", "", ""))):
        if events.has(f"sys_enter_{name}"):
            calls += _calls(events, name, fields, processes or {})
    construction = Construction(processes or {}, isa, _forks(events, processes or {}))
    for call in sorted(calls, key=lambda call: call.event_index):
        construction.follow(call)
    steps = tuple(construction.steps)
    first = {step.name: step.event_index for step in reversed(steps)}
    return BringUp(
        steps,
        tuple(construction.objects.values()),
        _counts(events),
        sum(step.verdict == "explained" for step in steps),
        sum(step.verdict == "violation" for step in steps),
        tuple(construction.notes),
        follow_vmm(events, first),
        check_qmp(qmp, construction.objects.values()),
    )
