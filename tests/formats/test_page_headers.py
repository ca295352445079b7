"""Flipped bits in the headers of ring-buffer pages: which are found, which cannot be; health raises no alarm."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from writers.packing import unpacked
from writers.ring_buffer import event, page, record
from writers.trace_dat import TraceDatWriter

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.formats.trace_dat.page_checks import END_OF_TIME, SLACK, check_stamps
from kvmtrace.formats.trace_dat.ring_buffer import as_words, decode_pages, read_page_headers
from kvmtrace.formats.trace_dat.trace_dat_layout import read_trace_dat
from kvmtrace.table.format_text import PageLayout

FIXTURES = Path(__file__).parents[2] / "fixtures"
PAGE = 4096
TIME, COMMIT = 0, 64  # bit numbers in the page header: u64 time stamp, u64 commit word
MISSED_STORED, MISSED = COMMIT + 30, COMMIT + 31
# what a flipped bit of a page between others does
FOUND = (*range(TIME + 32, COMMIT), *range(COMMIT, COMMIT + 27), MISSED_STORED, MISSED)
HARMLESS = (*range(COMMIT + 27, MISSED_STORED), *range(MISSED + 1, COMMIT + 64))  # bits without a meaning
# nothing contradicts a page that begins some microseconds earlier or later; between, the neighbours' distance decides
UNDETECTABLE = range(TIME, TIME + 16)


def columns(table) -> tuple[bytes, ...]:
    return tuple(getattr(table, name).tobytes() for name in ("ts_ns", "cpu", "tid", "kind"))


class Flipper:
    """A fixture whose bits can be flipped."""

    def __init__(self, name: str, folder: Path) -> None:
        self.data = unpacked(FIXTURES / f"{name}.dat")
        self.path = folder / "flipped.dat"
        self.whole = columns(open_recording(FIXTURES / f"{name}.dat").events())
        trace = read_trace_dat(memoryview(self.data), name)
        self.pages = [
            cpu.offset + at
            for buffer in trace.buffers
            for cpu in buffer.cpus
            for at in range(PAGE, cpu.size - PAGE, PAGE)
        ]  # not a CPU's first or last

    def flip(self, at: int, bit: int) -> str:
        data = bytearray(self.data)
        data[at + bit // 8] ^= 1 << bit % 8
        self.path.write_bytes(data)
        recording = open_recording(self.path)
        same = columns(recording.events()) == self.whole
        if recording.loss.damage or recording.loss.events != 0:
            return "stated"
        return "harmless" if same else "silent"


@pytest.fixture(scope="module", params=["svm-6.1-smp", "vmx-6.12-lifecycle", "vmx-6.1-storm"])
def flipper(request, tmp_path_factory):
    return Flipper(request.param, tmp_path_factory.mktemp("flips"))


def outcomes(flipper: Flipper, bits) -> Counter[str]:
    pages = random.Random(1).sample(flipper.pages, 2)
    return Counter(flipper.flip(at, bit) for at in pages for bit in bits)


def test_flips_that_are_found(flipper):
    assert set(outcomes(flipper, FOUND)) == {"stated"}


def test_flips_without_a_meaning(flipper):
    assert set(outcomes(flipper, HARMLESS)) == {"harmless"}


def test_flips_that_nothing_contradicts(flipper):
    assert set(outcomes(flipper, UNDETECTABLE)) == {"silent"}


def test_a_flipped_time_stamp_costs_its_page_and_moves_nothing_else(flipper):
    at = flipper.pages[len(flipper.pages) // 2]
    assert flipper.flip(at, 45) == "stated"
    recording = open_recording(flipper.path)
    table, whole = recording.events(), np.frombuffer(flipper.whole[0], np.int64)
    names = np.array([kind.name for kind in table.kinds])[table.kind]
    left = table.ts_ns[names != "lost_events"]
    assert len(whole) * 0.5 < len(left) < len(whole)
    assert not Counter(left.tolist()) - Counter(whole.tolist())
    assert (np.diff(table.ts_ns) >= 0).all()
    assert [damage.offset for damage in recording.loss.damage] == [at]
    assert not check_recording(recording).n_violations


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.dat")), ids=lambda path: path.stem)
def test_health_raises_no_alarm(path):
    recording = open_recording(path)
    recording.events()
    assert not recording.loss.damage


def checks(*ts: int, **more):
    stamps = np.array(ts, np.uint64)
    found = check_stamps(stamps, np.ones(len(ts), np.bool_), **({"ordered": True, "padded": False} | more))
    return np.flatnonzero(found.misdated).tolist()


T = 10 * SLACK


@pytest.mark.parametrize(
    ("ts", "wrong"),
    [
        ([], []),
        ([T], []),
        ([T, T, T], []),
        ([T, 2 * T, 3 * T], []),
        ([T, 2 * T, 2 * T - SLACK, 3 * T], []),  # as far as "mono" may step back
        ([T, 50 * T, 3 * T, 4 * T], [1]),
        ([3 * T, 4 * T, T, 5 * T], [2]),
        ([9 * T, 2 * T, 3 * T], [0]),
        ([T, 2 * T, 0], [2]),
        ([T, 3 * T, 2 * T, 4 * T], [1, 2]),  # either may be wrong
        ([T, END_OF_TIME, 2 * T, 3 * T], [1]),
        ([9 * T, T], [0, 1]),
    ],
)
def test_which_of_the_neighbours_is_wrong(ts, wrong):
    assert checks(*ts) == wrong
    assert checks(*ts, ordered=False) == []


def test_nothing_is_further_away_than_the_recording_took():
    assert checks(T, 2 * T, 3 * T, 1 << 60, duration_ns=5 * T) == [3]
    assert checks(1, 1 << 60, (1 << 60) + 1, (1 << 60) + 2, duration_ns=5) == [0]
    assert checks(1, 1 << 60, (1 << 60) + 1, (1 << 60) + 2, duration_ns=-5.0) == []
    assert checks(T, 1 << 60, duration_ns=5) == []  # nobody knows which


def test_a_clock_that_may_step_back_raises_no_alarm(tmp_path):
    pages = b"".join(page(ts, [record(event(10, bytes(16)), 7)] * 3) for ts in (90 * T, 5 * T, 7 * T, 6 * T))
    for clock, damaged in (("local", 0), ("x86-tsc", 0), ("mono", 3)):
        path = tmp_path / f"{clock}.dat"
        path.write_bytes(TraceDatWriter([pages], clock=clock).v6())
        recording = open_recording(path)
        recording.events()
        assert len(recording.loss.damage) == damaged, clock


def test_a_page_without_records_where_its_length_says_some_are(tmp_path):
    """A commit word that is too large takes the zeros behind the records for records."""
    whole = bytearray(page(T, [record(event(10, bytes(16)), 7)] * 3))
    whole[8] += 24
    path = tmp_path / "long.dat"
    path.write_bytes(TraceDatWriter([bytes(whole)]).v6())
    recording = open_recording(path)
    assert recording.events().count("lost_events") == 1
    assert len(recording.events()) == 4
    assert "a record of at least 8 bytes" in recording.loss.damage[0].expected


def test_a_wrong_record_length_is_found_at_the_next_event_that_is_none(flipper):
    """Flipped bits of lengths: what is stated invents no violation; the rest reads on as if nothing had been."""
    rng = random.Random(4)
    layout = PageLayout()
    words = as_words(flipper.data)
    stated = 0
    for at in rng.sample(flipper.pages, 3):
        pages = np.array([at // 4])
        found = decode_pages(words, pages, read_page_headers(words, pages, layout), layout)
        header = 4 * int(found.start[len(found.start) // 2]) - 4
        for bit in range(5):
            if flipper.flip(header, bit) == "stated":
                stated += 1
                assert not check_recording(open_recording(flipper.path)).n_violations
    assert stated >= 10


def test_an_event_that_the_recording_does_not_describe(tmp_path):
    """In a recording of our own it is damage, and so may be the event before; others record such events."""
    records = [record(event(number, bytes(16)), 7) for number in (10, 10, 10, 999, 10)]
    path = tmp_path / "unknown.dat"
    for meta, n_rows, n_damage in (({"schema": "kvmtrace.capture/1"}, 3, 1), (None, 5, 0)):
        path.write_bytes(TraceDatWriter([page(T, records)], meta=meta).v6())
        recording = open_recording(path)
        assert (len(recording.events()), len(recording.loss.damage)) == (n_rows, n_damage)
        assert recording.events().count("lost_events") == n_damage
