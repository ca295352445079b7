"""What strace and a recording saw of the same run: the KVM ioctls of each thread, in order."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvmtrace.kvm.ioctls import KVMIO
from kvmtrace.spans.syscalls import pair_syscalls

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.table.event_table import EventTable

# "812 ioctl(0x4, 0xae41, 0x1) = 0x5", whole or in two lines, as `strace -f -e raw=ioctl` prints it
BEGUN = re.compile(r"(\d+) +ioctl\((0x[0-9a-f]+|0), (0x[0-9a-f]+|0)(?:, (0x[0-9a-f]+|0))?(\)| <unfinished)")
ENDED = re.compile(r"\) += (-?(?:0x)?[0-9a-f]+)")
RESUMED = re.compile(r"(\d+) +<\.\.\. ioctl resumed>")
STRACE = ("strace", "-f", "-e", "raw=ioctl", "-e", "trace=ioctl")


class Ioctl(NamedTuple):
    """A KVM ioctl; `ret` is None where the thread ended in it."""

    fd: int
    cmd: int
    ret: int | None


def _value(text: str | None, line: str) -> int | None:
    if text is None:
        return None
    value = int(text, 0)
    if value != -1:
        return value
    name = line.rsplit("= ", 1)[1].split()[1]  # "-1 EEXIST (File exists)"
    return -int(getattr(errno, name))


def read_strace(path: Path) -> dict[int, list[Ioctl]]:
    """Return the KVM ioctls of each thread in the order of their beginning."""
    calls: dict[int, list[Ioctl]] = {}
    pending: dict[int, int] = {}
    for line in path.read_text().splitlines():
        resumed, begun, ended = RESUMED.match(line), BEGUN.match(line), ENDED.search(line)
        ret = _value(ended[1] if ended else None, line)
        if resumed and int(resumed[1]) in pending:
            tid = int(resumed[1])
            at = pending.pop(tid)
            calls[tid][at] = calls[tid][at]._replace(ret=ret)
        elif begun and int(begun[3], 0) >> 8 & 0xFF == KVMIO:
            tid = int(begun[1])
            own = calls.setdefault(tid, [])
            if begun[5] != ")":
                pending[tid] = len(own)
            own.append(Ioctl(int(begun[2], 0), int(begun[3], 0) & 0xFFFFFFFF, ret))
    return calls


def recorded_ioctls(events: EventTable) -> dict[int, list[Ioctl]]:
    """Return the same from a recording."""
    enter, leave = pair_syscalls(events, "ioctl")
    at = np.searchsorted(events.rows("sys_enter_ioctl"), enter)
    fd, cmd = (events.field("sys_enter_ioctl", name)[at].astype(np.int64) for name in ("fd", "cmd"))
    exits = events.rows("sys_exit_ioctl")
    ret = events.field("sys_exit_ioctl", "ret")
    calls: dict[int, list[Ioctl]] = {}
    for row, out, one_fd, one_cmd in zip(enter, leave, fd, cmd, strict=True):
        if one_cmd >> 8 & 0xFF == KVMIO:
            value = int(ret[np.searchsorted(exits, out)]) if out >= 0 else None
            calls.setdefault(int(events.tid[row]), []).append(Ioctl(int(one_fd), int(one_cmd) & 0xFFFFFFFF, value))
    return calls
