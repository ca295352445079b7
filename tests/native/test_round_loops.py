"""Rounds and the numbers of their contents: as a dictionary of their bytes gives them, for any sequence of events."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtrace._native import key_numbers, round_numbers
from kvmtrace._native.round_numbers import Cut, RoundEvents, RoundNumbers

ENTRY, LONGEST = 3, 6
EVENTS = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 3, 63]), st.integers(0, 3), st.integers(0, 9), st.integers(0, 19)), max_size=80
)
SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 40]), max_size=3)


def made(events) -> RoundEvents:
    """Return events: class, place among its column, and what is odd, first or repeated of about one in ten."""
    cls, place, luck, odd = (
        (np.array(column, np.int64) for column in zip(*events, strict=True)) if events else [np.zeros(0, np.int64)] * 4
    )
    first = luck == 0
    first[:1] = True
    return RoundEvents(cls.astype(np.uint8), first, first & (odd % 2 == 1), odd == 0, place)


def columns_of(sizes, seed: int) -> dict[int, list[np.ndarray]]:
    """Return columns of a few different values for classes 1 and 3."""
    rng = np.random.default_rng(seed)
    few = [rng.integers(0, 2, (4, size)).astype(np.uint8) for size in sizes]
    return {1: few, 3: [column.view(f"V{column.shape[1]}").reshape(-1) for column in few[:1]]}


def twin(events: RoundEvents, columns, known: dict[bytes, int], most: int) -> Cut:
    """Return what RoundNumbers.number gives, byte for byte."""
    n, found = len(events.cls), []
    bounds = [i for i in range(n) if events.cls[i] == ENTRY or events.first[i]]
    for i, j in zip(bounds, [*bounds, n][1:], strict=True):
        closed = j < n and not events.first[j]
        opened = events.cls[i] == ENTRY and (not events.first[i] or events.repeated[i])
        if j - i == 1 and not closed and opened:
            continue
        number = -1
        if opened and closed and j - i <= LONGEST and not events.odd[i + 1 : j + 1].any():
            content = b"".join(
                bytes([events.cls[at]])
                + b"".join(column[events.place[at]].tobytes() for column in columns.get(int(events.cls[at]), ()))
                for at in range(i, j + 1)
            )
            if content in known or len(known) < most:
                number = known.setdefault(content, len(known))
        found.append((i, j + closed, number))
    start, stop, number = (list(column) for column in zip(*found, strict=True)) if found else ([], [], [])
    return Cut(np.array(start, np.int64), np.array(stop, np.int64), np.array(number, np.int32))


def assert_same(one: Cut, other: Cut) -> None:
    for name in ("start", "stop", "number"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)
        assert getattr(one, name).dtype == getattr(other, name).dtype


@given(st.lists(EVENTS, max_size=4), SIZES, st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 1000]))
@settings(max_examples=400, deadline=None)
def test_as_a_dictionary_numbers_them(parts, sizes, seed, most):
    numbers, known = RoundNumbers(most, 1 << 16), {}
    for part in parts:
        events, columns = made(part), columns_of(sizes, seed)
        assert_same(numbers.number(events, columns, ENTRY, LONGEST), twin(events, columns, known, most))
    assert len(numbers) == len(known)
    numbers.clear()
    assert len(numbers) == 0


@given(EVENTS, SIZES, st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_where_there_is_no_room_no_content_gets_a_number(part, sizes, n_bytes):
    numbers = RoundNumbers(1000, n_bytes)
    events, columns = made(part), columns_of(sizes, 1)
    got, all_of = numbers.number(events, columns, ENTRY, LONGEST), twin(events, columns, {}, 1000)
    np.testing.assert_array_equal(got.start, all_of.start)
    told = got.number >= 0
    assert not (told & (all_of.number < 0)).any()
    pairs = set(zip(got.number[told].tolist(), all_of.number[told].tolist(), strict=True))
    assert len({one for one, _ in pairs}) == len({other for _, other in pairs}) == len(pairs)


def test_contents_of_one_hash_are_told_apart_or_have_no_number(monkeypatch):
    """The table never takes one content for another; a file that makes many collide only makes the check slower."""
    monkeypatch.setattr(round_numbers, "SEED", 0)
    events = [(3, i % 4, 5, 9) for i in range(200)]
    numbers = RoundNumbers(2, 1 << 12)
    got = numbers.number(made(events), {3: [np.arange(4)]}, ENTRY, LONGEST)
    assert set(got.number.tolist()) == {0, 1, -1}
    assert key_numbers.SEED != 0


@pytest.mark.parametrize("place", [-1, 4, 1 << 40, -(1 << 62)])
def test_a_place_outside_of_its_column(place):
    events = made([(3, 0, 5, 9), (1, 0, 5, 9), (3, 0, 5, 9)])
    events.place[1] = place
    with pytest.raises(IndexError):
        RoundNumbers(8, 1000).number(events, {1: [np.zeros(4, np.int64)]}, ENTRY, LONGEST)
    empty = RoundNumbers(8, 1000).number(events, {1: [np.zeros((4, 0), np.uint8)]}, ENTRY, LONGEST)
    assert empty.number.tolist() == [0]  # no bytes, no place


def test_positions():
    cut = Cut(np.array([2, 9]), np.array([5, 10]), np.array([0, 1], np.int32))
    assert cut.positions.tolist() == [2, 3, 4, 9]
    assert cut.begins.tolist() == [0, 3]
    assert cut.length.tolist() == [3, 1]
