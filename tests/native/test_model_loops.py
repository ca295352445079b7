"""The model's steps, segments and counts: compiled loops and NumPy twins give the same for any sequence of events."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import oracle_model
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import both

from kvmtrace._native import automaton, thread_rows
from kvmtrace._native.automaton import StepColumns
from kvmtrace._native.thread_rows import TrackedColumns
from kvmtrace.check import coverage as statistics
from kvmtrace.check import exit_segments as segments
from kvmtrace.check import state_machine as steps
from kvmtrace.check.alphabet import N_CLASSES, N_STEPS
from kvmtrace.check.state_machine import ILLEGAL, LEGAL, STATE_NAMES, Automaton
from kvmtrace.check.thread_events import Sequence, first_of
from kvmtrace.spans.lanes import Lanes
from kvmtrace.table.event_table import RowsByKind

EVENTS = st.lists(st.tuples(st.integers(1, N_CLASSES - 1), st.integers(0, 2), st.booleans()), max_size=120)


def assert_same(compiled, plain, names):
    for name in names:
        a, b = getattr(compiled, name), getattr(plain, name)
        assert a.dtype == b.dtype, name
        np.testing.assert_array_equal(a, b, name)


def sequence_of(events) -> Sequence:
    cls, thread, broken = (np.array(column) for column in zip(*events, strict=True)) if events else ([], [], [])
    thread = np.sort(np.array(thread, np.uint16))
    n = len(thread)
    empty = np.zeros(n, np.int64)
    return Sequence(
        None,
        np.arange(n),
        np.array(cls, np.uint8),
        thread,
        np.array([5, 6, 7], np.int32),
        first_of(thread),
        np.array(broken, bool),
        empty,
        empty.astype(np.int16),
        n,
    )


@given(EVENTS)
@settings(max_examples=200, deadline=None)
def test_segments(events):
    compiled, plain = both(lambda: segments.cut_segments(sequence_of(events)))
    assert_same(compiled, plain, ("of", "start", "stop", "kind", "mask", "linked"))


@given(EVENTS, st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_steps(events, seed):
    rng = np.random.default_rng(seed)
    verdict = rng.choice(np.array([ILLEGAL, LEGAL], np.uint8), (len(STATE_NAMES), N_STEPS + 1))
    next_state = rng.integers(0, len(STATE_NAMES), N_STEPS + 1).astype(np.uint8)
    automaton = Automaton(verdict, next_state, {}, np.zeros(len(STATE_NAMES), bool))
    compiled, plain = both(lambda: steps.take_steps(sequence_of(events), automaton))
    assert_same(compiled, plain, ("position", "before", "wrong", "state"))


@given(
    st.lists(
        st.tuples(
            st.integers(0, len(STATE_NAMES) - 1),
            st.integers(1, N_STEPS),
            st.booleans(),
            st.integers(-(1 << 62), 1 << 62) | st.integers(0, 5000),
        ),
        max_size=60,
    )
)
@settings(max_examples=200, deadline=None)
def test_counts(rows):
    before, cls, wrong, ts_ns = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [], [])
    columns = StepColumns(
        np.array(before, np.uint8), np.array(cls, np.uint8), np.array(wrong, bool), np.array(ts_ns, np.int64)
    )
    shape = (len(STATE_NAMES), N_STEPS + 1, statistics._BUCKETS)
    compiled, plain = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    automaton.count_edges(columns, statistics.UNKNOWN, statistics._SUB_BITS, compiled)
    oracle_model.count_edges(columns, statistics.UNKNOWN, statistics._SUB_BITS, plain)
    np.testing.assert_array_equal(compiled, plain)


@given(
    st.lists(st.tuples(st.sampled_from([-1, 3, 5, 6, 7, 8, 90, 4_000_000]), st.integers(0, 3)), max_size=80),
    st.sets(st.sampled_from([3, 5, 7, 8, 60, 90, 100, 4_000_000]), max_size=8),
)
@settings(max_examples=300, deadline=None)
def test_tracked_events(rows, tids):
    tid, cls = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [])
    n = len(tid)
    columns = TrackedColumns(
        np.array(tid, np.int32), np.array(cls, np.uint8), np.arange(n) * 10, np.arange(n).astype(np.int16)
    )
    wanted = np.array(sorted(tids), np.int32)
    (compiled, n_compiled), (plain, n_plain) = (
        thread_rows.tracked(columns, wanted),
        oracle_model.tracked(columns, wanted),
    )
    assert n_compiled == n_plain
    assert_same(compiled, plain, ("row", "cls", "thread", "ts_ns", "cpu"))


@given(st.lists(st.integers(0, 6), max_size=80), st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_rows_by_kind(kinds, n_kinds):
    column = np.array(kinds, np.uint16)
    if kinds and n_kinds <= max(kinds):  # no kind's number, as no table has it
        with pytest.raises(ValueError, match="none of"):
            thread_rows.rows_by_kind(column, n_kinds)
        return

    def find():
        found = RowsByKind(column, n_kinds)
        return found.rows, found.position

    compiled, plain = both(find)
    assert [rows.tolist() for rows in compiled[0]] == [rows.tolist() for rows in plain[0]]
    assert compiled[1].tolist() == plain[1].tolist()
    assert [rows.tolist() for rows in compiled[0]] == [
        np.flatnonzero(column == k).tolist() for k in range(max(n_kinds, 1))
    ]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3)), max_size=60))
@settings(max_examples=300, deadline=None)
def test_latest_wanted_rows(rows):
    wanted = np.array([want for want, _ in rows], bool)
    thread = np.sort(np.array([number for _, number in rows], np.uint16))
    n = len(rows)
    columns = {field.name: np.zeros(n, getattr(Lanes.empty(rows=True), field.name).dtype) for field in fields(Lanes)}
    compiled, plain = both(lambda: Lanes(**columns | {"thread": thread}).last(wanted))
    assert compiled.dtype == plain.dtype == np.int32
    expected = [max((j for j in range(i + 1) if wanted[j] and thread[j] == thread[i]), default=-1) for i in range(n)]
    assert compiled.tolist() == plain.tolist() == expected
