"""The pairing of VM-exits and VM-entries: the one that all statistics, comparisons and exports rest on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace._native.edges import pair_edges
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.spans.lanes import REASON_MASK, Step

if TYPE_CHECKING:
    import numpy as np
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
    found = pair_edges(lanes, Step.EXIT, REASON_MASK)
    return Pairs(owner=owner, **vars(found))
