"""Where the events of each class stand in a sequence, and what they hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native._loops import lib
from kvmtrace._native.arrays import filled, given

if TYPE_CHECKING:
    from numpy.typing import NDArray

N_CLASSES = 64


def positions_by_class(cls: NDArray[np.uint8]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Sort positions by the class of their event, ascending within a class.

    Parameters
    ----------
    cls : below 64

    Returns
    -------
    (positions of class 0, then of class 1 ..., where each class begins there and the end: 65 numbers)
    """
    begin, order = np.empty(N_CLASSES + 1, np.int64), np.empty(len(cls), np.int64)
    cls = np.ascontiguousarray(cls)
    lib.positions_by_class(given(cls), len(cls), filled(begin), filled(order))
    return order, begin


def first_in_segments(
    of: NDArray[np.intp], positions: NDArray[np.intp], n_segments: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return, per segment, the first of these positions (-1: none) and how many it holds.

    Parameters
    ----------
    of : the segment of each event
    positions : ascending, of some events

    Raises
    ------
    IndexError
        A position is that of no event, or a number that of no segment.
    """
    first, count = np.empty(n_segments, np.int64), np.empty(n_segments, np.int64)
    positions = np.ascontiguousarray(positions)
    if lib.first_in_segments(
        given(of), len(of), given(positions), len(positions), n_segments, filled(first), filled(count)
    ):
        raise IndexError("a position outside of its sequence")
    return first, count


def take_values(column: NDArray[Any], place: NDArray[np.intp], positions: NDArray[np.intp]) -> NDArray[Any]:
    """Return column[place[positions]].

    Parameters
    ----------
    column : of any type, shape (m, ...)
    place : intp, shape (n,), the place of each event's value in the column
    positions : intp, of some events

    Raises
    ------
    IndexError
        A position or place is outside.
    """
    if column.dtype.hasobject:
        return column.take(place.take(positions), axis=0)
    column, positions = np.ascontiguousarray(column), np.ascontiguousarray(positions)
    out = np.empty((len(positions), *column.shape[1:]), column.dtype)
    size = column.dtype.itemsize * int(np.prod(column.shape[1:], dtype=np.int64))
    if not len(positions) or not size:
        return out
    if not len(column):
        raise IndexError("a position in an empty column")
    raw, made = column.reshape(-1).view(np.uint8), out.reshape(-1).view(np.uint8)
    if lib.take_values(
        given(raw), len(column), size, given(place), len(place), given(positions), len(positions), filled(made)
    ):
        raise IndexError("a position outside of its column")
    return out


def consecutive_places(place: NDArray[np.intp], positions: NDArray[np.intp]) -> int:
    """Return the first of place[positions] where these follow each other one by one, else -1."""
    positions = np.ascontiguousarray(positions)
    found: int = lib.consecutive_places(given(place), len(place), given(positions), len(positions))
    return found


def steps_and_breaks(
    cls: NDArray[np.uint8], broken: NDArray[np.bool_], order: NDArray[np.intp], n_steps: int
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return, for each event in an order, the latest step so far (an index into the order) and breaks so far.

    Parameters
    ----------
    cls, broken : of the events of a sequence; classes up to n_steps are steps
    order : intp, as many
    """
    latest, breaks = np.empty(len(order), np.int64), np.empty(len(order), np.int64)
    if len(cls) != len(order) or len(broken) != len(order):
        raise ValueError("an order of other events")
    columns = map(given, map(np.ascontiguousarray, (cls, broken, order)))
    if lib.steps_and_breaks(*columns, len(order), n_steps, filled(latest), filled(breaks)):
        raise IndexError("an index outside of its sequence")
    return latest, breaks


def next_entries(kind: NDArray[np.uint8], linked: NDArray[np.bool_], entry: int, leaves: int) -> NDArray[np.intp]:
    """Return the next segment of kind `entry` behind each, before any of kind `leaves` or 0, or a break; -1: none."""
    found = np.empty(len(kind), np.int64)
    lib.next_entries(given(kind), given(linked), len(kind), entry, leaves, filled(found))
    return found
