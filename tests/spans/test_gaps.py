"""What a loss may hide, case by case and against a slow account; however the recording is cut."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtrace.spans.gaps import Gaps
from kvmtrace.table.event_table import COMMON_DTYPES, EventKind, EventTable
from kvmtrace.table.payload import ColumnPayload

KINDS = (EventKind("x", "kvm", {}), EventKind("lost_events", "kvmtrace", {"count": np.dtype("i8")}))
X, LOST = 0, 1


def table(rows: list[tuple[int, int, int]]) -> EventTable:
    """Rows are (ts_ns, cpu, kind)."""
    columns = {name: np.zeros(len(rows), dtype) for name, dtype in COMMON_DTYPES.items()}
    for i, (ts, cpu, kind) in enumerate(rows):
        columns["ts_ns"][i], columns["cpu"][i], columns["kind"][i] = ts, cpu, kind
    n_lost = sum(kind == LOST for _, _, kind in rows)
    return EventTable(columns, KINDS, {1: ColumnPayload({"count": np.ones(n_lost, "i8")})})


def hidden(
    rows: list[tuple[int, int, int]], own: list[int], *, wandered: bool, cuts: tuple[int, ...] = ()
) -> list[bool]:
    """Say of each stretch between these rows of one thread whether it may hide events."""
    whole, gaps = table(rows), Gaps()
    bounds = [0, *sorted(cuts), len(rows)]
    loss = np.concatenate([gaps.feed(whole.slice(a, b)) for a, b in pairwise(bounds)])
    away = np.full(max(len(own) - 1, 0), wandered)
    return gaps.hide(whole.ts_ns[own], whole.cpu[own], loss[own], away).tolist()


def test_a_thread_that_stayed_sees_the_losses_of_its_own_cpu_only() -> None:
    rows = [(1, 0, X), (2, 0, X), (3, 1, LOST), (3, 1, X), (4, 0, X), (5, 0, LOST), (6, 0, X), (7, 0, X)]
    assert hidden(rows, [0, 1, 4, 6, 7], wandered=False) == [False, False, True, False]


def test_a_thread_that_was_away_may_have_been_where_events_were_lost() -> None:
    rows = [(1, 0, X), (2, 1, X), (3, 0, X), (5, 1, LOST), (6, 1, X), (8, 0, X), (9, 0, X)]
    assert hidden(rows, [0, 2, 5, 6], wandered=True) == [True, True, False]
    assert hidden(rows, [0, 2, 5, 6], wandered=False) == [False, False, False]


def test_a_thread_that_moved_may_have_lost_events_on_either_cpu() -> None:
    rows = [(1, 0, X), (2, 1, X), (4, 0, LOST), (5, 0, X)]
    assert hidden(rows, [0, 1], wandered=False) == [True]


def test_gaps_that_end_never_and_gaps_that_are_forgotten() -> None:
    gaps = Gaps()
    gaps.feed(table([(1, 0, X), (2, 1, X), (3, 1, LOST)]))
    gaps.end_at({0: 9})
    gaps.feed(table([(20, 1, X)]))
    gaps.forget_before(30)
    ts, cpu, loss = np.array([40, 50]), np.array([2, 3], np.int16), np.zeros(2, np.int32)
    assert gaps.hide(ts, cpu, loss, np.array([False])).tolist() == [True], "CPU 0 may have gone on"
    assert not Gaps()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([X, X, X, LOST])), max_size=40),
    st.booleans(),
    st.lists(st.integers(0, 40), max_size=3),
)
def test_equals_a_slow_account_however_it_is_cut(
    content: list[tuple[int, int]], wandered: bool, cuts: list[int]
) -> None:
    rows = [(10 * i, cpu, kind) for i, (cpu, kind) in enumerate(content)]
    own = [i for i, (_, kind) in enumerate(content) if kind == X]
    gaps = []  # (cpu, row before, row behind)
    for i, (cpu, kind) in enumerate(content):
        if kind == LOST:
            before = max((j for j in range(i) if content[j] == (cpu, X)), default=-1)
            behind = min((j for j in range(i, len(content)) if content[j] == (cpu, X)), default=len(content))
            gaps.append((cpu, before, behind))
    expected = []
    for a, b in pairwise(own):
        stayed = content[a][0] == content[b][0] and not wandered
        same = content[a][0] == content[b][0]
        found = False
        for cpu, before, behind in gaps:
            if same and cpu == content[a][0]:
                found |= a <= before and behind <= b
            elif not stayed:
                found |= before <= b and behind >= a
        expected.append(found)
    assert hidden(rows, own, wandered=wandered, cuts=tuple(min(cut, len(rows)) for cut in cuts)) == expected
