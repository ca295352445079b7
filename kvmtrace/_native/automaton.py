"""The model's states over sequences of events: steps, segments, counts of edges."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace._native._loops import lib
from kvmtrace._native.arrays import filled, given
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Knowledge:
    """The classes of a sequence, and where a thread begins or knowledge breaks off."""

    cls: NDArray[np.uint8]
    first: NDArray[np.bool_]
    broken: NDArray[np.bool_]


@dataclass(frozen=True)
class SegmentColumns:
    """Segments: each event's number of its segment, and the segments' columns (check/exit_segments.py)."""

    of: NDArray[np.intp]
    start: NDArray[np.intp]
    kind: NDArray[np.uint8]
    mask: NDArray[np.uint64]
    linked: NDArray[np.bool_]


@dataclass(frozen=True)
class StepColumns:
    """Steps in order: the state before each, its class, whether it is wrong, its time."""

    before: NDArray[np.uint8]
    cls: NDArray[np.uint8]
    wrong: NDArray[np.bool_]
    ts_ns: NDArray[np.int64]


def take_steps(
    known: Knowledge, next_state: NDArray[np.uint8], verdict: NDArray[np.uint8], unknown: int
) -> tuple[NDArray[np.intp], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Step the transition table through a sequence.

    Parameters
    ----------
    next_state : uint8, shape (steps + 1,)
    verdict : uint8, shape (states, steps + 1)
    unknown : int, the state where knowledge begins

    Returns
    -------
    (position, state before, verdict) of each step, and the state that each event of the sequence finds
    """
    n = len(known.cls)
    state, before, found = (np.empty(n, np.uint8) for _ in range(3))
    position = np.empty(n, np.int64)
    m = lib.take_steps(
        given(known.cls),
        given(known.first),
        given(known.broken),
        n,
        given(next_state),
        given(verdict),
        len(next_state) - 1,
        unknown,
        filled(state),
        filled(position),
        filled(before),
        filled(found),
    )
    return position[:m], before[:m], found[:m], state


def cut_segments(known: Knowledge, boundaries: tuple[int, int, int]) -> SegmentColumns:
    """Cut a sequence at events of three classes and where knowledge begins."""
    n = len(known.cls)
    of, start, kind = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, np.uint8)
    mask, linked = np.empty(n, np.uint64), np.empty(n, np.bool_)
    m = lib.cut_segments(
        given(known.cls),
        given(known.first),
        given(known.broken),
        n,
        given(np.array(boundaries, np.uint8)),
        filled(of),
        filled(start),
        filled(kind),
        filled(mask),
        filled(linked),
    )
    return SegmentColumns(of, start[:m].copy(), kind[:m].copy(), mask[:m].copy(), linked[:m].copy())


def count_edges(steps: StepColumns, unknown: int, sub_bits: int, counts: NDArray[np.int64]) -> None:
    """Count steps by edge and duration, those from the unknown state and wrong ones left out.

    Parameters
    ----------
    counts : int64, shape (states, classes, buckets), is added to
    """
    _, n_classes, n_buckets = counts.shape
    lib.count_edges(
        given(steps.before),
        given(steps.cls),
        given(steps.wrong),
        given(steps.ts_ns),
        len(steps.cls),
        n_classes,
        unknown,
        sub_bits,
        n_buckets,
        filled(counts),
    )
