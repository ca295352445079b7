"""Event tables that outlive the one they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.table.event_table import COMMON_DTYPES, EventTable
from kvmtrace.table.payload import ColumnPayload, columns_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.table.payload import Payload


def materialise(table: EventTable, rows: NDArray[np.intp]) -> EventTable:
    """Return the table of these ascending rows with its own copy of every field.

    EventTable.take keeps the whole table alive; a parked tail must not.
    """
    columns = {name: getattr(table, name)[rows].copy() for name in COMMON_DTYPES}
    payloads: dict[int, Payload] = {}
    for index, payload in table.payloads.items():
        chosen = rows[columns["kind"] == index]
        if len(chosen):
            own = np.searchsorted(table.rows(table.kinds[index].name), chosen)
            fields = columns_of(payload, list(payload.fields), own)
            masks = {name: payload.told(name) for name in payload.fields}
            payloads[index] = ColumnPayload(
                fields, {name: mask[own] for name, mask in masks.items() if mask is not None}
            )
    return EventTable(columns, table.kinds, payloads)
