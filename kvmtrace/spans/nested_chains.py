"""VM-exits of L2 as L2 sees them: from the exit to the next entry into L2, all that L0 and L1 do between.

An exit that KVM handles itself ends with the next VM-entry. One that it passes on to L1 is a chain: L1 is entered,
takes exits of its own (VMREAD, VMWRITE and the like) and at last enters L2 again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvmtrace.kvm.nested_events import L1, L2
from kvmtrace.spans.keys import grown
from kvmtrace.spans.lanes import REASON_BITS, Step
from kvmtrace.spans.span_builder import SpanBuilder, iter_spans
from kvmtrace.spans.time_parts import N_PARTS, Part

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from kvmtrace.spans.lane_keys import LaneKeys
    from kvmtrace.spans.span_builder import Spans
    from kvmtrace.table.event_table import EventTable

# fmt: off
CHAIN_DTYPE = np.dtype([
    ("ts_ns", np.int64),  # of L2's kvm_exit
    ("thread", np.int32),  # number of the thread
    ("tid", np.int32),
    ("number", np.int64),  # of the thread's VM-exits, from 1: what `report --explain` takes
    ("reason", np.int32),  # number of the exit reason (LaneKeys.reasons)
    ("rip", np.int32),  # number of L2's RIP (LaneKeys.rips)
    ("reflected", np.bool_),  # L1 got an exit for it
    ("complete", np.bool_),  # L2 was seen to go on; else the times below are those up to where it breaks off
    ("l1_exits", np.int64),  # VM-exits that L1 took itself meanwhile
    ("dur_ns", np.int64),  # sum of the parts
    ("l0_ns", np.int64),  # in KVM, entry and exit path included
    ("l1_guest_ns", np.int64),  # L1 ran
    ("userspace_ns", np.int64),  # in the VMM
    ("waiting_ns", np.int64),  # blocked or halt-polling
    ("preempted_ns", np.int64),  # switched out though runnable
    ("unknown_ns", np.int64),  # may hide lost events
])
# fmt: on
_PARTS = {
    "l0_ns": (Part.HANDLER, Part.ENTRY_EXIT),
    "l1_guest_ns": (Part.GUEST,),
    "userspace_ns": (Part.USERSPACE,),
    "waiting_ns": (Part.BLOCKED, Part.HALT_POLL),
    "preempted_ns": (Part.PREEMPTED,),
    "unknown_ns": (Part.UNKNOWN,),
}


class PieceOfChains(NamedTuple):
    """What a piece of spans tells of chains.

    Attributes
    ----------
    ended : ndarray[CHAIN_DTYPE], chains that end in the piece
    within : (n,) bool, of each lane row: it belongs to a chain in which L1 runs, or may yet
    """

    ended: NDArray[Any]
    within: NDArray[np.bool_]


class NestedChains:
    """Follows the chains of consecutive pieces of spans."""

    def __init__(self) -> None:
        self._open: dict[int, NDArray[Any]] = {}  # thread -> its chain that has not ended, one row
        self._exits = np.zeros(16, np.int64)  # per thread: VM-exits so far

    def feed(self, spans: Spans) -> PieceOfChains:
        """Take in the next piece."""
        lanes, pairs = spans.lanes, spans.pairs
        l2 = (spans.levels == L2) & ~spans.told_later[pairs.edges]
        if not self._open and not l2.any():
            self._count(spans)
            return PieceOfChains(np.empty(0, CHAIN_DTYPE), np.zeros(len(lanes), bool))
        begins = np.flatnonzero(l2 & pairs.is_exit)
        made = self._made(spans, begins)
        self._count(spans)
        chain = self._of_rows(spans, begins, made)
        made = np.concatenate([made, *self._open.values()]) if self._open else made
        _add_parts(spans, chain, made)
        _add_events(spans, chain, made)
        return PieceOfChains(self._split(spans, begins, made), chain >= 0)

    def finish(self) -> NDArray[Any]:
        """Return the chains that never ended."""
        rest = [_summed(row) for row in self._open.values()]
        return np.concatenate([np.empty(0, CHAIN_DTYPE), *rest])

    def _count(self, spans: Spans) -> None:
        thread = spans.lanes.thread[spans.pairs.edges[spans.pairs.is_exit]]
        counts = np.bincount(thread)
        self._exits = grown(self._exits, len(counts))
        self._exits[: len(counts)] += counts

    def _made(self, spans: Spans, begins: NDArray[np.intp]) -> NDArray[Any]:
        """Return the chains that begin in a piece, empty as yet."""
        lanes, pairs = spans.lanes, spans.pairs
        rows = pairs.edges[begins]
        made = np.zeros(len(begins), CHAIN_DTYPE)
        made["ts_ns"], made["thread"] = lanes.ts_ns[rows], lanes.thread[rows]
        made["tid"] = np.array(spans.tids, np.int32)[lanes.thread[rows]]
        made["reason"], made["rip"] = pairs.reasons[begins], lanes.arg[rows] >> REASON_BITS
        n_before = np.concatenate([[0], np.cumsum(pairs.is_exit)])
        first = np.searchsorted(pairs.edges, lanes.starts())  # of each thread, its first edge
        of = np.searchsorted(lanes.starts(), rows, "right") - 1
        self._exits = grown(self._exits, int(lanes.thread.max()) + 1)
        made["number"] = n_before[begins] - n_before[first[of]] + 1 + self._exits[lanes.thread[rows]]
        return made

    def _of_rows(self, spans: Spans, begins: NDArray[np.intp], made: NDArray[Any]) -> NDArray[np.int64]:
        """Return the chain of each lane row: an index into `made`, then into the open ones; -1 for none."""
        lanes, pairs = spans.lanes, spans.pairs
        number = np.full(len(lanes) + 1, -1, np.int64)  # of the rows at which chains begin; the last: none
        number[pairs.edges[begins]] = np.arange(len(made))
        bounds = np.zeros(len(lanes), bool)
        bounds[pairs.edges[spans.levels == L2]] = True
        latest = lanes.last(bounds)
        chain = number[latest]
        open_ = np.full(len(spans.tids), -1, np.int64)
        for i, thread in enumerate(self._open):
            open_[thread] = len(made) + i
        before = latest < 0
        chain[before] = open_[lanes.thread[before]]
        return chain

    def _split(self, spans: Spans, begins: NDArray[np.intp], made: NDArray[Any]) -> NDArray[Any]:
        """Return the chains that have ended; keep the others."""
        lanes, pairs = spans.lanes, spans.pairs
        edges = np.flatnonzero(spans.levels == L2)
        thread = lanes.thread[pairs.edges]
        ends = np.zeros(len(made), np.int8)  # 1: L2 goes on; 2: it exits again, so that something is missing
        following = np.searchsorted(edges, begins) + 1
        there = following < len(edges)
        after = edges[np.minimum(following, len(edges) - 1)] if len(edges) else following
        there[there] = thread[after[there]] == thread[begins[there]]
        ends[: len(begins)][there] = np.where(pairs.is_exit[after[there]], 2, 1)
        for i, number in enumerate(self._open, len(begins)):
            mine = edges[thread[edges] == number]
            if len(mine):
                ends[i] = 2 if pairs.is_exit[mine[0]] else 1
        made["complete"] = ends == 1
        self._open = {int(row["thread"]): made[i : i + 1].copy() for i, row in enumerate(made) if not ends[i]}
        return _summed(made[ends != 0])


def _add_parts(spans: Spans, chain: NDArray[np.int64], made: NDArray[Any]) -> None:
    """Add the time of the piece's rows to their chains."""
    swept, moves = spans.swept, spans.moves
    sums = np.zeros(len(made) * N_PARTS, np.int64)
    rows = np.flatnonzero(chain >= 0)
    np.add.at(sums, chain[rows] * N_PARTS + swept.part[rows], swept.dur_ns[rows])
    mine = chain[moves.rows] >= 0
    groups = chain[moves.rows[mine]] * N_PARTS
    np.add.at(sums, groups + moves.target[mine], moves.ns[mine])
    np.subtract.at(sums, groups + Part.HANDLER, moves.ns[mine])
    parts = sums.reshape(-1, N_PARTS)
    for name, of in _PARTS.items():
        made[name] += parts[:, list(of)].sum(axis=1)


def _add_events(spans: Spans, chain: NDArray[np.int64], made: NDArray[Any]) -> None:
    """Note which exits were passed on, and how many exits L1 took."""
    lanes, pairs = spans.lanes, spans.pairs
    reflected = chain[lanes.step == Step.REFLECT]
    made["reflected"][reflected[reflected >= 0]] = True
    own = pairs.edges[pairs.is_exit & (spans.levels == L1)]
    taken = chain[own]
    np.add.at(made["l1_exits"], taken[taken >= 0], 1)


def _summed(chains: NDArray[Any]) -> NDArray[Any]:
    chains["dur_ns"] = sum(chains[name] for name in _PARTS)
    return chains


def collect_chains(tables: Iterable[EventTable]) -> tuple[NDArray[Any], LaneKeys]:
    """Return every chain of a recording by time, and what their numbers of reasons and RIPs stand for.

    Parameters
    ----------
    tables : consecutive event tables
    """
    builder, chains = SpanBuilder(), NestedChains()
    found = [chains.feed(spans).ended for spans in iter_spans(tables, builder)]
    made = np.concatenate([*found, chains.finish()])
    return made[np.argsort(made["ts_ns"], kind="stable")], builder.keys
