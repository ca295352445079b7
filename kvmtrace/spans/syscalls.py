"""System calls as intervals: each sys_enter paired with the sys_exit of the same thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable


def pair_syscalls(events: EventTable, name: str) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Pair the entries of a system call with their returns.

    Parameters
    ----------
    events : EventTable
    name : str, system call name ("ioctl")

    Returns
    -------
    enter_rows : ndarray[intp], shape (n,), rows of sys_enter_NAME, ascending
    exit_rows : ndarray[intp], shape (n,), row of the matching sys_exit_NAME; -1 where the recording has none
    """
    enter, leave = events.rows(f"sys_enter_{name}"), events.rows(f"sys_exit_{name}")
    rows = np.concatenate([enter, leave])
    is_enter = np.arange(len(rows)) < len(enter)
    order = np.lexsort((rows, events.tid[rows]))
    rows, is_enter = rows[order], is_enter[order]
    tid = events.tid[rows]
    matched = np.zeros(len(rows), bool)
    if len(rows) > 1:
        matched[:-1] = is_enter[:-1] & ~is_enter[1:] & (tid[:-1] == tid[1:])
    following = np.append(rows[1:], -1)
    enter_rows = rows[is_enter]
    exit_rows = np.where(matched, following, -1)[is_enter]
    back = np.argsort(enter_rows, kind="stable")
    return enter_rows[back], exit_rows[back]
