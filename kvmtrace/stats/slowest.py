"""The VM-exits that took the longest, waiting and being preempted left out; each with its number in its thread."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace._native.edges import slow_exits
from kvmtrace.isa.registry import describe_exit_reason, isa_name
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.spans.keys import grown
from kvmtrace.spans.lane_keys import PAGE_SHIFT, LaneKeys, rip_or_none, split_pair
from kvmtrace.spans.lanes import REASON_BITS, REASON_MASK, Step
from kvmtrace.spans.time_parts import Part
from kvmtrace.stats.rows import SlowExit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from kvmtrace.spans.lanes import Lanes
    from kvmtrace.spans.span_builder import Spans
    from kvmtrace.spans.time_parts import Recorded, Sweep

_NOT_WORK = (Part.BLOCKED, Part.HALT_POLL, Part.PREEMPTED)


@dataclass(frozen=True)
class _Candidate:
    """A VM-exit as the lanes have it; `access` is (step, argument) of its first access, None if it made none."""

    work_ns: int
    preempted_ns: int
    ts_ns: int
    dur_ns: int
    thread: int
    number: int
    arg: int
    access: tuple[int, int] | None


class SlowestAccumulator:
    """Keeps the slowest VM-exits of consecutive pieces of lanes.

    Parameters
    ----------
    limit : how many to keep
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[_Candidate] = []
        self._counted = np.zeros(16, np.int64)  # VM-exits of each thread so far

    def feed(self, spans: Spans, handling: NDArray[np.bool_] | None = None) -> None:
        """Take in the next piece; `handling`: of its pairs those that are VM-exits to be told, if not all."""
        lanes, pairs, swept = spans.lanes, spans.pairs, spans.swept
        if handling is not None:
            pairs = replace(pairs, handling=handling)
        edges = pairs.edges
        self._counted = grown(self._counted, int(lanes.thread.max(initial=0)) + 1)
        moved_ns = _moved(spans) if len(spans.moves.rows) else None
        least = self._kept[-1].work_ns if self._limit and len(self._kept) == self._limit else -1
        columns = lanes.thread, swept.part, swept.dur_ns
        found, work_ns, number = slow_exits(
            pairs, columns, waiting=_NOT_WORK, moved_ns=moved_ns, least=least, counted=self._counted
        )
        wanted = np.arange(len(found) if self._limit else 0)
        if len(wanted) > self._limit:
            rows = edges[found]
            wanted = np.lexsort((lanes.thread[rows], lanes.ts_ns[rows], -work_ns))[: self._limit]
        self._kept += [
            _Candidate(
                work_ns=int(work_ns[i]),
                preempted_ns=_preempted(swept, int(edges[found[i]]), int(edges[found[i] + 1])),
                ts_ns=int(lanes.ts_ns[edges[found[i]]]),
                dur_ns=int(pairs.dur_ns[found[i]]),
                thread=int(lanes.thread[edges[found[i]]]),
                number=int(number[i]),
                arg=int(lanes.arg[edges[found[i]]]),
                access=_first_access(lanes, int(edges[found[i]]), int(edges[found[i] + 1])),
            )
            for i in wanted.tolist()
        ]
        self._kept.sort(key=lambda one: (-one.work_ns, one.ts_ns, one.thread))
        del self._kept[self._limit :]

    def finish(
        self, keys: LaneKeys, tids: Sequence[int], before: Mapping[int, int], recorded: Recorded
    ) -> tuple[SlowExit, ...]:
        """Return the rows, slowest first.

        Parameters
        ----------
        tids : thread's number -> tid
        before : tid -> its VM-exits before what was fed, for a selection that begins later
        recorded : what the capture describes
        """
        return tuple(_row(one, keys, tids, before, recorded) for one in self._kept)


def _moved(spans: Spans) -> NDArray[np.int64]:
    """Return how much handler time behind each edge was waiting, as kvm_vcpu_wakeup says."""
    moves, edges = spans.moves, spans.pairs.edges
    moved = np.zeros(len(edges), np.int64)
    at = np.searchsorted(edges, moves.rows, "right") - 1
    np.add.at(moved, at[at >= 0], moves.ns[at >= 0])
    return moved


def _preempted(swept: Sweep, begin: int, end: int) -> int:
    """Return how long a thread was preempted between two rows of its lane, ns."""
    return int(swept.dur_ns[begin:end][swept.part[begin:end] == Part.PREEMPTED].sum())


def _first_access(lanes: Lanes, begin: int, end: int) -> tuple[int, int] | None:
    steps = lanes.step[begin + 1 : end]
    found = np.flatnonzero((steps >= Step.PIO) & (steps <= Step.PAGE_FAULT))
    if not len(found):
        found = np.flatnonzero(np.isin(steps, (Step.GUEST_FAULT, Step.REGISTER, Step.CALL)))
    if not len(found):
        return None
    at = begin + 1 + int(found[0])
    return int(lanes.step[at]), int(lanes.arg[at])


def _row(
    one: _Candidate, keys: LaneKeys, tids: Sequence[int], before: Mapping[int, int], recorded: Recorded
) -> SlowExit:
    tid = tids[one.thread]
    isa, exit_reason = split_pair(keys.reasons.keys()[one.arg & REASON_MASK])
    kind, key, write = _access(one.access, keys)
    return SlowExit(
        number=one.number + before.get(tid, 0),
        tid=tid,
        vcpu_id=None,
        ts_ns=one.ts_ns,
        isa=isa_name(isa),
        exit_reason=exit_reason,
        name=describe_exit_reason(isa, exit_reason),
        dur_ns=one.dur_ns,
        waiting_ns=one.dur_ns - one.work_ns - one.preempted_ns if recorded.tells("waiting_ns") else None,
        preempted_ns=one.preempted_ns if recorded.tells("preempted_ns") else None,
        guest_rip=rip_or_none(keys.rips.keys()[one.arg >> REASON_BITS]),
        access=kind,
        access_key=key,
        access_write=write,
    )


def _access(access: tuple[int, int] | None, keys: LaneKeys) -> tuple[str | None, int | None, bool | None]:
    """Return (what was accessed, its number, whether it was written)."""
    if access is None:
        return None, None, None
    step, number = Step(access[0]), access[1]
    if step in {Step.MMIO_READ, Step.MMIO_WRITE}:
        key = keys.mmio.keys()[number]
        return "mmio", key >> 1, bool(key & 1)
    if step in {Step.PAGE_FAULT, Step.GUEST_FAULT}:
        return "page", keys.pages.keys()[number] << PAGE_SHIFT, None
    if step == Step.HYPERCALL:
        return "hypercall", keys.hypercalls.keys()[number], None
    if step == Step.CALL:
        return "smccc", keys.calls.keys()[number], None
    kind, index = {
        Step.PIO: ("port", keys.ports),
        Step.MSR: ("msr", keys.msrs),
        Step.CR: ("cr", keys.crs),
        Step.REGISTER: ("sysreg", keys.registers),
    }[step]
    write, key = split_pair(index.keys()[number])
    return kind, key, bool(write)
