"""The system calls of a recording that tell of a VM's construction."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.kvm import ioctls
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.bring_up import RUN_AGAIN, STRUCTURAL
from kvmtrace.spans.syscalls import pair_syscalls
from kvmtrace.table.distinct import among, distinct

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable

MAX_CALLS = 20_000  # of one construction; QEMU with a large guest needs some hundreds
# system call -> its arguments that Call takes as fd, cmd and arg, "" for none
ARGUMENTS = {
    "ioctl": ("fd", "cmd", "arg"),
    "openat": ("", "", ""),
    "mmap": ("fd", "", "len"),
    "close": ("fd", "", ""),
}


@dataclass(frozen=True)
class Call:
    """A system call as recorded; `cmd` and `arg` are 0 where the call has none, `ret` None if not seen."""

    name: str
    event_index: int
    ts_ns: int
    dur_ns: int | None
    tid: int
    fd: int
    cmd: int
    arg: int
    ret: int | None


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
    for one in sorted({*distinct(file).tolist()} & {*distinct(closed_file).tolist()}):
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


def read_calls(events: EventTable, name: str, processes: Mapping[int, int]) -> list[Call]:
    """Return the system calls `name` (a key of ARGUMENTS) in recorded order, of ioctls those worth a step."""
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
        for column in ARGUMENTS[name]
    ]
    ret = _returns(events, f"sys_exit_{name}", leave)
    return [
        Call(
            name=name,
            event_index=int(row),
            ts_ns=int(events.ts_ns[row]),
            dur_ns=int(events.ts_ns[out] - events.ts_ns[row]) if out >= 0 else None,
            tid=int(events.tid[row]),
            fd=int(fd) if fd < 1 << 31 else -1,
            cmd=int(cmd) & 0xFFFFFFFF,
            arg=int(arg) & 0xFFFFFFFFFFFFFFFF,
            ret=int(value) if out >= 0 else None,
        )
        for row, out, fd, cmd, arg, value in zip(enter, leave, *columns, ret, strict=True)
    ]


def count_ioctls(events: EventTable) -> dict[str, int]:
    """Return ioctl name -> calls in the whole recording, the most frequent first."""
    cmd = events.field("sys_enter_ioctl", "cmd").astype(np.uint32)
    values, counts = np.unique(cmd[(cmd >> 8 & 0xFF) == ioctls.KVMIO], return_counts=True)
    named = [(ioctls.describe_ioctl(int(v)), int(n)) for v, n in zip(values, counts, strict=True)]
    return dict(sorted(named, key=lambda item: -item[1]))
