"""Time in the VMM: from each return of KVM_RUN to the thread's next KVM_RUN."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.spans.lanes import Step
from kvmtrace.spans.span_builder import SpanBuilder, iter_spans
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from kvmtrace.spans.lanes import Lanes
    from kvmtrace.spans.span_builder import Spans
    from kvmtrace.table.event_table import EventTable

_INSIDE_KVM_RUN = (Step.RUN, Step.FPU_LOAD, Step.ENTRY, Step.EXIT)

USERSPACE_DTYPE = np.dtype(
    [
        ("ts_ns", np.int64),  # of kvm_userspace_exit
        ("dur_ns", np.int64),  # from the ioctl's return to the thread's next KVM_RUN; -1: none
        ("tid", np.int32),
        ("cpu", np.int16),
        ("reason", np.int64),
        ("errno", np.int64),
        ("lost", np.bool_),  # events may have been lost between
        ("row", np.int64),
    ]
)


@dataclass(frozen=True)
class UserspaceStays:
    """Stays in userspace that ended with a further KVM_RUN.

    Attributes
    ----------
    left : (n,) lane rows of the userspace exits
    dur_ns : (n,) int64
    sound : (n,) bool, time did not step back and no event can have been lost in between
    """

    left: NDArray[np.intp]
    dur_ns: NDArray[np.int64]
    sound: NDArray[np.bool_]


def find_userspace_stays(lanes: Lanes) -> UserspaceStays:
    """Pair each userspace exit with the first sign of the thread's next KVM_RUN.

    The time runs from the ioctl's return (kvm_userspace_exit where returns were not recorded) to sys_enter_ioctl, the
    kvm_vcpu_ioctl probe, kvm_fpu load or kvm_entry, whichever was recorded.
    """
    exits = lanes.step == Step.USERSPACE_EXIT
    called = among(lanes.step, _INSIDE_KVM_RUN)
    rows = np.flatnonzero(exits | called)
    closes = exits[rows[:-1]] & called[rows[1:]] & (lanes.thread[rows[:-1]] == lanes.thread[rows[1:]])
    left, again = rows[:-1][closes], rows[1:][closes]
    behind = np.minimum(left + 1, max(len(lanes) - 1, 0))
    returned = lanes.step[behind] == Step.RETURN
    dur_ns = lanes.ts_ns[again] - np.where(returned, lanes.ts_ns[behind], lanes.ts_ns[left])
    n_suspect = np.concatenate([[0], np.cumsum(lanes.suspect)])
    return UserspaceStays(left, dur_ns, (dur_ns >= 0) & (n_suspect[again] == n_suspect[left]))


def userspace_rows(spans: Spans) -> NDArray[Any]:
    """Return the userspace exits of a piece of spans, which must know their rows, by row.

    Returns
    -------
    ndarray[USERSPACE_DTYPE]
    """
    lanes, table = spans.lanes, spans.table
    assert table is not None
    assert lanes.row is not None
    at = np.flatnonzero((lanes.step == Step.USERSPACE_EXIT) & ~spans.told_later)
    out = np.zeros(len(at), USERSPACE_DTYPE)
    out["ts_ns"], out["cpu"], out["row"], out["dur_ns"] = lanes.ts_ns[at], lanes.cpu[at], lanes.row[at], -1
    out["tid"] = np.array(spans.tids, np.int32)[lanes.thread[at]]
    own = table.position_in_kind[spans.table_rows(at)]
    for name in ("reason", "errno"):
        if table.has("kvm_userspace_exit", name):
            out[name] = table.field("kvm_userspace_exit", name)[own]
    stays = find_userspace_stays(lanes)
    number = np.searchsorted(at, stays.left)
    out["dur_ns"][number], out["lost"][number] = np.maximum(stays.dur_ns, -1), ~stays.sound & (stays.dur_ns >= 0)
    return out[np.argsort(out["row"], kind="stable")]


def collect_userspace_exits(tables: Iterable[EventTable]) -> NDArray[Any]:
    """Return every return of KVM_RUN of a recording, in recorded order.

    Returns
    -------
    ndarray[USERSPACE_DTYPE], shape (n,)
    """
    parts = [userspace_rows(spans) for spans in iter_spans(tables, SpanBuilder(rows=True))]
    found = np.concatenate([np.empty(0, USERSPACE_DTYPE), *parts])
    return found[np.argsort(found["row"], kind="stable")]
