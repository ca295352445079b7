"""The building blocks: dense keys, exact sums, quantiles, moments, rates."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from kvmtrace.spans.keys import Counter, KeyIndex
from kvmtrace.stats.durations import Samples, log2_histogram, nearest_rank, summarise
from kvmtrace.stats.injections import disassemble
from kvmtrace.stats.rate import MAX_BINS, RateAccumulator

from .tables import make_table


@pytest.mark.parametrize("n_distinct", [1, 7, 5000, 60_000])
def test_key_numbers_are_dense_stable_and_in_order_of_appearance(n_distinct: int) -> None:
    rng = np.random.default_rng(n_distinct)
    keys = rng.integers(0, 2**63, n_distinct, dtype=np.uint64) * np.uint64(2)
    values = keys[rng.integers(0, n_distinct, 100_000)]
    index = KeyIndex()
    ids = np.concatenate([index.encode(part) for part in np.split(values, [10, 50_000])])
    assert (np.array(index.keys(), np.uint64)[ids] == values).all()
    first = {}
    for number in ids.tolist():
        first.setdefault(number, len(first))
    assert all(number == order for number, order in first.items())
    assert len(index) == len(first)


def test_negative_keys_are_taken_modulo_2_64() -> None:
    index = KeyIndex()
    assert index.encode(np.array([-1, 5, -1], np.int64)).tolist() == [0, 1, 0]
    assert index.keys() == [2**64 - 1, 5]


def test_no_keys() -> None:
    index = KeyIndex()
    assert len(index.encode(np.empty(0, np.uint64))) == 0
    assert index.keys() == []


def test_sums_are_exact_integers() -> None:
    counter = Counter()
    for _ in range(3):
        counter.add(np.array([2, 2, 40]), np.array([2**51 + 1, 1, 7]))
    assert (counter[2], counter[40], counter[0], counter[10_000]) == (3 * (2**51 + 2), 21, 0, 0)


@pytest.mark.parametrize("seed", range(5))
def test_summary_against_the_standard_library(seed: int) -> None:
    rng = random.Random(seed)
    values = [rng.choice([0, 5, rng.randrange(10**6), rng.randrange(10**11)]) for _ in range(rng.randrange(2, 500))]
    summary = summarise(np.array(values, np.int64))
    assert (summary.samples, summary.total_ns) == (len(values), sum(values))
    assert (summary.min_ns, summary.max_ns) == (min(values), max(values))
    ordered = sorted(values)
    for percent, found in ((50, summary.p50_ns), (90, summary.p90_ns), (99, summary.p99_ns), (99.9, summary.p999_ns)):
        assert found == ordered[max(math.ceil(len(values) * percent / 100) - 1, 0)]
    expected = 100 * statistics.stdev(values) / math.sqrt(len(values)) / statistics.mean(values)
    assert summary.rel_stderr == pytest.approx(expected, abs=1e-5)
    assert sum(summary.histogram) == len(values)


def test_one_sample_has_no_error() -> None:
    assert summarise(np.array([7])).rel_stderr == 0.0
    assert summarise(np.array([], np.int64)).total_ns is None


def test_nearest_rank_is_a_value_that_occurred() -> None:
    assert [nearest_rank(np.array([1, 2, 3, 4]), p) for p in (0, 25, 26, 50, 100)] == [1, 1, 2, 2, 4]


def test_histogram_buckets_are_powers_of_two() -> None:
    assert log2_histogram(np.array([0, 1, 2, 3, 4, 1024])) == (2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 1)


def test_samples_longer_than_four_seconds_and_many_groups() -> None:
    samples = Samples()
    samples.add(np.array([1, 70_000, 1]), np.array([5, 2**40, 7]))
    samples.add(np.array([1]), np.array([9]))
    assert {group: part.tolist() for group, part in samples.grouped().items()} == {1: [5, 7, 9], 70_000: [2**40]}


@pytest.mark.parametrize("seed", range(10))
def test_rates_count_every_exit_in_its_bin(seed: int) -> None:
    rng = random.Random(seed)
    times = sorted(rng.randrange(10 ** rng.choice([4, 7, 10])) for _ in range(300))
    rng.shuffle(times)
    rates = RateAccumulator()
    for start in range(0, 300, 60):
        rates.feed(make_table([(ts, 0, 5, "kvm_exit") for ts in times[start : start + 60]]))
    rate = rates.finish()
    assert rate is not None
    assert len(rate.exits) <= MAX_BINS
    for i, count in enumerate(rate.exits):
        low = rate.start_ns + i * rate.bin_ns
        assert count == sum(low <= ts < low + rate.bin_ns for ts in times)


@pytest.mark.parametrize(
    ("insn", "bits", "text"),
    [
        (b"\x0f\xa2", 64, "cpuid"),
        (b"\x66\xa3\x00\x90", 16, "mov [0x9000],eax"),
        (b"\x06", 64, "(bad)"),
        (b"", 64, "(bad)"),
    ],
)
def test_disassembly(insn: bytes, bits: int, text: str) -> None:
    assert disassemble(insn, bits) == text
