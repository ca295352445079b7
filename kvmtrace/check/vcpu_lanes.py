"""Which vCPU a thread runs: a vCPU is not a thread, so what is known is kept per vCPU.

Nearly every VMM gives each vCPU a thread of its own. Others run several vCPUs in one thread, in turn, or hand a vCPU
from thread to thread. A *lane* is one vCPU as one thread runs it: the KVM_RUNs of the vCPU, each with what the thread
did behind it until the next one. Where a vCPU comes from another thread, knowledge breaks off.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS
from kvmtrace.model.vcpu_sources import RUN_BEGINS, RUN_ENDS, VCPU_IDENTITY
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from kvmtrace.check.thread_events import Sequence
    from kvmtrace.model.vcpu_sources import Identity

    Positions = NDArray[np.intp]
    Lanes = NDArray[np.int64]

_BEGIN = tuple(CLASS[step] for step in RUN_BEGINS)
_END = tuple(CLASS[step] for step in RUN_ENDS)
MAX_LANES = 65_534  # what Sequence.thread can number; vCPUs beyond share the last lane of their thread
_UNRESOLVED = -1


class VcpuLanes:
    """The lanes of a recording so far, fed with the sequences of consecutive tables.

    The sequences of threads that run one vCPU each pass as they are.
    """

    def __init__(self) -> None:
        self._source: Identity | None = None
        self._lane_of: dict[tuple[int, int], int] = {}  # (tid, vCPU) -> lane
        self._tid_of: list[int] = []  # of each lane
        self._first_lane: dict[int, int] = {}  # tid -> its first lane
        self._told: set[int] = set()  # tids of which a vCPU was told
        self._current: dict[int, int] = {}  # tid -> lane that it is in
        self._several: set[int] = set()  # tids with several lanes
        self._runner: dict[int, int] = {}  # vCPU -> tid that ran it last
        self._parked: Lanes = np.empty(0, np.int64)  # of the rows that wait for the next table
        self._taken_over = np.empty(0, bool)  # of these rows: a vCPU comes from another thread
        self._open: Positions = np.empty(0, np.intp)  # rows of KVM_RUNs that do not tell their vCPU yet

    def split(self, sequence: Sequence) -> Sequence:
        """Return the sequence with lanes for threads, and breaks where a vCPU comes from another thread."""
        positions, keys = self._evidence(sequence)
        begins = _begins(sequence, positions)
        before = dict(self._current)
        lanes, numbers = self._follow(sequence, positions, keys)
        taken_over = np.append(begins[numbers], self._waiting(sequence, self._taken_over)).astype(np.intp)
        self._taken_over = np.empty(0, bool)
        if len(taken_over):
            self._taken_over = np.zeros(len(sequence.table), bool)
            self._taken_over[sequence.row[taken_over]] = True
        if self._several:
            return self._in_lanes(sequence, begins, lanes, before, taken_over)
        if not len(taken_over):
            return sequence
        broken = sequence.broken.copy()
        broken[taken_over] = True
        return replace(sequence, broken=broken & ~sequence.first)

    def park(self, sequence: Sequence, waiting: NDArray[np.bool_] | slice) -> None:
        """Take note of the events that wait for the next table, of a sequence that `split` returned."""
        rows = sequence.row[waiting]
        order = np.argsort(rows, kind="stable")
        if len(self._taken_over):
            self._taken_over = self._taken_over[rows[order]]
        if self._several:
            lanes = sequence.thread[waiting].astype(np.int64)
            lanes[np.isin(rows, self._open)] = _UNRESOLVED
            self._parked = lanes[order]

    @staticmethod
    def _waiting(sequence: Sequence, marked: NDArray[np.bool_]) -> Positions:
        """Return the positions of the marked ones of the rows that waited."""
        waited = np.flatnonzero(sequence.row < len(marked))
        found: Positions = waited[marked[sequence.row[waited]]]
        return found

    def _evidence(self, sequence: Sequence) -> tuple[Positions, NDArray[Any]]:
        """Return (positions, what they tell of the vCPU) of the events that tell it, those that waited left out."""
        for source in VCPU_IDENTITY if self._source is None else (self._source,):
            if not sequence.table.has(source.kind, source.field):
                continue
            positions = np.flatnonzero(sequence.cls == CLASS[source.step])
            positions = positions[sequence.row[positions] >= sequence.n_parked]
            if len(positions):
                self._source = source
                return positions, sequence.values(source.kind, source.field, positions).astype(np.int64)
        return np.empty(0, np.intp), np.empty(0, np.int64)

    def _follow(self, sequence: Sequence, positions: Positions, keys: NDArray[Any]) -> tuple[Lanes, list[int]]:
        """Return (lane of each evidence, which of them take a vCPU over from another thread)."""
        thread = sequence.thread[positions]
        new = np.ones(len(positions), bool)
        new[1:] = (keys[1:] != keys[:-1]) | (thread[1:] != thread[:-1])
        at = np.flatnonzero(new)
        runs = list(zip(sequence.tids[thread[at]].tolist(), keys[at].tolist(), strict=True))
        lanes = np.array([self._lane(tid, key) for tid, key in runs], np.int64)
        for (tid, _), lane in zip(runs, lanes.tolist(), strict=True):
            if self._current.get(tid, lane) != lane:
                self._several.add(tid)
            self._current[tid] = lane
        return lanes[np.cumsum(new) - 1], self._take_overs(sequence, positions, keys, dict.fromkeys(runs))

    def _lane(self, tid: int, key: int) -> int:
        """Return the lane of a vCPU in a thread; the first one is that of the thread before it told."""
        lane = self._lane_of.get((tid, key))
        if lane is None:
            again = tid in self._told and len(self._tid_of) < MAX_LANES
            lane = self._add_lane(tid) if again else self._any_lane(tid)
            self._told.add(tid)
            self._lane_of[tid, key] = lane
        return lane

    def _any_lane(self, tid: int) -> int:
        """Return the first lane of a thread."""
        if tid not in self._first_lane:
            self._first_lane[tid] = self._add_lane(tid)
        return self._first_lane[tid]

    def _add_lane(self, tid: int) -> int:
        self._tid_of.append(tid)
        return len(self._tid_of) - 1

    def _take_overs(
        self, sequence: Sequence, positions: Positions, keys: NDArray[Any], runs: dict[tuple[int, int], None]
    ) -> list[int]:
        owners: dict[int, set[int]] = {}
        for tid, key in runs:
            owners.setdefault(key, {self._runner.get(key, tid)}).add(tid)
        shared = {key for key, tids in owners.items() if len(tids) > 1}
        for tid, key in runs:
            if key not in shared:
                self._runner[key] = tid
        if not shared:
            return []
        mine = np.flatnonzero(np.isin(keys, list(shared)))
        mine = mine[np.argsort(sequence.row[positions[mine]], kind="stable")]
        taken_over = []
        for i, key, tid in zip(
            mine.tolist(), keys[mine].tolist(), sequence.tids[sequence.thread[positions[mine]]].tolist(), strict=True
        ):
            if self._runner.setdefault(key, tid) != tid:
                taken_over.append(i)
            self._runner[key] = tid
        return taken_over

    def _in_lanes(
        self, sequence: Sequence, begins: Positions, lanes: Lanes, before: dict[int, int], taken_over: Positions
    ) -> Sequence:
        """Return the sequence sorted by lane."""
        tids = sequence.tids.tolist()
        at_begin = np.array([before.get(tid, self._any_lane(tid)) for tid in tids], np.int64)
        lane = at_begin[sequence.thread]
        number = np.searchsorted(begins, np.arange(len(sequence)), "right") - 1
        told = number >= 0
        told[told] = sequence.thread[begins[number[told]]] == sequence.thread[told]
        lane[told] = lanes[number[told]]
        if len(self._parked):
            waited = np.flatnonzero(sequence.row < sequence.n_parked)
            known = self._parked[sequence.row[waited]]
            lane[waited[known != _UNRESOLVED]] = known[known != _UNRESOLVED]
        self._open = sequence.row[_open_ends(sequence, begins)]
        order = np.argsort(lane, kind="stable")
        # what breaks off a thread, breaks off each of its lanes
        breaks = np.cumsum(sequence.broken)[order]
        broken = np.diff(breaks, prepend=breaks[:1]) != 0
        broken |= np.isin(order, taken_over)
        split = replace(sequence, broken=broken, tids=np.array(self._tid_of, np.int32), keys=self._keys())
        return split.in_lanes(order, lane[order])

    def _keys(self) -> NDArray[np.int64]:
        """Return what names each lane for all of the recording: the thread's id, or another number."""
        return np.array(
            [tid if self._first_lane[tid] == lane else (1 << 32) + lane for lane, tid in enumerate(self._tid_of)],
            np.int64,
        )


