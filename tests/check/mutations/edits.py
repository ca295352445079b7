"""Edits of an event table: what a fault in KVM, or a lying recorder, would look like in a recording.

All of them return a new table and leave the old one alone. Time stamps and CPUs stay with the place in the
recording, not with the event, so that an edit never shows merely as a step back in time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.table.event_table import COMMON_DTYPES, EventTable
from kvmtrace.table.payload import ColumnPayload

if TYPE_CHECKING:
    from numpy.typing import NDArray

PLACE_COLUMNS = ("ts_ns", "cpu")


def materialise(table: EventTable) -> EventTable:
    """Return the same table with every field as a plain column, so that edits are cheap."""
    payloads = {}
    for index, kind in enumerate(table.kinds):
        payload = table.payloads.get(index)
        if payload is not None and table.count(kind.name):
            columns = {name: np.array(payload.column(name)) for name in payload.fields if name in kind.fields}
            payloads[index] = ColumnPayload(columns)
    return EventTable(common_columns(table), table.kinds, payloads)


def common_columns(table: EventTable) -> dict[str, NDArray[Any]]:
    """Return copies of the six columns that every row has."""
    return {name: getattr(table, name).copy() for name in COMMON_DTYPES}


def _select(table: EventTable, rows: NDArray[np.intp], places: NDArray[np.intp]) -> EventTable:
    """Return `rows` in this order, standing at the times and CPUs of `places`."""
    taken = table.take(rows)
    columns = common_columns(taken)
    for name in PLACE_COLUMNS:
        columns[name] = getattr(table, name)[places].copy()
    return EventTable(columns, taken.kinds, taken.payloads)


def drop(table: EventTable, row: int) -> EventTable:
    """Return the table without one event."""
    rows = np.delete(np.arange(len(table)), row)
    return _select(table, rows, rows)


def duplicate(table: EventTable, row: int) -> EventTable:
    """Return the table with one event recorded twice."""
    rows = np.insert(np.arange(len(table)), row, row)
    return _select(table, rows, rows)


def swap(table: EventTable, row: int, other: int) -> EventTable:
    """Return the table with two events in each other's place."""
    rows = np.arange(len(table))
    rows[[row, other]] = rows[[other, row]]
    return _select(table, rows, np.arange(len(table)))


def alter(table: EventTable, row: int, field: str, value: Any) -> EventTable:
    """Return the table with one field of one event changed; a common column (tid, cpu, ...) counts as a field."""
    columns = common_columns(table)
    payloads = dict(table.payloads)
    if field in COMMON_DTYPES:
        columns[field][row] = value
    else:
        index = int(table.kind[row])
        payload = payloads[index]
        assert isinstance(payload, ColumnPayload)
        column = payload.columns[field].copy()
        column[position(table, row)] = value
        payloads[index] = ColumnPayload({**payload.columns, field: column})
    return EventTable(columns, table.kinds, payloads)


def insert(table: EventTable, after: int, kind: str, values: dict[str, Any]) -> EventTable:
    """Return the table with a new event of `kind` behind row `after`, same thread, CPU, time and context.

    Fields that `values` does not name are those of the kind's nearest real event, or 0 where there is none.
    """
    index = table.kind_index[kind]
    rows = table.rows(kind)
    at = int(np.searchsorted(rows, after, side="right"))
    columns = {name: np.insert(column, after + 1, column[after]) for name, column in common_columns(table).items()}
    columns["kind"][after + 1] = index
    payloads = dict(table.payloads)
    old = payloads.get(index)
    fields: dict[str, NDArray[Any]] = {}
    for name, dtype in table.kinds[index].fields.items():
        column = old.columns[name] if isinstance(old, ColumnPayload) else np.zeros(0, dtype)
        new = np.zeros(1, dtype)
        if name in values:
            new[0] = values[name]
        elif len(column):
            new[0] = column[min(at, len(column) - 1)]
        fields[name] = np.concatenate([column[:at], new, column[at:]])
    payloads[index] = ColumnPayload(fields)
    return EventTable(columns, table.kinds, payloads)


def position(table: EventTable, row: int) -> int:
    """Return which of its kind's events stands at `row`."""
    return int(np.searchsorted(table.rows(table.kinds[table.kind[row]].name), row))


def value_of(table: EventTable, row: int, field: str) -> Any:
    """Return one field of one event; None if the kind does not have it."""
    name = table.kinds[table.kind[row]].name
    if not table.has(name, field):
        return None
    value = table.field(name, field)[position(table, row)]
    return int(value) if np.ndim(value) == 0 and value.dtype.kind in "iub" else value
