"""The pairing of VM-exits and VM-entries: the one that all statistics, comparisons and exports rest on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.spans.lanes import Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.spans.lanes import Lanes


@dataclass(frozen=True)
class Pairs:
    """Consecutive VM-entries and VM-exits of the same thread, as pairs of lane rows.

    Attributes
    ----------
    edges : (e,) rows of all entries and exits
    owner : (n,) of each lane row, the thread's latest entry or exit up to it; -1 for none
    is_exit : (e,) bool, the edge is an exit
    reasons : (e,) int64, of exits the exit reason's number; meaningless for entries
    handling : (e-1,) bool, edges i and i+1 are an exit and the entry that ends its handling
    guest : (e-1,) bool, edges i and i+1 are an entry and the exit that ends guest mode
    dur_ns : (e-1,) int64, time from edge i to edge i+1
    sound : (e-1,) bool, no event can have been lost in between and time did not step back
    """

    edges: NDArray[np.intp]
    owner: NDArray[np.int32]
    is_exit: NDArray[np.bool_]
    reasons: NDArray[np.int64]
    handling: NDArray[np.bool_]
    guest: NDArray[np.bool_]
    dur_ns: NDArray[np.int64]
    sound: NDArray[np.bool_]


def find_pairs(lanes: Lanes, owner: NDArray[np.int32]) -> Pairs:
    """Pair the entries and exits of each thread; an exit that another exit follows has no pair.

    Parameters
    ----------
    owner : of each lane row, the thread's latest entry or exit up to it; -1 for none

    Source: arch/x86/kvm/trace.h, TRACE_EVENT(kvm_entry), TRACE_EVENT(kvm_exit)
    """
    is_edge = lanes.step <= Step.EXIT  # Step.ENTRY or Step.EXIT
    edges = np.flatnonzero(is_edge)
    is_exit = lanes.step[edges] == Step.EXIT
    thread, ts_ns = lanes.thread[edges], lanes.ts_ns[edges]
    same = thread[:-1] == thread[1:]
    dur_ns = np.diff(ts_ns)
    sound = dur_ns >= 0
    if lanes.suspect.any():
        n_suspect = np.concatenate([[0], np.cumsum(lanes.suspect)])[edges]
        sound &= np.diff(n_suspect) == 0
    handling, guest = same & is_exit[:-1] & ~is_exit[1:], same & ~is_exit[:-1] & is_exit[1:]
    return Pairs(edges, owner, is_exit, lanes.reasons(edges), handling, guest, dur_ns, sound)