def _edges(sequence: Sequence) -> Positions:
    """Return the positions, ascending, behind which a KVM_RUN may begin: ends of KVM_RUNs, and of threads."""
    ends = among(sequence.cls, _END)
    ends[np.flatnonzero(sequence.first)[1:] - 1] = True
    return np.append(-1, np.flatnonzero(ends))


def _begins(sequence: Sequence, positions: Positions) -> Positions:
    """Return where the KVM_RUNs begin that these positions lie in."""
    if not len(positions):
        return positions
    edges, begins = _edges(sequence), np.append(np.flatnonzero(among(sequence.cls, _BEGIN)), len(sequence))
    last = edges[np.searchsorted(edges, positions) - 1]
    found: Positions = np.minimum(begins[np.searchsorted(begins, last + 1)], positions)
    return found


def _open_ends(sequence: Sequence, begins: Positions) -> Positions:
    """Return the positions of KVM_RUNs, at the threads' ends, that did not tell their vCPU."""
    edges = _edges(sequence)
    candidates = np.flatnonzero(among(sequence.cls, _BEGIN))
    stops = np.append(np.flatnonzero(sequence.first)[1:], len(sequence)).tolist()
    found: list[Positions] = []
    for stop in stops:
        last = int(edges[np.searchsorted(edges, stop - 1) - 1]) if sequence.cls[stop - 1] not in _END else stop - 1
        at = int(np.searchsorted(candidates, last + 1))
        start = int(candidates[at]) if at < len(candidates) else stop
        if start < stop and not len(begins[(begins >= start) & (begins < stop)]):
            found.append(np.arange(start, stop))
    return np.concatenate(found) if found else np.empty(0, np.intp)
