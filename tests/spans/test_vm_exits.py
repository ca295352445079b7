"""The pairing of VM-exits against a slow one, event by event, however the recording is cut, and its rules."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtrace.spans.vm_exits import collect_vm_exits
from kvmtrace.table.event_table import EventKind, EventTable
from kvmtrace.table.payload import ColumnPayload

U4, U8, I8 = (np.dtype(t) for t in ("u4", "u8", "i8"))
KINDS = (
    EventKind("kvm_entry", "kvm", {"vcpu_id": U4, "rip": U8}),
    EventKind("kvm_exit", "kvm", {"exit_reason": U4, "guest_rip": U8}),
    EventKind("kvm_userspace_exit", "kvm", {"reason": U4}),
    EventKind("lost_events", "kvmtrace", {"count": I8}),
    EventKind("sched_switch", "sched", {}),
)
ENTRY, EXIT, USER, LOST, OTHER = range(5)


def table(rows: list[tuple[int, int, int, int]], kinds=KINDS) -> EventTable:
    """Rows are (ts, cpu, tid, kind); rip and exit reason are the row's number."""
    ts, cpu, tid, kind = (np.array(c) for c in (zip(*rows, strict=True) if rows else ([], [], [], [])))
    n = len(rows)
    columns = {
        "ts_ns": ts.astype(np.int64),
        "cpu": cpu.astype(np.int16),
        "tid": tid.astype(np.int32),
        "kind": kind.astype(np.uint16),
        "irq_flags": np.zeros(n, np.uint8),
        "preempt_count": np.zeros(n, np.uint8),
    }
    payloads = {}
    for i, k in enumerate(kinds):
        at = np.flatnonzero(kind == i)
        payloads[i] = ColumnPayload({name: at.astype(dtype) for name, dtype in k.fields.items()})
    return EventTable(columns, kinds, payloads)


def exits_of(events: EventTable, cuts: tuple[int, ...] = ()) -> np.ndarray:
    """Return the VM-exits of a table that comes in pieces."""
    bounds = [0, *sorted(min(cut, len(events)) for cut in cuts), len(events)]
    return collect_vm_exits(events.slice(a, b) for a, b in pairwise(bounds))


def test_pairs_interleaved_threads():
    got = exits_of(table([(10, 0, 1, EXIT), (11, 1, 2, EXIT), (15, 0, 1, ENTRY), (31, 1, 2, ENTRY)]))
    assert got["dur_ns"].tolist() == [5, 20]
    assert got["entry_row"].tolist() == [2, 3]
    assert got["entry_rip"].tolist() == [2, 3]
    assert got["vcpu_id"].tolist() == [2, 3]
    assert got["exit_reason"].tolist() == [0, 1]


def test_an_exit_after_an_exit_leaves_the_first_unpaired():
    got = exits_of(table([(1, 0, 1, EXIT), (2, 0, 1, EXIT), (3, 0, 1, ENTRY), (4, 0, 1, EXIT)]))
    assert got["dur_ns"].tolist() == [-1, 1, -1]
    assert got["entry_row"].tolist() == [-1, 2, -1]
    assert got["guest_before_ns"].tolist() == [-1, -1, 1]


def test_userspace_between_counts_only_for_its_thread():
    got = exits_of(
        table([(1, 0, 1, EXIT), (2, 0, 2, EXIT), (3, 0, 2, USER), (4, 0, 1, ENTRY), (5, 0, 2, ENTRY), (6, 0, 1, USER)])
    )
    assert got["to_userspace"].tolist() == [False, True]


def test_loss_between_on_the_same_cpu():
    got = exits_of(
        table(
            [(1, 0, 1, EXIT), (2, 0, -1, LOST), (3, 0, 1, ENTRY), (4, 0, 1, EXIT), (5, 1, -1, LOST), (6, 0, 1, ENTRY)]
        )
    )
    assert got["lost"].tolist() == [True, False]


def test_loss_that_may_concern_a_thread_that_moved():
    rows = [(1, 0, 1, EXIT), (5, 1, 1, ENTRY), (7, 0, -1, LOST), (8, 0, 9, OTHER)]
    assert exits_of(table(rows))["lost"].tolist() == [True]  # CPU 0 may have lost events before the entry already
    rows.insert(2, (6, 0, 9, OTHER))  # it did not: its next event was recorded after the entry
    assert exits_of(table(rows))["lost"].tolist() == [False]


def test_guest_time_needs_an_entry_and_no_loss():
    got = exits_of(table([(1, 0, 1, ENTRY), (4, 0, 1, EXIT), (5, 0, 1, ENTRY), (6, 0, -1, LOST), (9, 0, 1, EXIT)]))
    assert got["guest_before_ns"].tolist() == [3, -1]


def test_clock_that_steps_back():
    got = exits_of(table([(10, 0, 1, EXIT), (7, 0, 1, ENTRY)]))
    assert got["dur_ns"].tolist() == [-1]
    assert got["entry_row"].tolist() == [1]


def test_without_events_and_without_kinds():
    assert len(exits_of(table([]))) == 0
    assert len(exits_of(table([(1, 0, 1, ENTRY)]))) == 0
    only_exits = exits_of(table([(1, 0, 1, 0)], kinds=(KINDS[1],)))
    assert only_exits["dur_ns"].tolist() == [-1]
    assert len(exits_of(table([(1, 0, 1, 0)], kinds=(KINDS[2],)))) == 0


def test_number_is_that_of_the_thread():
    rows = [(i, 0, 1 + i // 2 % 2, EXIT if i % 2 else ENTRY) for i in range(12)]
    assert exits_of(table(rows), (5, 7))["number"].tolist() == [1, 1, 2, 2, 3, 3]


def slow(rows: list[tuple[int, int, int, int]]) -> dict[int, tuple[int, bool]]:
    """exit row -> (entry row or -1, a userspace exit between)"""
    out: dict[int, tuple[int, bool]] = {}
    pending: dict[int, int] = {}
    for i, (_, _, tid, kind) in enumerate(rows):
        if kind == EXIT:
            out[i], pending[tid] = (-1, False), i
        elif kind == USER and tid in pending:
            out[pending[tid]] = (out[pending[tid]][0], True)
        elif kind == ENTRY and tid in pending:
            at = pending.pop(tid)
            out[at] = (i, out[at][1])
    return out


def splits_a_gap(rows: list[tuple[int, int, int, int]], cut: int) -> bool:
    """Say whether events were lost between the rows before and behind a cut.

    What was complete before the cut has been given away by then: a loss that is told behind it comes too late for it.
    """
    for i in range(cut, len(rows)):
        if rows[i][3] == LOST and not any(rows[k][1] == rows[i][1] for k in range(cut, i)):
            return True
    return False


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from([ENTRY, EXIT, USER, LOST, OTHER])), max_size=60
    ),
    st.sampled_from([1, 70_000]),
    st.lists(st.integers(0, 60), max_size=3),
)
def test_equals_the_slow_pairing_however_it_is_cut(content, scale, cuts):
    rows = [(i, cpu, tid * scale, kind) for i, (cpu, tid, kind) in enumerate(content)]
    got = exits_of(table(rows), tuple(cut for cut in cuts if not splits_a_gap(rows, cut)))
    assert (got == exits_of(table(rows))).all()
    want = slow(rows)
    assert (
        dict(
            zip(
                got["row"].tolist(),
                zip(got["entry_row"].tolist(), got["to_userspace"].tolist(), strict=True),
                strict=True,
            )
        )
        == want
    )
