"""Which rows of a table belong together: to a thread, to a kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native._loops import lib
from kvmtrace._native.arrays import filled, given
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TrackedColumns:
    """Columns of an event table, all of one length; cls is 0 where the model does not track the event."""

    tid: NDArray[np.int32]
    cls: NDArray[np.uint8]
    ts_ns: NDArray[np.int64]
    cpu: NDArray[np.int16]


@dataclass(frozen=True)
class TrackedRows:
    """Tracked events, thread by thread: row in the table, class, number of the thread, time, CPU."""

    row: NDArray[np.int64]
    cls: NDArray[np.uint8]
    thread: NDArray[np.uint16]
    ts_ns: NDArray[np.int64]
    cpu: NDArray[np.int16]

    @classmethod
    def empty(cls, n: int) -> TrackedRows:
        """Return n rows to be filled in."""
        return cls(
            np.empty(n, np.int64),
            np.empty(n, np.uint8),
            np.empty(n, np.uint16),
            np.empty(n, np.int64),
            np.empty(n, np.int16),
        )


def tracked(columns: TrackedColumns, tids: NDArray[np.int32]) -> tuple[TrackedRows, int]:
    """Return the tracked events of some threads, thread by thread, and how many events these threads have in all.

    Parameters
    ----------
    columns : of a table
    tids : int32, ascending, at most 65,534
    """
    n = len(columns.tid)
    number, counts = np.empty(n, np.uint16), np.empty(len(tids), np.int64)
    cls = given(columns.cls)
    total: int = lib.count_tracked(given(columns.tid), cls, n, given(tids), len(tids), filled(number), filled(counts))
    out = TrackedRows.empty(int(counts.sum()))
    begins = np.cumsum(counts) - counts
    lib.fill_tracked(
        given(number),
        cls,
        given(columns.ts_ns),
        given(columns.cpu),
        n,
        filled(begins),
        filled(out.row),
        filled(out.cls),
        filled(out.thread),
        filled(out.ts_ns),
        filled(out.cpu),
    )
    return out, total


def rows_by_kind(kind: NDArray[np.uint16], n_kinds: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Sort rows by their kind.

    Returns
    -------
    (rows of kind 0, then of kind 1 ..., where each kind begins there and the end, place of each row in its kind)

    Raises
    ------
    ValueError
        A number is no kind's.
    """
    begin = np.empty(n_kinds + 1, np.int64)
    order, position = np.empty(len(kind), np.int64), np.empty(len(kind), np.int64)
    kind = np.ascontiguousarray(kind)
    if lib.rows_by_kind(given(kind), len(kind), n_kinds, filled(begin), filled(order), filled(position)):
        raise ValueError(f"the number {int(kind.max())} is none of {n_kinds} kinds")
    return order, begin, position


def latest_wanted(wanted: NDArray[np.bool_], thread: NDArray[np.uint16]) -> NDArray[np.int32]:
    """Return, for each row, the latest row of its thread up to itself that is wanted; -1 for none.

    Parameters
    ----------
    wanted : of at most 2**31 - 1 rows
    thread : uint16, of as many rows, those of a thread together
    """
    latest = np.empty(len(wanted), np.int32)
    wanted, thread = np.ascontiguousarray(wanted), np.ascontiguousarray(thread)
    lib.latest_wanted(given(wanted), given(thread), len(wanted), filled(latest))
    return latest


def mark_changes(values: NDArray[Any], changed: NDArray[np.bool_]) -> None:
    """Mark the rows, but the first, that differ from the one before bit by bit.

    Parameters
    ----------
    values : shape (n, ...), no objects
    changed : bool, shape (n,), is added to
    """
    values = np.ascontiguousarray(values)
    if len(changed) != len(values):
        raise ValueError("marks for other rows")
    if values.size:
        raw = values.reshape(-1).view(np.uint8)
        lib.mark_changes(given(raw), len(values), len(raw) // len(values), filled(changed))
