"""Row groups that were written together, as event tables of consecutive events.

A row group holds the events of one kind of one vCPU thread, or those of all other kinds and threads, in recorded
order. A table of consecutive events takes a stretch of each. Where one row group has all events of a kind, their
fields are views of what was read; otherwise they are put into recorded order when somebody asks for them.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.errors import MissingEventError
from kvmtrace.formats.arrow.arrow_schema import TOLD
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.table.event_table import COMMON_DTYPES, EventTable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventKind, RowsByKind
    from kvmtrace.table.payload import Payload

    # (row groups, column name -> dtype, rows among those of these groups or None) -> column name -> values
    ReadFields = Callable[
        [Sequence[int], Mapping[str, np.dtype[Any]], "NDArray[np.intp] | None"], dict[str, NDArray[Any]]
    ]


@dataclass(frozen=True)
class _Run:
    """Events of a row group, in recorded order.

    Parameters
    ----------
    group : number of the row group within the window
    rows : where they are in the row group; None: all of it
    place : int64, ascending; which rows of the recording they are, or of the window
    """

    group: int
    rows: NDArray[np.intp] | None
    place: NDArray[np.int64]

    def span(self, start: int, stop: int) -> slice:
        """Return which of the events are at places start..stop."""
        first, last = np.searchsorted(self.place, (start, stop)).tolist()
        return slice(first, last)


def recorded_places(rows: Sequence[NDArray[np.int64]]) -> tuple[list[NDArray[np.int64]], int]:
    """Return (place, lowest): which row in recorded order each stored one is, counted from `lowest`.

    Equal numbers stay in stored order. Where each number stands once, the places are `rows` themselves.

    Parameters
    ----------
    rows : per row group, the numbers of its rows
    """
    n = sum(map(len, rows))
    lowest = min((int(row.min()) for row in rows if len(row)), default=0)
    if max((int(row.max()) for row in rows if len(row)), default=-1) - lowest == n - 1:
        taken = np.zeros(n, bool)
        for row in rows:
            taken[row - lowest if lowest else row] = True
        if taken.all():
            return list(rows), lowest
    place = np.empty(n, np.int64)
    place[np.argsort(np.concatenate([*rows, np.empty(0, np.int64)]), kind="stable")] = np.arange(n)
    return np.split(place, np.cumsum([len(row) for row in rows])[:-1]), 0


@dataclass(frozen=True)
class StoredRows:
    """What was read of some row groups.

    Parameters
    ----------
    groups : their numbers in the file
    columns : the six common columns, of each row group its values, or the one value that all its rows have
    row : int64, of each row group the numbers of its rows in the recording
    """

    groups: Sequence[int]
    columns: Mapping[str, Sequence[NDArray[Any] | int]]
    row: Sequence[NDArray[np.int64]]


class Window:
    """Row groups that together hold consecutive events.

    Parameters
    ----------
    stored : StoredRows
    kinds : what the column `kind` indexes
    read : reads fields
    """

    def __init__(self, stored: StoredRows, kinds: Sequence[EventKind], read: ReadFields) -> None:
        self.kinds = kinds
        self._groups = list(stored.groups)
        self._columns = stored.columns
        self._read = read
        self._sizes = [len(row) for row in stored.row]
        places, self._lowest = recorded_places(stored.row)
        self._runs = [_run(i, place) for i, place in enumerate(places)]
        self._counts = np.array(
            [
                _kind_counts(kind, size, len(kinds))
                for kind, size in zip(stored.columns["kind"], self._sizes, strict=True)
            ]
        ).reshape(len(self._groups), len(kinds))
        self._runs_of: dict[int, list[_Run]] = {}
        self._fields: dict[tuple[int, str], list[NDArray[Any]]] = {}
        self._locks: dict[tuple[int, str], threading.Lock] = {}  # one for each field: others are read at the same time

    def __len__(self) -> int:
        return sum(self._sizes)

    def table(self, start: int, stop: int) -> EventTable:
        """Return events start..stop of the window."""
        start, stop = start + self._lowest, stop + self._lowest
        pieces = [
            _Piece(run, span, run.place[span] - start)
            for run in self._runs
            if (span := run.span(start, stop)).stop > span.start
        ]
        columns = {name: self._column(name, dtype, pieces) for name, dtype in COMMON_DTYPES.items()}
        payloads: dict[int, Payload] = {}
        table = EventTable(columns, self.kinds, payloads)
        for index in np.flatnonzero(np.bincount(columns["kind"], minlength=len(self.kinds))).tolist():
            payloads[index] = WindowPayload(self, index, start, stop, table.by_kind)
        return table

    def _column(self, name: str, dtype: np.dtype[Any], pieces: Sequence[_Piece]) -> NDArray[Any]:
        """Return a common column of the events in these pieces of row groups."""
        stored = [self._stored(name, piece.run, piece.span) for piece in pieces]
        if len(pieces) == 1 and isinstance(stored[0], np.ndarray):
            return stored[0]
        n = sum(len(piece.at) for piece in pieces)
        usual = None
        if pieces:
            largest = max(range(len(pieces)), key=lambda i: len(pieces[i].at))
            usual = None if isinstance(stored[largest], np.ndarray) else stored[largest]
        column = np.empty(n, dtype) if usual is None else np.full(n, usual, dtype)
        for piece, values in zip(pieces, stored, strict=True):
            if isinstance(values, np.ndarray) or values != usual:
                column[piece.at] = values
        return column

    def _stored(self, name: str, run: _Run, span: slice) -> NDArray[Any] | int:
        values = self._columns[name][run.group]
        if not isinstance(values, np.ndarray):
            return values
        return values[span] if run.rows is None else values[run.rows[span]]

    def runs(self, index: int) -> list[_Run]:
        """Return where the events of a kind are."""
        found = self._runs_of.get(index)
        if found is None:  # two threads may both find them
            found = self._runs_of[index] = [self._run_of(int(i), index) for i in np.flatnonzero(self._counts[:, index])]
        return found

    def _run_of(self, group: int, index: int) -> _Run:
        run = self._runs[group]
        if self._counts[group, index] == len(run.place):
            return run
        own = np.flatnonzero(self._stored("kind", run, slice(None)) == index)
        return _Run(group, own if run.rows is None else run.rows[own], run.place[own])

    def read_ahead(self, before: Window) -> None:
        """Read the fields that another window has been asked for: sooner at once, and no thread waits for another."""
        wanted: dict[int, list[str]] = {}
        for index, name in list(before._fields):
            wanted.setdefault(index, []).append(name)
        for index, names in wanted.items():
            if self._counts[:, index].any():
                self._fields |= {(index, name): values for name, values in self._read_fields(index, names).items()}

    def field(self, index: int, name: str) -> list[NDArray[Any]]:
        """Return a field of a kind for each of its runs; it is read once and kept."""
        key = index, name
        with self._locks.setdefault(key, threading.Lock()):
            if key not in self._fields:
                self._fields[key] = self._read_fields(index, [name])[name]
            return self._fields[key]

    def _read_fields(self, index: int, names: Sequence[str]) -> dict[str, list[NDArray[Any]]]:
        runs, kind = self.runs(index), self.kinds[index]
        sizes = [self._sizes[run.group] for run in runs]
        rows = None
        if any(run.rows is not None for run in runs):
            begins = np.cumsum([0, *sizes]).tolist()
            rows = np.concatenate(
                [
                    (np.arange(size) if run.rows is None else run.rows) + begin
                    for run, size, begin in zip(runs, sizes, begins, strict=False)
                ]
            )
        stored = {f"{kind.name}.{name}": name for name in names}
        found = self._read(
            [self._groups[run.group] for run in runs],
            {column: kind.fields[name] for column, name in stored.items()},
            rows,
        )
        ends = np.cumsum([len(run.place) for run in runs])[:-1]
        return {name: np.split(found[column], ends) for column, name in stored.items()}


@dataclass(frozen=True)
class _Piece:
    """What a table takes of a row group: events `span` of the run, which are its rows `at` (int64)."""

    run: _Run
    span: slice
    at: NDArray[np.int64]


def _kind_counts(kind: NDArray[Any] | int, size: int, n_kinds: int) -> NDArray[np.intp]:
    """Return how many events of each kind a row group has."""
    if isinstance(kind, np.ndarray):
        return np.bincount(kind, minlength=n_kinds)
    counts = np.zeros(n_kinds, np.intp)
    counts[kind] = size
    return counts


def _run(group: int, place: NDArray[np.int64]) -> _Run:
    """Return all events of a row group, sorted if they do not stand in recorded order."""
    if bool((place[1:] > place[:-1]).all()):
        return _Run(group, None, place)
    order = np.argsort(place)
    return _Run(group, order, place[order])


class WindowPayload:
    """Fields of a kind's events at places start..stop of a window.

    Parameters
    ----------
    window : Window
    index : of the kind
    start, stop : int, places
    by_kind : of the table whose payload this is
    """

    def __init__(self, window: Window, index: int, start: int, stop: int, by_kind: RowsByKind) -> None:
        self.fields: Mapping[str, np.dtype[Any]] = window.kinds[index].fields
        self._window = window
        self._index = index
        self._start, self._stop = start, stop
        self._by_kind = by_kind
        self._columns: dict[str, NDArray[Any]] = {}
        self._order: NDArray[np.intp] | None = None

    def column(self, name: str, rows: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """See Payload."""
        if name not in self.fields:
            raise MissingEventError(f"field {name} was not recorded")
        values = self._columns.get(name)
        if values is None:
            values = self._columns[name] = self._whole(name)
        return values if rows is None else values[rows]

    def told(self, name: str) -> NDArray[np.bool_] | None:
        """See Payload."""
        return self.column(name + TOLD) if name + TOLD in self.fields else None

    def _whole(self, name: str) -> NDArray[Any]:
        parts = [
            values[run.span(self._start, self._stop)]
            for run, values in zip(self._window.runs(self._index), self._window.field(self._index, name), strict=True)
        ]
        parts = [part for part in parts if len(part)]
        if len(parts) == 1:
            return parts[0]
        if self._order is None:
            self._order = self._find_order()
        whole = np.empty((len(self._order), *parts[0].shape[1:]), parts[0].dtype)
        begin = 0
        for part in parts:
            whole[self._order[begin : begin + len(part)]] = part
            begin += len(part)
        return whole

    def _find_order(self) -> NDArray[np.intp]:
        """Return the position within the kind of each event, run by run."""
        places = [run.place[run.span(self._start, self._stop)] for run in self._window.runs(self._index)]
        return self._by_kind.position[np.concatenate(places) - self._start]
