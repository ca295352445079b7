"""Bins that double: the same sums as bins made afterwards, whatever the pieces and however many threads."""

from __future__ import annotations

import numpy as np
import pytest

from kvmtrace.spans.doings import FOLLOW_UP_DTYPE, SEGMENT_DTYPE, Doings
from kvmtrace.spans.thread_store import ThreadStore
from kvmtrace.spans.time_bins import FEWEST_BINS, THREAD_BINS, TimeBins, code_of
from kvmtrace.spans.time_parts import N_PARTS


def segments(seed: int, n: int, longest: int) -> np.ndarray:
    """Return segments of one thread, one behind the other."""
    random = np.random.default_rng(seed)
    made = np.zeros(n, SEGMENT_DTYPE)
    made["dur_ns"] = random.integers(0, longest, n)
    made["ts_ns"] = np.cumsum(made["dur_ns"]) - made["dur_ns"]
    made["part"] = random.integers(0, N_PARTS, n)
    made["reason"] = random.integers(-1, 9, n)
    made["cpu"] = random.integers(0, 4, n)
    made["rip"] = random.integers(-1, 2, n)
    return made


def doings(threads: list[int], rows: list[np.ndarray]) -> Doings:
    thread = np.repeat(np.array(threads, np.uint16), [len(one) for one in rows])
    return Doings(thread, np.concatenate(rows), np.empty(0, np.uint16), np.empty(0, FOLLOW_UP_DTYPE))


def expected(rows: np.ndarray, bin_ns: int, n: int) -> np.ndarray:
    """Return the time of each part in each bin, segment by segment."""
    sums = np.zeros((n, N_PARTS), np.int64)
    for row in rows:
        begin, end = int(row["ts_ns"]), int(row["ts_ns"] + row["dur_ns"])
        for where in range(begin // bin_ns, (end - 1) // bin_ns + 1 if end > begin else 0):
            sums[where, row["part"]] += min(end, (where + 1) * bin_ns) - max(begin, where * bin_ns)
    return sums


@pytest.mark.parametrize("pieces", [1, 3, 40])
def test_pieces_do_not_matter(pieces: int) -> None:
    rows = segments(1, 400, 300_000)
    bins = TimeBins()
    for piece in np.array_split(rows, pieces):
        bins.feed(doings([0], [piece]))
    end = int(rows["ts_ns"][-1] + rows["dur_ns"][-1])
    made = bins.of(0, end)
    assert made is not None
    assert THREAD_BINS // 2 < len(made.part_ns) <= THREAD_BINS
    assert (made.part_ns == expected(rows, bins.bin_ns, len(made.part_ns))).all()
    assert made.exits.sum() == (rows["rip"] >= 0).sum()


def test_the_longest_gives_a_bin_its_name() -> None:
    rows = segments(2, 3, 10)
    rows["ts_ns"], rows["dur_ns"] = [0, 10, 90], [10, 80, 10]
    bins = TimeBins(0, 100, 1)
    bins.feed(doings([0], [rows]))
    made = bins.of(0, 100)
    assert made is not None
    assert made.code.tolist() == [code_of(rows)[1]]
    assert made.cpu.tolist() == [rows["cpu"][1]]


def test_many_threads_have_fewer_bins_each_and_the_same_sums() -> None:
    bins, rows = TimeBins(), segments(3, 50, 5_000)
    bins.feed(doings([0], [rows]))
    bins.feed(doings(list(range(1, 3000)), [rows] * 2999))
    for thread in (0, 1, 2999):
        made = bins.of(thread, 1 << 62)
        assert made is not None
        assert len(made.part_ns) == FEWEST_BINS
        assert made.part_ns.sum() == rows["dur_ns"].sum()
    assert bins.of(5000, 100) is None


def test_a_stretch_cuts_what_reaches_out_of_it() -> None:
    rows = segments(4, 200, 1_000)
    bins = TimeBins(20_000, 30_000, 10)
    bins.feed(doings([0], [rows]))
    made = bins.of(0, 30_000)
    assert made is not None
    assert made.part_ns.sum(axis=1).tolist() == [1000] * 10


def test_the_longest_times_do_not_overflow() -> None:
    rows = segments(5, 2, 10)
    rows["ts_ns"], rows["dur_ns"] = [0, 1 << 60], [1 << 60, 1 << 60]
    bins = TimeBins()
    bins.feed(doings([0], [rows]))
    made = bins.of(0, 1 << 61)
    assert made is not None
    assert int(made.part_ns.sum()) == 1 << 61


def test_a_store_gives_back_what_lies_between_two_times() -> None:
    rows, store = segments(6, 1000, 50), ThreadStore(SEGMENT_DTYPE)
    for piece in np.array_split(rows, 7):
        both = np.concatenate([piece, piece])
        thread = np.repeat(np.array([3, 8], np.uint16), len(piece))
        store.add(thread, both, both["rip"] >= 0)
    assert store.threads() == [3, 8]
    assert store.counted(8) == (rows["rip"] >= 0).sum()
    begin, end = int(rows["ts_ns"][300]) + 1, int(rows["ts_ns"][700])
    found = store.between(8, begin, end)
    inside = rows[(rows["ts_ns"] + rows["dur_ns"] > begin) & (rows["ts_ns"] <= end)]
    assert set(inside["ts_ns"].tolist()) <= set(found["ts_ns"].tolist())
    assert len(found) <= len(inside) + 14
    assert store.count_between(8, begin, end) == len(found)
    assert (store.between(3, 0, 1 << 62) == rows).all()
    assert store.last(3) == rows[-1]
    assert len(store.between(5, 0, 100)) == 0
