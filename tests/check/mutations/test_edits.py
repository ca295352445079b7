"""The edits do what they say, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from kvmtrace.table.event_table import EventKind, EventTable
from kvmtrace.table.payload import ColumnPayload
from mutations import edits

KINDS = (
    EventKind("a", "kvm", {"x": np.dtype(np.uint32), "code": np.dtype("(3,)u1")}),
    EventKind("b", "kvm", {"y": np.dtype(np.int64)}),
    EventKind("c", "kvm", {"z": np.dtype(np.uint8)}),
)


@pytest.fixture
def table() -> EventTable:
    """Return five events: a b a a b."""
    columns = {
        "ts_ns": np.arange(10, 15),
        "cpu": np.array([0, 1, 0, 1, 0], np.int16),
        "tid": np.array([7, 7, 8, 7, 7], np.int32),
        "kind": np.array([0, 1, 0, 0, 1], np.uint16),
        "irq_flags": np.zeros(5, np.uint8),
        "preempt_count": np.zeros(5, np.uint8),
    }
    code = np.arange(9, dtype=np.uint8).reshape(3, 3)
    payloads = {
        0: ColumnPayload({"x": np.array([1, 2, 3], np.uint32), "code": code}),
        1: ColumnPayload({"y": np.array([-1, -2], np.int64)}),
    }
    return EventTable(columns, KINDS, payloads)


def story(table: EventTable) -> list[tuple[str, int]]:
    """Return each event with its number."""
    return [
        (kind.name, edits.value_of(table, row, {"a": "x", "b": "y", "c": "z"}[kind.name]))
        for row, kind in enumerate(KINDS[index] for index in table.kind)
    ]


BEFORE = [("a", 1), ("b", -1), ("a", 2), ("a", 3), ("b", -2)]


def test_materialise_keeps_everything(table: EventTable) -> None:
    again = edits.materialise(table.take(np.arange(5)))
    assert story(again) == BEFORE
    assert np.array_equal(again.field("a", "code"), table.field("a", "code"))


def test_drop_and_duplicate(table: EventTable) -> None:
    assert story(edits.drop(table, 2)) == [*BEFORE[:2], *BEFORE[3:]]
    twice = edits.duplicate(table, 1)
    assert story(twice) == [*BEFORE[:2], *BEFORE[1:]]
    assert list(twice.ts_ns) == [10, 11, 11, 12, 13, 14]


def test_swap_leaves_times_and_cpus_in_place(table: EventTable) -> None:
    swapped = edits.swap(table, 1, 3)
    assert story(swapped) == [BEFORE[0], BEFORE[3], BEFORE[2], BEFORE[1], BEFORE[4]]
    assert list(swapped.ts_ns) == list(table.ts_ns)
    assert list(swapped.cpu) == list(table.cpu)


def test_alter_changes_one_value(table: EventTable) -> None:
    changed = edits.alter(table, 3, "x", 99)
    assert story(changed) == [*BEFORE[:3], ("a", 99), BEFORE[4]]
    assert edits.alter(table, 3, "cpu", 5).cpu[3] == 5
    assert story(table) == BEFORE
    assert table.cpu[3] == 1


def test_insert_of_known_and_of_new_kinds(table: EventTable) -> None:
    more = edits.insert(table, 1, "a", {"x": 42})
    assert story(more) == [*BEFORE[:2], ("a", 42), *BEFORE[2:]]
    assert list(edits.value_of(more, 2, "code")) == [3, 4, 5]  # of the nearest real one
    assert (more.tid[2], more.ts_ns[2]) == (7, 11)
    new = edits.insert(table, 4, "c", {})
    assert story(new) == [*BEFORE, ("c", 0)]
    with pytest.raises(KeyError):
        edits.insert(table, 0, "nonesuch", {})
