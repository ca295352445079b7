"""What every vCPU thread did, and what followed each of its VM-exits, kept so that any moment can be looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.spans.keys import grown
from kvmtrace.spans.lanes import REASON_BITS, Step
from kvmtrace.spans.slices import joined_slices
from kvmtrace.spans.thread_store import ThreadStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.spans.slices import JoinedSlices
    from kvmtrace.spans.span_builder import Spans

MAX_NS = 1 << 60  # garbage time stamps stay below it
# fmt: off
SEGMENT_DTYPE = np.dtype([
    ("ts_ns", np.int64),  # since the origin
    ("dur_ns", np.int64),
    ("rip", np.int32),  # number of LaneKeys.rips where a VM-exit begins, else -1
    ("reason", np.int32),  # number of LaneKeys.reasons of the VM-exit that is handled, else -1
    ("cpu", np.int16),  # host CPU where it began
    ("part", np.uint8),  # Part
    ("level", np.uint8),  # of the guest that runs or was left last (levels.py); 0: not told, or no nested guests
])
FOLLOW_UP_DTYPE = np.dtype([
    ("ts_ns", np.int64),  # since the origin
    ("key", np.int32),  # the lane's argument: a number of the LaneKeys that go with the step
    ("step", np.uint8),  # Step
])
# fmt: on
FOLLOW_UPS = (
    Step.PIO,
    Step.MMIO_READ,
    Step.MMIO_WRITE,
    Step.MSR,
    Step.CR,
    Step.HYPERCALL,
    Step.PAGE_FAULT,
    Step.GUEST_FAULT,
    Step.REGISTER,
    Step.CALL,
    Step.INJECT,
    Step.EMULATE,
)  # fmt: skip
_FOLLOWS = np.zeros(256, bool)
_FOLLOWS[list(FOLLOW_UPS)] = True


@dataclass(frozen=True)
class Doings:
    """A piece of what the threads did: rows of SEGMENT_DTYPE and FOLLOW_UP_DTYPE with the numbers of their threads."""

    thread: NDArray[np.uint16]
    segments: NDArray[Any]
    event_thread: NDArray[np.uint16]
    events: NDArray[Any]


class DoingsCollector:
    """Makes segments and follow-up events of consecutive pieces of spans, and keeps them.

    Parameters
    ----------
    origin_ns : time that counts as 0
    """

    def __init__(self, origin_ns: int) -> None:
        self.segments = ThreadStore(SEGMENT_DTYPE)
        self.events = ThreadStore(FOLLOW_UP_DTYPE)
        self._origin_ns = origin_ns
        self._reached = np.zeros(16, np.int64)  # of each thread, so that its times ascend

    def feed(self, spans: Spans) -> Doings:
        """Take in a piece, and return what it adds."""
        made = joined_slices(spans.lanes, spans.swept.dur_ns, spans.swept.part, spans.told_later)
        thread = spans.lanes.thread[made.first]
        segments = self._segments(spans, made, thread)
        rows = np.flatnonzero(_FOLLOWS[spans.lanes.step] & ~spans.told_later)
        events = np.zeros(len(rows), FOLLOW_UP_DTYPE)
        events["ts_ns"] = self._since(spans.lanes.ts_ns[rows])
        events["key"], events["step"] = spans.lanes.arg[rows], spans.lanes.step[rows]
        event_thread = spans.lanes.thread[rows]
        _ascend(event_thread, events["ts_ns"])
        self.segments.add(thread, segments, segments["rip"] >= 0)
        self.events.add(event_thread, events, np.ones(len(events), bool))
        return Doings(thread, segments, event_thread, events)

    def _segments(self, spans: Spans, made: JoinedSlices, thread: NDArray[np.uint16]) -> NDArray[Any]:
        lanes = spans.lanes
        edge = spans.pairs.owner[made.first]
        owner = np.where(edge < 0, -1, np.searchsorted(spans.pairs.edges, edge))  # which of the edges
        is_exit = (lanes.step[made.first] == Step.EXIT) & ~spans.told_later[made.first]
        segments = np.zeros(len(made.first), SEGMENT_DTYPE)
        segments["dur_ns"] = np.clip(made.dur_ns, 0, MAX_NS)
        segments["rip"] = np.where(is_exit, lanes.arg[made.first] >> REASON_BITS, -1)
        segments["reason"], segments["cpu"], segments["part"] = made.reason, lanes.cpu[made.first], made.part
        if spans.nested:
            segments["level"] = np.append(spans.levels, 0)[owner]
        begin = self._since(lanes.ts_ns[made.first])
        if len(begin):
            self._reached = grown(self._reached, int(thread.max()) + 1)
            firsts = np.flatnonzero(np.append(True, thread[1:] != thread[:-1]))
            begin[firsts] = np.maximum(begin[firsts], self._reached[thread[firsts]])
            _ascend(thread, begin)
            lasts = np.append(firsts[1:], len(thread)) - 1
            self._reached[thread[lasts]] = np.minimum(begin[lasts] + segments["dur_ns"][lasts], MAX_NS)
        segments["ts_ns"] = begin
        return segments

    def _since(self, ts_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return times since the origin; none is negative, or longer than MAX_NS."""
        latest = min(self._origin_ns + MAX_NS, (1 << 63) - 1)
        since: NDArray[np.int64] = np.clip(ts_ns, self._origin_ns, latest) - self._origin_ns
        return since


def _ascend(thread: NDArray[np.uint16], ts_ns: NDArray[np.int64]) -> None:
    """Raise the times that step back within a thread to the latest before them."""
    back = (ts_ns[1:] < ts_ns[:-1]) & (thread[1:] == thread[:-1])
    for number in np.unique(thread[1:][back]).tolist():
        own = thread == number
        ts_ns[own] = np.maximum.accumulate(ts_ns[own])
