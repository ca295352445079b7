"""perf.data's records are found one after the other, whatever the bytes are."""

from __future__ import annotations

import struct

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from writers.perf_data import LOST, SAMPLE, finished_round, record, sample

from kvmtrace._native.perf_samples import PerfSamples, fresh, read_perf_records

SAMPLES = PerfSamples(np.array([[1, -1, 2, -1]]), np.empty(0, np.uint64), np.empty(0, np.int32))


def single_walk(words: np.ndarray, last: int) -> tuple[list[int], int, int, bool]:
    at, others, samples = 0, [], 0
    while at < last:
        size = int(words[at]) >> 48
        if size < 8 or size % 8 or at + size // 8 > len(words):
            return others, samples, at, False
        if int(words[at]) & 0xFFFFFFFF == SAMPLE:
            samples += size > 16  # there is room for raw data
        else:
            others.append(at)
        at += size // 8
    return others, samples, at, True


def check(data: bytes, last: int | None = None):
    words = np.frombuffer(data, "<u8", len(data) // 8)
    last = last or len(words)
    got = read_perf_records(words, (0, last, len(words)), SAMPLES, None, fresh(np.dtype(np.uint32)))
    assert (got.others.tolist(), len(got.cpu), got.stop, got.sound) == single_walk(words, last)


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
