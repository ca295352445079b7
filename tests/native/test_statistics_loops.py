"""The compiled loop of perf's tables gives what its twin gives, and takes nothing that does not fit."""

from __future__ import annotations

import numpy as np
import oracle_statistics
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtrace._native.perf_tables import (
    ENTERS,
    ENTRY,
    EXIT,
    KEY_ONLY,
    LEAVES,
    MMIO_READ,
    MMIO_WRITE,
    MSR,
    PIO,
    TABLES,
    PerfKind,
    PerfTables,
)

MAX_TID, MAX_THREADS = 30, 5
# kind -> what its events are, the table of their keys
KINDS = {0: (ENTRY, ""), 1: (EXIT, "vmexit"), 2: (PIO, "ioport"), 3: (MSR, "msr"), 4: (KEY_ONLY, "mmio")}
ROWS = st.tuples(
    st.integers(-2, 4) | st.just(1 << 52),
    st.sampled_from([-1, 0, 1, 2, 3, MAX_TID, MAX_TID + 1, 4, 5, 6]),
    st.integers(0, 6),
    st.integers(0, 3) | st.integers(0, 2**64 - 1),
    st.sampled_from([KEY_ONLY, MMIO_READ, MMIO_WRITE]),
)


OF_GUEST_MODE = {0: (ENTERS, ""), 1: (LEAVES, "vmexit")}


def columns(rows, clock, of=KINDS):
    """Return what PerfTables.take wants of rows (time since the last one, thread, kind, key, what an MMIO event is)."""
    later, tid, kind, key, what = zip(*rows, strict=True) if rows else ((),) * 5
    ts_ns = np.array([clock, *later], np.int64).cumsum()[1:]
    kind, key, what = np.array(kind, np.uint16), np.array(key, np.uint64), np.array(what, np.uint8)
    kinds = {}
    for number, (is_what, table) in of.items():
        own = kind == number
        kinds[number] = PerfKind(is_what, table, key[own] if table else key[:0], what[own] if number == 4 else None)
    return ts_ns, np.array(tid, np.int32), kind, 7, kinds


@given(
    st.lists(st.lists(ROWS, max_size=120), max_size=4),
    st.sampled_from([0, 1000]),
    st.sampled_from([KINDS, OF_GUEST_MODE]),
)
@settings(max_examples=300, deadline=None)
def test_perfs_tables(pieces, clock, of_what):
    compiled, plain = (of(MAX_TID, MAX_THREADS) for of in (PerfTables, oracle_statistics.PerfTables))
    for piece in pieces:
        given_columns = columns(piece, clock, of_what)
        clock = int(given_columns[0][-1]) if piece else clock
        compiled.take(*given_columns)
        plain.take(*given_columns)
    for table in TABLES:
        assert compiled.keys(table) == plain.keys(table)
        for ours, theirs in zip(compiled.sums(table).tolist(), plain.sums(table), strict=True):
            assert ours[:4] == theirs[:4]
            assert ours[4:] == pytest.approx(theirs[4:], rel=1e-9, abs=1e-3 * (1 + theirs[3]) ** 2 * 1e-9)


def test_sums_are_the_same_however_the_rows_are_cut():
    rng = np.random.default_rng(3)
    rows = [(int(rng.integers(0, 900)), 1, i % 2, int(rng.integers(0, 200)), KEY_ONLY) for i in range(4000)]
    whole, pieces, clock = PerfTables(9, 9), PerfTables(9, 9), 5
    whole.take(*columns(rows, clock))
    for begin in range(0, len(rows), 123):
        part = columns(rows[begin : begin + 123], clock)
        clock = int(part[0][-1])
        pieces.take(*part)
    assert whole.sums("vmexit").tolist() == pieces.sums("vmexit").tolist()
    assert len(whole.keys("vmexit")) > 100


def test_guest_mode_is_measured_from_entry_to_exit():
    tables = PerfTables(9, 9)
    rows = [(10, 1, 1, 7, 0), (10, 1, 0, 0, 0), (5, 1, 1, 7, 0), (9, 1, 1, 7, 0), (1, 1, 0, 0, 0), (4, 1, 1, 8, 0)]
    tables.take(*columns(rows, 100, OF_GUEST_MODE))
    assert tables.keys("vmexit") == [7, 8]
    assert [row[:4] for row in tables.sums("vmexit").tolist()] == [(1, 5, 5, 5), (1, 4, 4, 4)]


@pytest.mark.parametrize("n_kinds", [1, 2])
def test_rows_that_do_not_fit_are_refused(n_kinds):
    ts_ns, tid, kind = np.arange(3), np.ones(3, np.int32), np.array([0, 1, 1], np.uint16)
    kinds = {0: PerfKind(ENTRY)} | ({1: PerfKind(EXIT, "vmexit", np.zeros(1, np.uint64))} if n_kinds == 2 else {})
    with pytest.raises(ValueError, match="a row of no kind, or without a key"):
        PerfTables(9, 9).take(ts_ns, tid, kind, n_kinds, kinds)
    one_of_two = PerfKind(EXIT, "vmexit", np.zeros(2, np.uint64), np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="as many keys as events"):
        PerfTables(9, 9).take(ts_ns, tid, kind, 2, {1: one_of_two})
