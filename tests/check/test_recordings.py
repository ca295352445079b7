"""A/A comparisons stay silent, real changes are found, and the numbers are what they say."""

from __future__ import annotations

import numpy as np
import pytest

from kvmtrace.ab.recordings import Key, RunSamples, Samples, compare_runs

CPUID = Key("vm_exit", 1, 10, "kernel")
PIO = Key("vm_exit", 1, 30, "userspace")


def drifting(rng: np.random.Generator, n: int, median_ns: float) -> np.ndarray:
    """Latencies as real ones are: skewed, with slow drift, so that neighbours resemble each other."""
    drift = np.cumsum(rng.normal(0, 0.002, n))
    return (median_ns * np.exp(rng.normal(0, 0.3, n) + drift - drift.mean())).astype(np.int64)


def run(rng: np.random.Generator, n: int = 2000, factor: float = 1.0, pio: int = 500) -> RunSamples:
    samples = {}
    for key, count, median in ((CPUID, n, 1200.0 * factor), (PIO, pio, 9000.0)):
        stamps = np.sort(rng.integers(0, 10**9, count))
        samples[key] = Samples(stamps, drifting(rng, count, median))
    return RunSamples(
        "run",
        0,
        10**9,
        6 * 10**8,
        samples,
        {"guest_ns": 6 * 10**8, "handler_ns": 4 * 10**8},
        {("G", "kvm_exit", "H"): n},
    )


@pytest.mark.parametrize("n_runs", [1, 4])
def test_a_a_comparisons_are_silent(n_runs: int) -> None:
    rng = np.random.default_rng(7)
    trials = [compare_runs([run(rng) for _ in range(n_runs)], [run(rng) for _ in range(n_runs)]) for _ in range(40)]
    assert sum(bool(trial.significant) for trial in trials) <= 2


# a single run per side cannot tell drift from change: there only a large change is called one
@pytest.mark.parametrize(("n_runs", "factor"), [(1, 1.5), (4, 1.12)])
def test_slower_on_one_reason_is_found_and_only_there(n_runs: int, factor: float) -> None:
    rng = np.random.default_rng(11)
    result = compare_runs([run(rng) for _ in range(n_runs)], [run(rng, factor=factor) for _ in range(n_runs)])
    assert result.regressed
    assert {change.key for change in result.significant} == {CPUID}
    p50 = next(change for change in result.significant if change.metric == "p50")
    assert p50.low <= factor <= p50.high


def test_small_changes_between_single_runs_are_not_called_so_unless_asked() -> None:
    rng = np.random.default_rng(12)
    base, new = run(rng), run(rng, factor=1.12)
    assert not compare_runs([base], [new]).significant
    assert compare_runs([base], [new], min_effect=0.05).significant


def test_same_run_on_both_sides_has_ratio_one() -> None:
    one = run(np.random.default_rng(3))
    result = compare_runs([one], [one])
    assert {change.ratio for change in result.changes} == {1.0}
    assert not result.significant


def test_a_reason_that_appears_is_a_change() -> None:
    rng = np.random.default_rng(5)
    base, new = run(rng), run(rng)
    without = RunSamples(base.name, 0, base.wall_ns, base.guest_ns, {CPUID: base.samples[CPUID]}, {}, {})
    result = compare_runs([without], [new])
    rate = next(change for change in result.changes if change.key == PIO)
    assert rate.metric == "rate"
    assert rate.base == 0
    assert rate.significant


def test_more_exits_per_second_is_found() -> None:
    rng = np.random.default_rng(6)
    result = compare_runs([run(rng, n=2000)], [run(rng, n=2600)])
    assert [(c.key, c.metric) for c in result.significant] == [(CPUID, "rate")]


def test_few_samples_are_named_not_tested() -> None:
    rng = np.random.default_rng(8)
    result = compare_runs([run(rng, pio=20)], [run(rng, pio=21)])
    assert result.untested == (PIO,)
    assert all(change.key == CPUID for change in result.changes)


def test_transitions_that_vanish_and_appear() -> None:
    rng = np.random.default_rng(9)
    base, new = run(rng), run(rng)
    changed = RunSamples(
        new.name, 0, new.wall_ns, new.guest_ns, new.samples, new.budget_ns, {("G", "kvm_exit", "F"): 3}
    )
    result = compare_runs([base], [changed])
    assert result.transitions_appeared == {("G", "kvm_exit", "F"): 3}
    assert result.transitions_vanished == {("G", "kvm_exit", "H"): 2000}


def test_without_guest_time_on_one_side_rates_are_per_wall_second() -> None:
    rng = np.random.default_rng(10)
    base, new = [run(rng) for _ in range(3)], [run(rng) for _ in range(3)]
    blind = [RunSamples(one.name, 0, one.wall_ns, None, one.samples, {}, {}) for one in new]
    result = compare_runs(base, blind)
    rate = next(c for c in result.changes if c.key == CPUID and c.metric == "rate")
    assert rate.base == pytest.approx(2000)
    assert any("wall time" in note for note in result.notes)
    # of single runs they would show the host's load
    assert not any(c.metric == "rate" for c in compare_runs(base[:1], blind[:1]).changes)
