"""The many walkers over perf records give what a single walk gives, whatever the bytes are."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from writers.perf_data import LOST, SAMPLE, finished_round, record, sample

from kvmtrace.formats.perf_data import perf_records
from kvmtrace.formats.perf_data.perf_records import walk_records

IDS = np.array([1, 2], np.uint64)


def single_walk(words: np.ndarray, last: int) -> tuple[list[int], bool]:
    at, out = 0, []
    while at < last:
        size = int(words[at]) >> 48
        if size < 8 or size % 8 or at + size // 8 > len(words):
            return out, False
        out.append(at)
        at += size // 8
    return out, True


@pytest.fixture(autouse=True)
def small_lanes(monkeypatch):
    monkeypatch.setattr(perf_records, "LANE_WORDS", 64)
    monkeypatch.setattr(perf_records, "LOOK_WORDS", 32)


def check(data: bytes, last: int | None = None):
    words = np.frombuffer(data, "<u8", len(data) // 8)
    got = walk_records(words, 0, last or len(words), IDS, len(words))
    assert (got.at.tolist(), got.sound) == single_walk(words, last or len(words))


def test_plain_samples():
    check(b"".join(sample(i, bytes(20 + i % 50)) for i in range(500)))


def test_payloads_that_look_like_samples():
    decoy = struct.pack("<IHHQ", SAMPLE, 0, 64, 1) * 9
    check(b"".join(sample(i, decoy[i % 8 :]) for i in range(300)))
    check(b"".join(sample(i, bytes(4) + decoy) for i in range(300)))


def test_a_record_that_cannot_be_ends_the_walk():
    good = b"".join(sample(i, bytes(40)) for i in range(200))
    for size in (0, 4, 12, 0xFFF8):
        check(good + struct.pack("<IHH", SAMPLE, 0, size) + good)


def test_an_end_within_a_record():
    data = b"".join(sample(i, bytes(40)) for i in range(100))
    for cut in range(len(data) - 200, len(data), 8):
        check(data[:cut])


def test_a_limit_within_a_record_takes_in_that_record():
    data = b"".join(sample(i, bytes(40)) for i in range(100))
    for last in (1, 2, 11, 12, 500, 501, 502):
        check(data, last)


bodies = st.one_of(st.binary(max_size=120), st.just(struct.pack("<IHHQ", SAMPLE, 0, 64, 1) * 4))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(bodies.map(lambda b: sample(1, b)), bodies.map(lambda b: record(LOST, b)), st.just(finished_round())),
        max_size=80,
    ),
    st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), max_size=4),
)
def test_equals_a_single_walk_even_over_damage(records, changes):
    data = bytearray(b"".join(records))
    for at, value in changes:
        if at < len(data):
            data[at] = value
    check(bytes(data))
