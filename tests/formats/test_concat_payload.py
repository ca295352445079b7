"""Payloads of several parts: any rows of them equal those of the whole column."""

from __future__ import annotations

import numpy as np
import pytest

from kvmtrace.table.event_table import COMMON_DTYPES, EventKind, EventTable
from kvmtrace.table.payload import ColumnPayload, ConcatPayload

KINDS = (EventKind("a", "kvm", {"x": np.dtype(np.int64)}), EventKind("b", "kvm", {"x": np.dtype(np.int64)}))


def table(kind: list[int], seed: int) -> EventTable:
    columns = {name: np.zeros(len(kind), dtype) for name, dtype in COMMON_DTYPES.items()}
    columns["kind"] = np.array(kind, np.uint16)
    payloads = {i: ColumnPayload({"x": np.arange(kind.count(i)) + 100 * seed + 10 * i}) for i in set(kind)}
    return EventTable(columns, KINDS, payloads)


@pytest.mark.parametrize("rows", [[], [0], [3], [1, 2], [0, 1, 2, 3, 4], [2, 2, 3], [4, 0]])
def test_rows_of_parts(rows: list[int]) -> None:
    parts = [(ColumnPayload({"x": np.arange(3)}), None), (ColumnPayload({"x": np.arange(3, 9)}), np.array([0, 5]))]
    chosen = np.array(rows, np.intp)
    whole = ConcatPayload(parts).column("x")
    assert ConcatPayload(parts, [3, 2]).column("x", chosen).tolist() == whole[chosen].tolist()


@pytest.mark.parametrize("shared", [False, True])
def test_rows_and_fields_of_a_joined_table(shared: bool) -> None:
    joined = EventTable.concat([table([0, 1, 0], 1), table([1, 1], 2), table([], 3)], shared=shared)
    alone = EventTable({n: getattr(joined, n) for n in COMMON_DTYPES}, KINDS, joined.payloads)
    for name in ("a", "b"):
        assert joined.rows(name).tolist() == alone.rows(name).tolist()
    assert joined.field("a", "x").tolist() == [100, 101]
    assert joined.field("b", "x").tolist() == [110, 210, 211]
