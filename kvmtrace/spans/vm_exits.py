"""VM-exit intervals: each kvm_exit with the kvm_entry that ended it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.errors import MissingEventError
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable

EXIT_DTYPE = np.dtype(
    [
        ("ts_ns", np.int64),  # of kvm_exit
        ("entry_ts_ns", np.int64),  # of the kvm_entry that followed; -1: none
        ("dur_ns", np.int64),  # entry_ts_ns - ts_ns; -1: unpaired, or the clock stepped back
        ("guest_before_ns", np.int64),  # from the kvm_entry before to kvm_exit; -1: unknown
        ("tid", np.int32),
        ("vcpu_id", np.int32),  # -1: not recorded
        ("cpu", np.int16),  # of kvm_exit
        ("entry_cpu", np.int16),  # of kvm_entry; -1: none
        ("isa", np.uint8),  # 1 VMX, 2 SVM; 0: not recorded
        ("exit_reason", np.uint32),  # raw: VMX keeps its flags, SVM's exit code
        ("guest_rip", np.uint64),  # at the exit
        ("entry_rip", np.uint64),  # at the entry; 0: none
        ("info1", np.uint64),
        ("info2", np.uint64),
        ("intr_info", np.uint32),
        ("error_code", np.uint32),
        ("to_userspace", np.bool_),  # a kvm_userspace_exit of the thread lies between
        ("lost", np.bool_),  # events were lost on its CPUs between: the pair may be a wrong one
        ("row", np.int64),  # of kvm_exit in the event table
        ("entry_row", np.int64),  # of kvm_entry; -1: none
    ]
)
_EXIT_FIELDS = ("isa", "exit_reason", "guest_rip", "info1", "info2", "intr_info", "error_code")
MAX_PID = 1 << 22  # PID_MAX_LIMIT of the kernel, include/linux/threads.h


def group_codes(values: NDArray[Any]) -> NDArray[Any]:
    """Return small codes for thread ids such that a stable sort of them is a radix sort."""
    if len(values) and values.min() >= 0 and values.max() <= MAX_PID:
        present = np.zeros(int(values.max()) + 1, bool)
        present[values] = True
        codes: NDArray[Any] = (np.cumsum(present) - 1)[values]
    else:
        codes = np.unique(values, return_inverse=True)[1].reshape(-1)
    return codes.astype(np.uint16) if len(codes) and codes.max() <= 0xFFFF else codes


class _Pairs:
    """The entries and exits of all threads, sorted by thread and then by row.

    Attributes
    ----------
    row, tid : of each; shape (n,)
    is_exit : bool; exit_at : positions of the exits
    paired : bool per exit, the thread's next of them is an entry
    """

    def __init__(self, events: EventTable) -> None:
        exits, entries = events.rows("kvm_exit"), events.rows("kvm_entry")
        rows = np.concatenate((exits, entries))
        by_row = np.argsort(rows, kind="stable")
        rows = rows[by_row]
        tid = events.tid[rows]
        order = np.argsort(group_codes(tid), kind="stable")
        self.row: NDArray[np.intp] = rows[order]
        self.tid: NDArray[np.int32] = tid[order]
        self.is_exit: NDArray[np.bool_] = by_row[order] < len(exits)
        self.position: NDArray[np.intp] = by_row[order]  # within its kind, entries behind the exits
        self.exit_at = np.flatnonzero(self.is_exit)
        self.n_exits = len(exits)

    def neighbour(self, step: int) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Return, per exit, where the event `step` places on is, and whether it is of the same thread."""
        at = self.exit_at + step
        inside = (at >= 0) & (at < len(self.row))
        at = np.clip(at, 0, max(len(self.row) - 1, 0))
        return at, inside & (self.tid[at] == self.tid[self.exit_at])


