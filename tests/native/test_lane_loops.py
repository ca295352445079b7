"""The compiled loops over lanes give what their twins give."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import oracle_lanes
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtrace._native import class_positions, edges, lane_rows
from kvmtrace._native.time_bins_loop import BinArrays, Stretches, add_stretches
from kvmtrace.spans.keys import SUM_LIMIT
from kvmtrace.spans.lanes import MARKS, Step
from kvmtrace.spans.time_parts import N_PARTS, _steps

TIMES = st.one_of(st.integers(0, 40), st.integers(-(1 << 63), (1 << 63) - 1))
LANES = st.lists(st.lists(st.tuples(st.sampled_from(list(Step)[1:]), TIMES, st.booleans()), max_size=25), max_size=4)


def columns_of(lanes):
    """Return (thread, step, ts_ns, suspect) of threads 3, 2 ..., one behind the other."""
    rows = [(len(lanes) - number, *row) for number, thread in enumerate(lanes) for row in thread]
    dtypes = (np.uint16, np.uint8, np.int64, bool)
    return [np.array([row[i] for row in rows], dtype) for i, dtype in enumerate(dtypes)]


@given(LANES)
@settings(max_examples=500, deadline=None)
def test_parts_and_owners(lanes):
    thread, step, _, suspect = columns_of(lanes)
    part, owner = lane_rows.sweep_lanes(thread, step, suspect, _steps())
    wanted = oracle_lanes.sweep_lanes(thread, step, suspect)
    assert part.tolist() == wanted[0].tolist()
    assert owner.tolist() == wanted[1].tolist()


@given(LANES, LANES)
@settings(max_examples=300, deadline=None)
def test_durations_across_pieces(first, second):
    latest, twin = (np.full(8, np.iinfo(np.int64).min, np.int64) for _ in range(2))
    for lanes in (first, second):
        thread, _, ts_ns, _ = columns_of(lanes)
        with np.errstate(over="ignore"):
            wanted = oracle_lanes.step_durations(thread, ts_ns, twin)
        assert lane_rows.step_durations(thread, ts_ns, latest).tolist() == wanted.tolist()
        assert latest.tolist() == twin.tolist()


ROWS = st.tuples(
    st.sampled_from([-1, 0, 1, 5, 6, 7, 99, 1 << 30]), st.integers(0, 2), st.integers(0, 21), st.integers(-3, 3)
)


@given(st.lists(ROWS, max_size=40), st.lists(st.sampled_from([-5, 0, 5, 6, 1 << 30]), max_size=40))
@settings(max_examples=300, deadline=None)
def test_rows_of_lanes(rows, switches):
    tid, kind, step, value = (np.array([row[i] for row in rows], np.int64) for i in range(4))
    switches = np.array(switches[: int((kind == 1).sum())], np.int32)
    columns = tid.astype(np.int32), kind.astype(np.uint16), step.astype(np.uint8), value, value * 3
    loss = (value + 3).astype(np.int32)
    source = lane_rows.LaneSource(*columns, value.astype(np.int16), loss, switches, 1, 1000)
    number = np.zeros(100, np.int32)
    number[[5, 7, 99]] = 1, 2, 3
    wanted = oracle_lanes.lane_rows(source, number, Step.RESUME)
    n, n_new = lane_rows.count_lane_rows(source, number, MARKS)
    unknown = ~np.isin(tid, [5, 7, 99]) & np.isin(step, MARKS)
    assert (n, n_new) == (len(wanted[0]), int(unknown.sum()))
    for with_rows in (False, True):
        made = lane_rows.fill_lane_rows(source, number, n, Step.RESUME, rows=with_rows)
        found = [made.thread, made.step, made.ts_ns, made.arg, made.cpu, made.loss, made.row]
        for one, other in zip(found[: 6 + with_rows], wanted, strict=False):
            assert one.tolist() == other.tolist()
    if n:
        with pytest.raises(ValueError, match="other rows"):
            lane_rows.fill_lane_rows(source, number, n - 1, Step.RESUME, rows=False)


WEIGHTS = st.one_of(st.integers(-50, 50), st.sampled_from([SUM_LIMIT, -SUM_LIMIT, (1 << 63) - 1, -(1 << 63)]))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16])
@given(st.lists(st.tuples(st.integers(0, 6), WEIGHTS), max_size=50))
@settings(max_examples=100, deadline=None)
def test_sums_by_number(dtype, rows):
    numbers, weights = np.array([n for n, _ in rows], dtype), np.array([w for _, w in rows], np.int64)
    for given_weights in (None, weights):
        found, wanted = (np.arange(7) for _ in range(2))
        lane_rows.sum_by_number(numbers, given_weights, found, SUM_LIMIT)
        oracle_lanes.sum_by_number(numbers, given_weights, wanted, SUM_LIMIT)
        assert found.tolist() == wanted.tolist()


@given(st.lists(st.tuples(st.integers(0, 7), WEIGHTS, st.integers(-1, 3), st.integers(-1, 60)), max_size=60))
@settings(max_examples=200, deadline=None)
def test_sums_of_parts(rows):
    part, dur_ns, group, owner = (np.array([row[i] for row in rows], np.int64) for i in range(4))
    part, group = part.astype(np.uint8), group.astype(np.int32)
    owner = np.minimum(owner, len(rows) - 1).astype(np.int32)
    for of in (None, owner):
        found, wanted = (np.zeros((4, N_PARTS), np.int64) for _ in range(2))
        lane_rows.sum_parts(part, dur_ns, group, found, limit=SUM_LIMIT, owner=of)
        oracle_lanes.sum_parts(part, dur_ns, group, wanted, limit=SUM_LIMIT, owner=of)
        assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("number", [-1, 7, 1 << 40, -(1 << 40)])
def test_numbers_that_are_none_are_refused(number):
    with pytest.raises(ValueError, match="none of 7"):
        lane_rows.sum_by_number(np.array([1, number]), None, np.zeros(7, np.int64), SUM_LIMIT)


@pytest.mark.parametrize(("part", "group", "owner"), [(N_PARTS, 0, 0), (0, 4, 0), (0, 0, 2), (0, 0, 1 << 30)])
def test_parts_that_are_none_are_refused(part, group, owner):
    columns = np.array([0, part], np.uint8), np.ones(2, np.int64), np.array([group, 0], np.int32)
    with pytest.raises(ValueError, match="none of those"):
        lane_rows.sum_parts(
            *columns, np.zeros((4, N_PARTS), np.int64), limit=SUM_LIMIT, owner=np.array([0, owner], np.int32)
        )


def test_a_thread_without_a_clock_is_refused():
    with pytest.raises(ValueError, match="without a clock"):
        lane_rows.step_durations(np.array([3], np.uint16), np.array([1]), np.zeros(3, np.int64))


@given(st.lists(st.tuples(st.integers(0, 63), st.booleans()), max_size=80))
@settings(max_examples=200, deadline=None)
def test_positions_by_class(rows):
    cls = np.array([c for c, _ in rows], np.uint8)
    of = np.cumsum([begins for _, begins in rows]).astype(np.int64)
    n_segments = int(of.max(initial=0)) + 1
    order, begin = class_positions.positions_by_class(cls)
    for number in range(64):
        positions = order[begin[number] : begin[number + 1]]
        assert positions.tolist() == np.flatnonzero(cls == number).tolist()
        first, count = class_positions.first_in_segments(of, positions, n_segments)
        assert count.tolist() == np.bincount(of[positions], minlength=n_segments).tolist()
        wanted = [next((p for p in positions.tolist() if of[p] == s), -1) for s in range(n_segments)]
        assert first.tolist() == wanted


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.uint64, "S5", bool, object, (np.uint8, (15,))])
def test_values_of_positions(dtype):
    random = np.random.default_rng(1)
    column = random.integers(0, 2, (20, 15) if isinstance(dtype, tuple) else 20).astype(
        dtype[0] if isinstance(dtype, tuple) else dtype
    )
    place, positions = random.permutation(20), random.integers(0, 20, 30)
    for chosen in (positions, positions[:0], positions[::2]):
        found = class_positions.take_values(column, place, chosen)
        assert found.dtype == column.dtype
        np.testing.assert_array_equal(found, column[place[chosen]])


@pytest.mark.parametrize("position", [-1, 3, 1 << 40])
def test_positions_outside_are_refused(position):
    there = np.array([position])
    with pytest.raises(IndexError):
        class_positions.take_values(np.arange(5), np.array([0, 1, 2]), there)
    with pytest.raises(IndexError):
        class_positions.take_values(np.arange(2), np.array([0, 1, 2]), np.array([2]))
    with pytest.raises(IndexError):
        class_positions.take_values(np.arange(0), np.array([0]), np.array([0]))
    with pytest.raises(IndexError):
        class_positions.first_in_segments(np.array([0, 0, 1]), there, 2)
    with pytest.raises(IndexError):
        class_positions.first_in_segments(np.array([0, 5, 1]), np.array([1]), 2)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=60))
@settings(max_examples=300, deadline=None)
def test_next_entries(rows):
    kind, linked = np.array([k for k, _ in rows], np.uint8), np.array([linked for _, linked in rows], bool)
    wanted = []
    for i in range(len(rows)):
        goes_on, at = linked[i], i + 1
        while goes_on and at < len(rows) and kind[at] not in (0, 1, 2):
            goes_on, at = linked[at], at + 1
        wanted.append(at if goes_on and at < len(rows) and kind[at] == 1 else -1)
    assert class_positions.next_entries(kind, linked, 1, 2).tolist() == wanted


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=60), st.randoms())
@settings(max_examples=200, deadline=None)
def test_steps_and_breaks(rows, random):
    cls, broken = np.array([c for c, _ in rows], np.uint8), np.array([b for _, b in rows], bool)
    order = np.array(random.sample(range(len(rows)), len(rows)), np.int64)
    latest, breaks = class_positions.steps_and_breaks(cls, broken, order, 3)
    number = np.arange(len(rows))
    assert latest.tolist() == np.maximum.accumulate(np.where(cls[order] <= 3, number, -1)).tolist()
    assert breaks.tolist() == np.cumsum(broken[order]).tolist()
    if rows:
        with pytest.raises(IndexError):
            class_positions.steps_and_breaks(cls, broken, np.full(len(rows), len(rows)), 3)
    with pytest.raises(ValueError, match="other events"):
        class_positions.steps_and_breaks(cls, broken, np.append(order, 0), 3)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.lists(st.integers(0, 5), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_consecutive_places(place, positions):
    place, positions = np.array(place), np.array(positions)
    inside = bool((positions < len(place)).all())
    own = place.take(positions, mode="clip")
    wanted = int(own[0]) if inside and (np.diff(own) == 1).all() else -1
    assert class_positions.consecutive_places(place, positions) == wanted


SOME_TIMES = st.one_of(st.integers(0, 40), st.integers(-(1 << 40), 1 << 40))
SOME_LANES = st.lists(
    st.lists(
        st.tuples(st.sampled_from([Step.ENTRY, Step.EXIT, Step.EXIT, Step.PIO]), SOME_TIMES, st.booleans()), max_size=25
    ),
    max_size=4,
)
EDGES = ("edges", "is_exit", "reasons", "handling", "guest", "dur_ns", "sound")


@given(SOME_LANES, st.data())
@settings(max_examples=300, deadline=None)
def test_edges_and_what_is_summed_over_them(lanes, data):
    thread, step, ts_ns, suspect = columns_of(lanes)
    n, small = len(thread), st.integers(0, 9)
    arg, dur_ns, part = (
        np.array(data.draw(st.lists(of, min_size=n, max_size=n)), np.int64) for of in (small, small, small)
    )
    rows = SimpleNamespace(thread=thread, step=step, ts_ns=ts_ns, suspect=suspect & (arg == 9), arg=arg)
    found = edges.pair_edges(rows, Step.EXIT, 7)
    wanted = oracle_lanes.pair_edges(thread, step, rows.suspect, ts_ns, arg, 7)
    for name, column in zip(EDGES, wanted, strict=True):
        assert getattr(found, name).tolist() == column.tolist(), name
    counts, twins = ([np.full(8, 5, np.int64), np.full(8, (1 << 40) - 9, np.int64)] for _ in range(2))
    ours = edges.sum_exits(found, *counts, 1 << 40)
    theirs = oracle_lanes.sum_exits(found, *twins, 1 << 40)
    assert [column.tolist() for column in ours[:2]] == [column.tolist() for column in theirs[:2]]
    assert ours[2] == theirs[2]
    assert [c.tolist() for c in counts] == [t.tolist() for t in twins]
    counted, twin = np.zeros(9, np.int64), np.zeros(9, np.int64)
    moved = data.draw(st.sampled_from([None, np.arange(n, dtype=np.int64) % 3]))
    asked = {"waiting": (2, 5), "moved_ns": moved, "least": data.draw(st.sampled_from([-1, 4, 1 << 62]))}
    swept = thread, part.astype(np.uint8), dur_ns
    ours = edges.slow_exits(found, swept, counted=counted, **asked)
    theirs = oracle_lanes.slow_exits(found, swept, counted=twin, **asked)
    assert [column.tolist() for column in ours] == [column.tolist() for column in theirs]
    assert counted.tolist() == twin.tolist()


def test_edges_that_do_not_fit_are_refused():
    thread, step, ts_ns = np.array([1, 1, 1], np.uint16), np.array([1, 2, 1], np.uint8), np.arange(3)
    rows = SimpleNamespace(thread=thread, step=step, ts_ns=ts_ns, suspect=np.zeros(3, bool), arg=np.full(3, 6))
    found = edges.pair_edges(rows, Step.EXIT, 7)
    with pytest.raises(ValueError, match="none of 6"):
        edges.sum_exits(found, np.zeros(6, np.int64), np.zeros(9, np.int64), 9)
    swept = thread, np.zeros(3, np.uint8), ts_ns
    refused = [  # rows, threads, moved times
        (2, 9, None, "none of the rows'"),
        (3, 1, None, "none of the rows'"),
        (3, 9, np.zeros(2, np.int64), "as many edges"),
    ]
    for n_rows, n_threads, moved, why in refused:
        rows, counted = tuple(column[:n_rows] for column in swept), np.zeros(n_threads, np.int64)
        with pytest.raises(ValueError, match=why):
            edges.slow_exits(found, rows, waiting=(), moved_ns=moved, least=0, counted=counted)


STRETCH_ROWS = st.tuples(
    st.integers(0, 2),
    st.integers(-30, 90) | st.just(1 << 61),
    st.integers(-3, 60) | st.just(1 << 56),
    st.integers(0, 7),
    st.integers(0, 15),
    st.integers(0, 15),
    st.integers(0, 2),
)


BIN_NS = st.sampled_from([1, 7, 1 << 58, 1 << 61])


@given(st.lists(STRETCH_ROWS, max_size=40), BIN_NS, st.sampled_from([4, 60]), st.booleans())
@settings(max_examples=200, deadline=None)
def test_stretches_in_bins(rows, bin_ns, value_bits, leveled):
    thread, begin, dur, part, code, cpu, level = (np.array([row[i] for row in rows], np.int64) for i in range(7))
    stretches = Stretches(thread, begin, dur, part.astype(np.uint8), code, cpu, level if leveled else None)

    def bins():
        return BinArrays(bin_ns, np.zeros((3, 9, 8), np.int64), *(np.full((3, 9), -1, np.int64) for _ in range(3)))

    ours, theirs = bins(), bins()
    add_stretches(stretches, ours, value_bits)
    oracle_lanes.add_stretches(stretches, theirs, value_bits)
    for name in ("part_ns", "longest", "cpu", "level"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), name


@pytest.mark.parametrize(("thread", "part"), [(3, 0), (-1, 0), (0, 8)])
def test_stretches_of_no_bin_are_refused(thread, part):
    one = np.ones(1, np.int64)
    bins = BinArrays(9, np.zeros((3, 9, 8), np.int64), *(np.full((3, 9), -1, np.int64) for _ in range(3)))
    with pytest.raises(ValueError, match="none of the bins"):
        add_stretches(Stretches(one * thread, one, one, np.array([part], np.uint8), one, one, None), bins, 4)
