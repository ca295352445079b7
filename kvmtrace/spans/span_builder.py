"""The spans of a recording: lanes, paired VM-exits, and where the time went, made once for everyone who needs them.

Report, comparison, frames, tables and Perfetto traces all take the same pieces, so that they cannot disagree.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.isa.registry import codes
from kvmtrace.kvm.nested_events import L2
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.spans.lane_builder import LaneBuilder
from kvmtrace.spans.lane_keys import split_pair
from kvmtrace.spans.lanes import Step
from kvmtrace.spans.levels import LevelTracker
from kvmtrace.spans.pairs import find_pairs
from kvmtrace.spans.time_parts import USERSPACE_EVENTS, Clock, Part, Recorded, halt_polls, sweep
from kvmtrace.table.event_table import EventTable
from kvmtrace.table.parking import materialise

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from kvmtrace.spans.lane_keys import LaneKeys
    from kvmtrace.spans.lanes import Lanes
    from kvmtrace.spans.pairs import Pairs
    from kvmtrace.spans.time_parts import Moves, Sweep

_NO_ROWS = np.empty(0, np.int64)


@dataclass(frozen=True)
class Spans:
    """A piece of the lanes with all that is made of it.

    Attributes
    ----------
    lanes : Lanes
    pairs : Pairs, the VM-entries and VM-exits of each thread
    swept : Sweep, what the thread did from each row to its next, and how long
    moves : Moves, time that was halt-polling or sleep
    levels : level of guest of each of the pairs' edges (levels.py); shape (e,)
    nested : bool, nested events were seen so far
    levels_told : bool, every VM-exit tells its level: kvm_nested_vmexit was recorded
    recorded : Recorded, what the capture describes so far
    keys : LaneKeys, what the arguments of the lanes stand for
    tids : thread number -> tid
    table, index : an event table with the rows of the lanes, and the row in the recording of each of its rows,
        ascending; only where rows were asked for
    final : bool, nothing follows
    """

    lanes: Lanes
    pairs: Pairs
    swept: Sweep
    moves: Moves
    levels: NDArray[np.uint8]
    nested: bool
    levels_told: bool
    recorded: Recorded
    keys: LaneKeys
    tids: list[int]
    table: EventTable | None = None
    index: NDArray[np.int64] | None = None
    final: bool = False

    @cached_property
    def in_l2(self) -> NDArray[np.bool_]:
        """Say of each lane row whether its thread's latest VM-entry or VM-exit is of a guest's guest; shape (n,)."""
        own = np.zeros(len(self.lanes) + 1, bool)  # the last place stands for no such edge
        own[self.pairs.edges] = self.levels == L2
        found: NDArray[np.bool_] = own[self.pairs.owner]
        return found

    @cached_property
    def told_later(self) -> NDArray[np.bool_]:
        """Say of each lane row whether it also begins the next piece, where more is known of it; shape (n,)."""
        later = np.zeros(len(self.lanes), bool)
        if not self.final:
            later[np.append(self.lanes.starts()[1:], len(self.lanes)) - 1] = True
        return later

    def table_rows(self, lane_rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """Return the rows in `table` of these lane rows."""
        assert self.index is not None
        assert self.lanes.row is not None
        return np.searchsorted(self.index, self.lanes.row[lane_rows])


class SpanBuilder:
    """Turns consecutive event tables into consecutive pieces of spans.

    Parameters
    ----------
    rows : bool, the spans know the rows of the events, and hold the events themselves
    every_step : bool, see LaneBuilder
    """

    def __init__(self, *, rows: bool = False, every_step: bool = False) -> None:
        self._lanes = LaneBuilder(rows=rows, every_step=every_step)
        self._clock = Clock()
        self._levels = LevelTracker()
        self._rows = rows
        self._wakeups = self._userspace = False
        self._n_seen = 0
        self._parked: EventTable | None = None  # the events of the lanes that are held back
        self._parked_index = _NO_ROWS
        self._table: EventTable | None = None
        self._index = _NO_ROWS

    @property
    def keys(self) -> LaneKeys:
        """What the arguments of the lanes stand for."""
        return self._lanes.keys

    @property
    def tids(self) -> list[int]:
        """Thread number -> tid."""
        return self._lanes.threads.tids

    @property
    def recorded(self) -> Recorded:
        """What the capture describes."""
        return Recorded(self._lanes.scheduling, self._wakeups, self._userspace)

    def feed_lanes(self, table: EventTable) -> Lanes:
        """Take in a table; return the lanes that it completes, for those who want nothing more."""
        self._wakeups |= table.has("kvm_vcpu_wakeup")
        self._userspace |= any(map(table.has, USERSPACE_EVENTS))
        self._levels.look_at(table)
        lanes = self._lanes.feed(table)
        if self._rows:
            self._keep_events(table)
        return lanes

    def finish_lanes(self) -> Lanes:
        """Return the lanes that were held back."""
        if self._rows:
            self._table, self._index = self._parked, self._parked_index
        return self._lanes.finish()

    def feed(self, table: EventTable) -> Spans | None:
        """Take in a table; return the spans that it completes, None for none."""
        return self.spans(self.feed_lanes(table))

    def finish(self) -> Spans | None:
        """Return what was held back."""
        return self.spans(self.finish_lanes(), final=True)

    def spans(self, lanes: Lanes, *, final: bool = False) -> Spans | None:
        """Return the spans of the latest lanes, None for no lanes; `final`: nothing follows."""
        if not len(lanes):
            return None
        swept = sweep(lanes, self._clock.durations(lanes))
        pairs = find_pairs(lanes, swept.owner)
        _unattributable_halts(lanes, pairs, swept, self.keys, self.recorded)
        moves = halt_polls(lanes, swept, self.recorded)
        index = self._index if self._rows else None
        levels = self._levels.feed(lanes, pairs)
        nested = self._levels.nested
        told = self._levels.described
        return Spans(
            lanes, pairs, swept, moves, levels, nested, told, self.recorded, self.keys, self.tids, self._table, index,
            final,
        )  # fmt: skip

    def _keep_events(self, table: EventTable) -> None:
        """Put the events that waited before a table; then keep those whose lanes wait for the next one."""
        index = np.arange(self._n_seen, self._n_seen + len(table))
        self._n_seen += len(table)
        if self._parked is not None and len(self._parked):
            table = EventTable.concat([self._parked, table], shared=True)
            index = np.concatenate([self._parked_index, index])
        self._table, self._index = table, index
        waiting = self._lanes.held.row
        assert waiting is not None
        rows = np.searchsorted(index, np.unique(waiting))
        self._parked, self._parked_index = materialise(table, rows), index[rows]


def iter_spans(tables: Iterable[EventTable], builder: SpanBuilder) -> Iterator[Spans]:
    """Yield the spans of consecutive tables."""
    for table in tables:
        if (spans := builder.feed(table)) is not None:
            yield spans
    if (spans := builder.finish()) is not None:
        yield spans


def _unattributable_halts(lanes: Lanes, pairs: Pairs, swept: Sweep, keys: LaneKeys, recorded: Recorded) -> None:
    """Call HLT exits' kernel time unknown where neither scheduling nor wake-ups were recorded.

    Without them nobody can tell whether the vCPU slept, polled, or worked.
    """
    if recorded.scheduling or recorded.wakeups:
        return
    waits = {(isa, code) for isa, found in codes("halt") for code in found}
    halts = np.array([*(split_pair(key) in waits for key in keys.reasons.keys()), False])  # noqa: SIM118
    if not halts.any():
        return
    edge = pairs.owner
    in_exit = (edge >= 0) & (lanes.step[edge] == Step.EXIT)
    in_halt = in_exit & halts[np.where(in_exit, lanes.reasons(edge), -1)]
    swept.part[in_halt & (swept.part == Part.HANDLER)] = Part.UNKNOWN
