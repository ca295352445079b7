"""What each vCPU thread was doing, as consecutive segments: the timeline behind the budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.isa.registry import describe_exit_reason
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.spans.lane_keys import NOT_TOLD, split_pair
from kvmtrace.spans.lanes import REASON_BITS, Step
from kvmtrace.spans.span_builder import SpanBuilder, iter_spans
from kvmtrace.spans.time_parts import Part

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from kvmtrace.spans.lane_keys import LaneKeys
    from kvmtrace.spans.lanes import Lanes
    from kvmtrace.table.event_table import EventTable

PART_NAMES = {
    Part.GUEST: "guest",
    Part.ENTRY_EXIT: "switch",
    Part.HANDLER: "kernel",
    Part.USERSPACE: "VMM",
    Part.BLOCKED: "blocked",
    Part.HALT_POLL: "poll",
    Part.PREEMPTED: "preempted",
    Part.UNKNOWN: "unknown",
}


@dataclass(frozen=True)
class Segments:
    """Segments of all vCPU threads, per thread in time order.

    Attributes
    ----------
    tids : thread number -> tid
    reasons : reason number -> name as the kernel prints it
    thread : (n,) uint16, index into tids
    ts_ns, dur_ns : (n,) int64
    part : (n,) uint8, Part (halt-polling is within the kernel's part here)
    reason : (n,) int32, the VM-exit being handled, index into reasons; -1 in guest mode and before the first
    cpu : (n,) int16, host CPU where the segment began
    guest_rip : (n,) uint64, of the kvm_exit that began the segment, else 0
    """

    tids: tuple[int, ...]
    reasons: tuple[str, ...]
    thread: NDArray[np.uint16]
    ts_ns: NDArray[np.int64]
    dur_ns: NDArray[np.int64]
    part: NDArray[np.uint8]
    reason: NDArray[np.int32]
    cpu: NDArray[np.int16]
    guest_rip: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.ts_ns)

    def of(self, thread: int) -> slice:
        """Return where the segments of a thread are."""
        first, stop = np.searchsorted(self.thread, (thread, thread + 1)).tolist()
        return slice(first, stop)


# of the columns of Segments, `rip` as a number of LaneKeys.rips
_DTYPES = (np.uint16, np.int64, np.int64, np.uint8, np.int32, np.int16, np.int64)


@dataclass(frozen=True)
class JoinedSlices:
    """Stretches of a piece of lanes in which a thread did the same.

    Attributes
    ----------
    first : (n,) lane row at which each begins
    dur_ns : (n,) int64
    part : (n,) uint8, Part
    reason : (n,) int32, number of the reason of the VM-exit that was being handled; -1 for none
    """

    first: NDArray[np.intp]
    dur_ns: NDArray[np.int64]
    part: NDArray[np.uint8]
    reason: NDArray[np.int32]


def joined_slices(
    lanes: Lanes, dur_ns: NDArray[np.int64], part: NDArray[np.uint8], told_later: NDArray[np.bool_] | None = None
) -> JoinedSlices:
    """Join consecutive stretches of the same doing; a VM-exit and a VM-entry always begin a new one.

    Parameters
    ----------
    told_later : (n,) bool, Spans.told_later; if given, a VM-exit begins a stretch also where it takes no time
    """
    edge = lanes.last((lanes.step == Step.EXIT) | (lanes.step == Step.ENTRY))
    handled = (edge >= 0) & (lanes.step[edge] == Step.EXIT)
    reason = np.where(handled, lanes.reasons(edge), -1).astype(np.int32)
    reason[part == Part.GUEST] = -1
    begins = np.ones(len(lanes), bool)
    begins[1:] = ~lanes.same_thread() | (part[1:] != part[:-1]) | (reason[1:] != reason[:-1])
    begins |= (lanes.step == Step.EXIT) | (lanes.step == Step.ENTRY)
    first = np.flatnonzero(begins)
    total = np.add.reduceat(dur_ns, first)
    keep = total > 0
    if told_later is not None:
        keep |= (lanes.step[first] == Step.EXIT) & ~told_later[first]
    first = first[keep]
    return JoinedSlices(first, total[keep], part[first], reason[first])


def _of_lanes(lanes: Lanes, dur_ns: NDArray[np.int64], part: NDArray[np.uint8]) -> tuple[NDArray[Any], ...]:
    """Return the columns of Segments of a piece."""
    made = joined_slices(lanes, dur_ns, part)
    first = made.first
    rip = np.where(lanes.step[first] == Step.EXIT, lanes.arg[first] >> REASON_BITS, -1)
    return lanes.thread[first], lanes.ts_ns[first], made.dur_ns, made.part, made.reason, lanes.cpu[first], rip


class SegmentCollector:
    """Collects the segments of consecutive pieces of lanes."""

    def __init__(self) -> None:
        self._pieces: list[tuple[NDArray[Any], ...]] = []

    def feed(self, lanes: Lanes, dur_ns: NDArray[np.int64], part: NDArray[np.uint8]) -> None:
        """Take in a piece, with how long each stretch is and what it is (Sweep)."""
        if len(lanes):
            self._pieces.append(_of_lanes(lanes, dur_ns, part))

    def finish(self, keys: LaneKeys, tids: Iterable[int]) -> Segments:
        """Return all segments; `keys` and `tids` are those of the lanes."""
        names = tuple(describe_exit_reason(*split_pair(key)) for key in keys.reasons.keys())  # noqa: SIM118
        columns = [
            np.concatenate([piece[i] for piece in self._pieces]) if self._pieces else np.empty(0, dtype)
            for i, dtype in enumerate(_DTYPES)
        ]
        order = np.argsort(columns[0], kind="stable")  # pieces are in time order: so is each thread
        thread, ts_ns, dur_ns, part, reason, cpu, number = (column[order] for column in columns)
        rip_of = np.array([*keys.rips.keys(), 0], np.uint64)  # -1: the zero at the end
        rip_of[rip_of == NOT_TOLD] = 0
        return Segments(tuple(tids), names, thread, ts_ns, dur_ns, part, reason, cpu, rip_of[number])


def collect_segments(tables: Iterable[EventTable]) -> Segments:
    """Return the segments of a recording.

    Parameters
    ----------
    tables : consecutive event tables
    """
    builder, collector = SpanBuilder(), SegmentCollector()
    for spans in iter_spans(tables, builder):
        collector.feed(spans.lanes, spans.swept.dur_ns, spans.swept.part)
    return collector.finish(builder.keys, builder.tids)