def _between(ascending: NDArray[np.intp], first: NDArray[np.intp], last: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Say for each first..last whether a value lies strictly between."""
    return np.less(np.searchsorted(ascending, first, "right"), np.searchsorted(ascending, last, "left"))


def _has_event(
    events: EventTable, name: str, tid: NDArray[np.int32], first: NDArray[np.intp], last: NDArray[np.intp]
) -> NDArray[np.bool_]:
    """Say for each interval whether event `name` of its thread lies strictly between its rows."""
    rows = events.rows(name)
    if not len(rows):
        return np.zeros(len(first), bool)
    # one sorted sequence of all threads: the thread decides first, then the row
    width = np.int64(len(events) + 1)
    keys = np.sort(events.tid[rows].astype(np.int64) * width + rows)
    base = tid.astype(np.int64) * width
    return _between(keys, base + first, base + last)


def _lost_between(events: EventTable, out: NDArray[Any], last: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Say which intervals overlap a gap of the CPU of their exit or of their entry.

    A gap lies between the row of lost events and the CPU's row before it.
    """
    lost = events.rows(LOST_EVENTS)
    result = np.zeros(len(out), bool)
    for cpu in np.unique(events.cpu[lost]).tolist():
        ends = lost[events.cpu[lost] == cpu]
        own = np.flatnonzero(events.cpu == cpu)
        before = np.searchsorted(own, ends) - 1
        begins = np.where(before >= 0, own[np.maximum(before, 0)], -1)
        mine = np.flatnonzero((out["cpu"] == cpu) | (out["entry_cpu"] == cpu) | (out["entry_cpu"] < 0))
        # the first gap that ends after the exit begins before the end of the interval
        gap = np.searchsorted(ends, out["row"][mine], "right")
        some = gap < len(ends)
        result[mine[some]] |= begins[gap[some]] < last[mine[some]]
    return result


def vm_exit_intervals(events: EventTable) -> NDArray[Any]:
    """Pair each VM-exit with the next VM-entry of the same thread.

    An exit that another exit follows is unpaired, as is a thread's last one.

    Parameters
    ----------
    events : EventTable, n rows in recorded order

    Returns
    -------
    ndarray[EXIT_DTYPE], shape (n_exits,), in recorded order; fields that were not recorded are 0 (vcpu_id -1)

    Raises
    ------
    MissingEventError
        kvm_entry or kvm_exit was not recorded.

    Source: arch/x86/kvm/trace.h, TRACE_EVENT(kvm_entry), TRACE_EVENT(kvm_exit)
    """
    missing = [name for name in ("kvm_exit", "kvm_entry") if not events.has(name)]
    if missing:
        raise MissingEventError(f"the recording has no {' and no '.join(missing)}")
    pairs = _Pairs(events)
    exits = events.rows("kvm_exit")
    out = np.zeros(len(exits), EXIT_DTYPE)
    out["row"] = exits
    for name in ("ts_ns", "tid", "cpu"):
        out[name] = getattr(events, name)[exits]
    for name in _EXIT_FIELDS:
        if events.has("kvm_exit", name):
            out[name] = events.field("kvm_exit", name)
    last = _fill_entries(events, pairs, out)
    _fill_vcpu(events, pairs, out)
    out["lost"] = _lost_between(events, out, last)
    out["to_userspace"] = _has_event(events, "kvm_userspace_exit", out["tid"], exits, last)
    _fill_guest_time(events, pairs, out)
    return out


def _fill_entries(events: EventTable, pairs: _Pairs, out: NDArray[Any]) -> NDArray[np.intp]:
    """Fill what the following entry tells; return per exit the row that ends its interval."""
    for name in ("entry_ts_ns", "dur_ns", "entry_cpu", "entry_row"):
        out[name] = -1
    after, same = pairs.neighbour(1)
    exit_number = pairs.position[pairs.exit_at]
    last = np.full(len(out), len(events), np.intp)
    last[exit_number[same]] = pairs.row[after[same]]
    paired = same & ~pairs.is_exit[after] if len(after) else same
    number, entry = exit_number[paired], after[paired]
    row = pairs.row[entry]
    out["entry_row"][number], out["entry_cpu"][number] = row, events.cpu[row]
    out["entry_ts_ns"][number] = events.ts_ns[row]
    out["dur_ns"][number] = np.maximum(events.ts_ns[row] - out["ts_ns"][number], -1)
    if events.has("kvm_entry", "rip"):
        out["entry_rip"][number] = events.field("kvm_entry", "rip")[pairs.position[entry] - pairs.n_exits]
    return last


def _fill_vcpu(events: EventTable, pairs: _Pairs, out: NDArray[Any]) -> None:
    """Fill vcpu_id: from the exit itself, or from the entry beside it where old kernels lack it there."""
    out["vcpu_id"] = -1
    if events.has("kvm_exit", "vcpu_id"):
        out["vcpu_id"] = events.field("kvm_exit", "vcpu_id").astype(np.int32)
    elif events.has("kvm_entry", "vcpu_id"):
        ids = events.field("kvm_entry", "vcpu_id").astype(np.int32)
        for step in (1, -1):
            at, same = pairs.neighbour(step)
            good = same & ~pairs.is_exit[at] if len(at) else same
            number = pairs.position[pairs.exit_at[good]]
            out["vcpu_id"][number] = ids[pairs.position[at[good]] - pairs.n_exits]


def _fill_guest_time(events: EventTable, pairs: _Pairs, out: NDArray[Any]) -> None:
    """Fill guest_before_ns where the thread's event before the exit is an entry and nothing was lost since."""
    out["guest_before_ns"] = -1
    before, same = pairs.neighbour(-1)
    good = same & ~pairs.is_exit[before] if len(before) else same
    number, entry_row = pairs.position[pairs.exit_at[good]], pairs.row[before[good]]
    exit_row = pairs.row[pairs.exit_at[good]]
    lost = events.rows(LOST_EVENTS)
    hidden = np.zeros(len(number), bool)
    for cpu in np.unique(events.cpu[lost]).tolist():
        own = lost[events.cpu[lost] == cpu]
        there = (events.cpu[exit_row] == cpu) | (events.cpu[entry_row] == cpu)
        hidden |= there & _between(own, entry_row, exit_row)
    dur = events.ts_ns[exit_row] - events.ts_ns[entry_row]
    good_time = ~hidden & (dur >= 0)
    out["guest_before_ns"][number[good_time]] = dur[good_time]
