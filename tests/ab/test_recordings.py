"""A/A comparisons stay silent, real changes are found, and the numbers are what they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvmtrace.ab.collect_run import TimedDurations
from kvmtrace.ab.recordings import compare_runs
from kvmtrace.ab.run import Key, RunSamples, Samples, Traced
from kvmtrace.render.text.compare_text import comparison_document, render_comparison_text

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


ALIKE = Traced(
    isa="vmx", enabled=frozenset({"kvm_entry", "kvm_exit", "kvm_userspace_exit", "kvm_msr"}), guest="storm {}"
)
COMMON = {"occurring": frozenset({"kvm_entry", "kvm_exit"}), "frequent": frozenset({"kvm_entry", "kvm_exit"})}


def sides(base: Traced, new: Traced, seed: int = 20) -> tuple[RunSamples, RunSamples]:
    """Two runs of which the new one is three times slower on CPUID, recorded in these ways."""
    rng = np.random.default_rng(seed)
    first, second = run(rng), run(rng, factor=3.0)
    return replace(first, traced=replace(base, **COMMON)), replace(second, traced=replace(new, **COMMON))


def test_runs_recorded_alike_are_compared() -> None:
    base, new = sides(ALIKE, ALIKE)
    result = compare_runs([base], [new])
    assert result.comparable
    assert result.regressed


@pytest.mark.parametrize(
    ("new", "words"),
    [
        (replace(ALIKE, isa="svm"), "architectures"),
        (replace(ALIKE, guest="other {}"), "guests"),
        (replace(ALIKE, guest=None), "guests"),
        (replace(ALIKE, enabled=ALIKE.enabled - {"kvm_entry"}), "new lacks kvm_entry"),
        (replace(ALIKE, filters={"kvm:kvm_exit": "exit_reason != 1"}), "left out different events"),
        (replace(ALIKE, backend="bpf"), "recorders"),
        (replace(ALIKE, lost=7), "new lost 7 events"),
        (replace(ALIKE, lost=None), "nobody knows how many"),
    ],
)
def test_what_cannot_be_compared_is_not_and_that_comes_first(new: Traced, words: str) -> None:
    base, after = sides(replace(ALIKE, backend="ftrace"), replace(new, backend=new.backend or "ftrace"))
    result = compare_runs([base], [after])
    assert not result.comparable
    assert not any(change.metric == "rate" for change in result.changes)
    if "lost" not in words and "nobody" not in words:  # of sound spans the times hold all the same
        assert result.changes == ()
        assert not result.regressed
    text = render_comparison_text(result)
    assert words in " ".join(text.split("\n\nbase:")[0].split())
    assert "Before and after" in text
    document = comparison_document(result)
    assert document["comparable"] is False
    assert words in " ".join(one["why"] for one in document["not_compared"])


def test_parts_that_a_side_cannot_tell_are_absent_not_zero() -> None:
    base, new = sides(ALIKE, ALIKE)
    new = replace(new, budget_ns={"guest_ns": 10**8, "handler_ns": 10**8, "blocked_ns": None})
    base = replace(base, budget_ns={"guest_ns": 10**8, "handler_ns": 10**8, "blocked_ns": 2 * 10**8})
    result = compare_runs([base], [new])
    assert result.budget_share["blocked_ns"] == (0.5, None)
    line = next(line for line in render_comparison_text(result).splitlines() if "blocked" in line)
    assert line.split() == ["blocked", "50.0%", "-"]


def test_transitions_that_one_side_cannot_show_do_not_vanish() -> None:
    base, new = sides(ALIKE, replace(ALIKE, enabled=ALIKE.enabled | {"kvm_fpu"}))
    new = replace(new, transitions={("G", "kvm_exit", "F"): 3})
    result = compare_runs([base], [new])
    assert result.comparable
    assert (result.transitions_appeared, result.transitions_vanished) == ({}, {})
    assert "transitions of the model are not compared" in render_comparison_text(result)


def test_without_userspace_exits_on_one_side_paths_are_not_told_apart() -> None:
    base, new = sides(ALIKE, replace(ALIKE, enabled=ALIKE.enabled - {"kvm_userspace_exit"}))
    result = compare_runs([base], [new])
    assert {key.path for key in result.counts} == {"any"}
    assert any("kvm_userspace_exit" in note for note in result.notes)


def test_the_table_of_both_sides_is_there_where_nothing_changed() -> None:
    one = run(np.random.default_rng(3))
    result = compare_runs([one], [one])
    base, new = result.measured[CPUID]
    assert base == new
    assert base is not None
    assert base.count == 2000
    assert base.p50_ns == float(np.quantile(one.samples[CPUID].dur_ns, 0.5))
    text = render_comparison_text(result)
    assert text.index("no significant change") < text.index("Before and after") < text.index("CPUID")


def test_durations_kept_compactly_come_back_exact_and_in_time_order() -> None:
    kept, rng = TimedDurations(), np.random.default_rng(1)
    expected: dict[int, list[tuple[int, int]]] = {}
    for piece in range(5):
        groups = rng.integers(0, 3, 50)
        ts_ns = piece * 10**10 + rng.integers(0, 10**9 if piece else 10**12, 50)
        dur_ns = rng.integers(0, 2**33 if piece == 3 else 1000, 50)
        kept.add(groups, ts_ns, dur_ns)
        for group, ts, dur in zip(groups.tolist(), ts_ns.tolist(), dur_ns.tolist(), strict=True):
            expected.setdefault(group, []).append((ts, dur))
    found = {group: list(zip(own.ts_ns.tolist(), own.dur_ns.tolist(), strict=True)) for group, own in kept.grouped()}
    assert found == {group: sorted(rows, key=lambda row: row[0]) for group, rows in expected.items()}
