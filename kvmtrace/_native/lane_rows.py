"""Lanes: the steps of vCPU threads, and what a thread does from each to its next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native._loops import ffi, lib
from kvmtrace._native.arrays import filled, given
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_NUMBERS = (np.dtype(np.int32), np.dtype(np.int64))


@dataclass(frozen=True)
class LaneSource:
    """Rows of a table.

    Parameters
    ----------
    step : uint8, below 32; 0 for rows that are no step
    arg : int64, of each step
    loss : int32
    switches : int32, the thread that each row of kind `switch_kind` switches in; empty if that is not known
    first_row : of the recording
    """

    tid: NDArray[np.int32]
    kind: NDArray[np.uint16]
    step: NDArray[np.uint8]
    ts_ns: NDArray[np.int64]
    arg: NDArray[np.int64]
    cpu: NDArray[np.int16]
    loss: NDArray[np.int32]
    switches: NDArray[np.int32]
    switch_kind: int
    first_row: int

    def as_c(self) -> tuple[Any, list[Any]]:
        """Return them as C's `LaneSource`, and what must outlive it."""
        out = ffi.new("LaneSource *")
        kept = [np.ascontiguousarray(c) for c in (self.tid, self.kind, self.step, self.ts_ns, self.arg, self.cpu)]
        kept += [np.ascontiguousarray(self.loss), np.ascontiguousarray(self.switches)]
        out.n_rows, out.n_switches = len(self.step), len(self.switches)
        out.tid, out.kind, out.step, out.ts, out.arg, out.cpu, out.loss = map(given, kept[:7])
        out.switches = given(kept[7]) if len(self.switches) else ffi.NULL
        out.switch_kind, out.first_row = self.switch_kind, self.first_row
        return out, kept


@dataclass(frozen=True)
class LaneRows:
    """Rows of lanes, in the order of their table; row: empty where it was not wanted."""

    thread: NDArray[np.uint16]
    step: NDArray[np.uint8]
    ts_ns: NDArray[np.int64]
    arg: NDArray[np.int64]
    cpu: NDArray[np.int16]
    loss: NDArray[np.int32]
    row: NDArray[np.int64]


def _numbers(number: NDArray[np.int32], marks: Sequence[int]) -> Any:
    out = ffi.new("ThreadNumbers *")
    out.number, out.n_numbers, out.marks = given(number), len(number), sum(1 << mark for mark in marks)
    return out


def count_lane_rows(source: LaneSource, number: NDArray[np.int32], marks: Sequence[int]) -> tuple[int, int]:
    """Return how many rows of lanes a table gives, and how many marked rows are of threads without a number.

    Parameters
    ----------
    number : int32, by thread id, from 1; 0: none
    marks : steps that only vCPU threads make
    """
    (rows, _kept), n_new = source.as_c(), np.zeros(1, np.int64)
    n: int = lib.count_lane_rows(rows, _numbers(number, marks), filled(n_new))
    return n, int(n_new[0])


def fill_lane_rows(source: LaneSource, number: NDArray[np.int32], n: int, resume: int, *, rows: bool) -> LaneRows:
    """Return the n rows of lanes of a table.

    Parameters
    ----------
    resume : the step of a thread that is switched in
    rows : bool, their rows in the recording are wanted
    """
    made = LaneRows(
        np.empty(n, np.uint16),
        np.empty(n, np.uint8),
        np.empty(n, np.int64),
        np.empty(n, np.int64),
        np.empty(n, np.int16),
        np.empty(n, np.int32),
        np.empty(n if rows else 0, np.int64),
    )
    out = ffi.new("LaneColumns *")
    out.n_rows, out.thread, out.step, out.ts = n, filled(made.thread), filled(made.step), filled(made.ts_ns)
    out.arg, out.cpu, out.loss = filled(made.arg), filled(made.cpu), filled(made.loss)
    out.row = filled(made.row) if rows else ffi.NULL
    given_rows, _kept = source.as_c()
    if lib.fill_lane_rows(given_rows, _numbers(number, ()), resume, out) != n:
        raise ValueError("other rows than were counted")
    return made


def step_durations(
    thread: NDArray[np.uint16], ts_ns: NDArray[np.int64], latest: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the time from each row to the next of its thread; 0 for a thread's last row.

    Parameters
    ----------
    thread : of rows that stand thread by thread
    latest : of each thread, the latest time so far; is updated. Where time steps back it stands still.
    """
    if len(thread) and int(thread.max()) >= len(latest):
        raise ValueError("a thread without a clock")
    dur_ns = np.empty(len(thread), np.int64)
    thread, ts_ns = np.ascontiguousarray(thread), np.ascontiguousarray(ts_ns)
    lib.step_durations(given(thread), given(ts_ns), len(thread), filled(latest), filled(dur_ns))
    return dur_ns


def lane_steps(after: NDArray[np.uint8], names: Mapping[str, int]) -> Any:
    """Return C's `LaneSteps`: what a thread does after each of 32 steps, and what steps and parts are called."""
    out = ffi.new("LaneSteps *", dict(names))
    out.after = after.tolist()
    return out


def sweep_lanes(
    thread: NDArray[np.uint16], step: NDArray[np.uint8], suspect: NDArray[np.bool_], steps: Any
) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    """Return what each row's thread does until its next row, and its latest entry or exit up to it (-1: none).

    Parameters
    ----------
    thread, step, suspect : of rows that stand thread by thread
    steps : of lane_steps()
    """
    part, owner = np.empty(len(thread), np.uint8), np.empty(len(thread), np.int32)
    kept = [np.ascontiguousarray(column) for column in (thread, step, suspect)]
    view = ffi.new("LaneView *")
    view.n_rows, view.thread, view.step, view.suspect = len(thread), *map(given, kept)
    lib.sweep_lanes(view, steps, filled(part), filled(owner))
    return part, owner


def sum_by_number(numbers: NDArray[Any], weights: NDArray[Any] | None, sums: NDArray[np.int64], limit: int) -> None:
    """Add weights (1 each by default) to the sums of their numbers; no sum leaves [-limit, limit].

    Raises
    ------
    ValueError
        A number is none of the sums'.
    """
    if numbers.dtype not in _NUMBERS:
        numbers = numbers.astype(np.int64)
    numbers = np.ascontiguousarray(numbers)
    added = None if weights is None else np.ascontiguousarray(weights, np.int64)
    there = ffi.NULL if added is None else given(added)
    wide = numbers.itemsize == 8
    if lib.sum_by_number(given(numbers), wide, there, len(numbers), len(sums), limit, filled(sums)):
        raise ValueError(f"a number that is none of {len(sums)}")


def sum_parts(
    part: NDArray[np.uint8],
    dur_ns: NDArray[np.int64],
    group: NDArray[np.int32],
    sums: NDArray[np.int64],
    *,
    limit: int,
    owner: NDArray[np.int32] | None = None,
) -> None:
    """Add the times of rows to the sums of their part and group.

    Parameters
    ----------
    group : int32, of each row; -1 for none
    sums : int64, shape (n_groups, n_parts); no sum leaves [-limit, limit]
    owner : of each row, the row whose group counts, -1 for none; None: its own

    Raises
    ------
    ValueError
        A part, group or owner is none of those.
    """
    totals = ffi.new("PartTotals *")
    totals.n_groups, totals.n_parts = sums.shape
    totals.limit, totals.sums = limit, filled(sums)
    there = ffi.NULL if owner is None else given(owner)
    if lib.sum_parts(given(part), given(dur_ns), len(part), there, given(group), totals):
        raise ValueError("a part, group or owner that is none of those")
