"""Two sets of recordings, compared per exit reason and path, with significance.

What is a sample and what is not: consecutive VM-exits of one run are not independent (caches, frequency,
what the guest does at that moment), so testing exit against exit would call every A/A comparison different.
Each run is therefore cut into consecutive blocks, and blocks are what is tested (Welch's t on log medians);
with three or more runs on both sides the runs themselves are. Holm's correction covers all tests of a
comparison, and a change smaller than `min_effect` is not called one however certain it is.

With one run per side, drift between runs cannot be told from a change of the software: only large changes count then,
rates are tested only per second of guest time, and the result says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

N_BLOCKS = 10  # per run: long blocks see slow drift, ten still give Welch's t enough degrees of freedom
MIN_SAMPLES = 50  # per side; below that a median says too little to be called changed
MIN_RUNS = 3  # per side, to use whole runs as the unit
ALPHA = 0.05
MIN_EFFECT = 0.05
# between single runs of one and the same software on a busy machine medians drifted by up to 13 % (measured:
# 24 runs, 100 pairs): without repetitions only changes well beyond that are called changes
MIN_EFFECT_SINGLE = 0.25


@dataclass(frozen=True, order=True)
class Key:
    """One population of intervals.

    Parameters
    ----------
    kind : "vm_exit" (kvm_exit to kvm_entry) or "userspace" (kvm_userspace_exit to the next KVM_RUN)
    isa : int, 1 VMX, 2 SVM, 0 for userspace exits
    reason : int, exit reason or KVM_EXIT_*
    path : "kernel" or "userspace": where the exit was handled
    """

    kind: str
    isa: int
    reason: int
    path: str


@dataclass(frozen=True)
class Samples:
    """Intervals of one key in one run, in time order: start stamps and durations, ns."""

    ts_ns: NDArray[np.int64]
    dur_ns: NDArray[np.int64]


@dataclass(frozen=True)
class RunSamples:
    """What one recording contributes.

    Parameters
    ----------
    name : str, for messages
    start_ns, wall_ns : span of the recording
    guest_ns : int or None, time in guest mode; rates are per second of it, or of wall time if None
    samples : Key -> Samples
    budget_ns : budget part -> ns, summed over vCPUs
    transitions : (state, event, next state) -> count, from the model's replay
    violations : int
    late_exit : bool or None, kvm_exit is traced with interrupts on, after host interrupts were served (SVM up to
        6.4); None if the recording does not say
    recorded : the kinds of events that make up a noticeable part of the recording
    """

    name: str
    start_ns: int
    wall_ns: int
    guest_ns: int | None
    samples: Mapping[Key, Samples]
    budget_ns: Mapping[str, int]
    transitions: Mapping[tuple[str, str, str], int]
    violations: int = 0
    late_exit: bool | None = None
    recorded: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Change:
    """One tested quantity of one key.

    Parameters
    ----------
    metric : "p50" "p90" "p99" (ns) or "rate" (per second)
    base, new : float, the quantity on each side
    ratio : float, new / base (inf if base is 0)
    low, high : float, 95 % confidence interval of the ratio
    p_value : float, after Holm's correction
    significant : bool
    """

    key: Key
    metric: str
    base: float
    new: float
    ratio: float
    low: float
    high: float
    p_value: float
    significant: bool

    @property
    def regression(self) -> bool:
        """Significantly more, or slower."""
        return self.significant and self.ratio > 1


@dataclass(frozen=True)
class RecordingComparison:
    """The result: counts, changes, budget shift, model differences, and what the reader must know."""

    base_runs: tuple[str, ...]
    new_runs: tuple[str, ...]
    unit: str  # "runs" or "blocks"
    counts: dict[Key, tuple[int, int]]
    changes: tuple[Change, ...]
    untested: tuple[Key, ...]
    budget_share: dict[str, tuple[float, float]]
    transitions_appeared: dict[tuple[str, str, str], int]
    transitions_vanished: dict[tuple[str, str, str], int]
    violations: tuple[int, int]
    notes: tuple[str, ...]

    @property
    def significant(self) -> tuple[Change, ...]:
        """The changes that are changes."""
        return tuple(change for change in self.changes if change.significant)

    @property
    def regressed(self) -> bool:
        """Something became slower or more frequent, or the model found more violations."""
        return any(change.regression for change in self.changes) or self.violations[1] > self.violations[0]


def _blocks(samples: Samples, n_blocks: int) -> list[NDArray[np.int64]]:
    return np.array_split(samples.dur_ns, n_blocks)


def _log_quantiles(runs: Sequence[Samples], quantile: float, *, by_run: bool) -> NDArray[np.float64]:
    """Return log quantiles of the units (runs, or blocks of all runs) that have enough samples for it."""
    enough = math.ceil(5 / (1 - quantile))  # at least five samples beyond the quantile
    units: list[float] = []
    for run in runs:
        n_blocks = 1 if by_run else min(N_BLOCKS, len(run.dur_ns) // enough)
        if n_blocks == 0 or len(run.dur_ns) < enough:
            continue
        units += [float(np.quantile(block, quantile)) for block in _blocks(run, n_blocks)]
    logs: NDArray[np.float64] = np.log(np.maximum(np.asarray(units, np.float64), 1.0))
    return logs


def _slice_counts(samples: Samples | None, run: RunSamples) -> NDArray[np.float64]:
    edges = np.linspace(run.start_ns, run.start_ns + max(run.wall_ns, 1), N_BLOCKS + 1)
    stamps = samples.ts_ns if samples is not None else np.empty(0, np.int64)
    return np.histogram(stamps, edges)[0].astype(float)


def _seconds(run: RunSamples) -> float:
    return max(run.guest_ns or run.wall_ns, 1) / 1e9


@dataclass(frozen=True)
class _Test:
    base: float
    new: float
    ratio: float
    low: float
    high: float
    p_value: float


def _welch(base: NDArray[np.float64], new: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Return (difference of means, its 95 % interval low and high, p) of log values."""
    from scipy import stats

    difference = float(new.mean() - base.mean())
    error = base.var(ddof=1) / len(base) + new.var(ddof=1) / len(new)
    # constant on both sides: an emulated clock can make every block equal; any difference is then certain
    if error < 1e-18:
        return difference, difference, difference, 0.0 if abs(difference) > 1e-9 else 1.0
    result = stats.ttest_ind(new, base, equal_var=False)
    interval = result.confidence_interval(0.95)
    return difference, float(interval.low), float(interval.high), float(result.pvalue)


def _test_latency(base: Sequence[Samples], new: Sequence[Samples], quantile: float, *, by_run: bool) -> _Test | None:
    units = [_log_quantiles(side, quantile, by_run=by_run) for side in (base, new)]
    if min(len(unit) for unit in units) < MIN_RUNS:
        return None
    difference, low, high, p_value = _welch(*units)
    pooled = [float(np.quantile(np.concatenate([run.dur_ns for run in side]), quantile)) for side in (base, new)]
    return _Test(pooled[0], pooled[1], math.exp(difference), math.exp(low), math.exp(high), p_value)


@dataclass(frozen=True)
class _Rate:
    """Events of one key on one side: total, seconds, per-run rates, and how bursty they are."""

    total: float
    seconds: float
    per_run: NDArray[np.float64]
    dispersion: float  # variance over mean of the counts in equal time slices, at least Poisson's 1

    @property
    def log_error(self) -> float:
        """Standard error of log(rate)."""
        return math.sqrt(self.dispersion / self.total)


def _rate(key: Key, side: Sequence[RunSamples]) -> _Rate:
    seconds = np.array([_seconds(run) for run in side])
    slices = np.array([_slice_counts(run.samples.get(key), run) for run in side])
    mean = slices.mean()
    dispersion = max(1.0, float(slices.var(ddof=1) / mean)) if mean > 0 else 1.0
    return _Rate(float(slices.sum()), float(seconds.sum()), slices.sum(axis=1) / seconds, dispersion)


def _test_rate(key: Key, base: Sequence[RunSamples], new: Sequence[RunSamples], *, by_run: bool) -> _Test:
    """Compare events per second: run against run, or as counts over-dispersed as their time slices show."""
    from scipy import stats

    sides = _rate(key, base), _rate(key, new)
    rates = [side.total / side.seconds for side in sides]
    if min(rates) == 0:
        # all events on one side: under equal rates each burst lands there with its share of the time
        there = sides[0] if rates[0] else sides[1]
        share = there.seconds / (sides[0].seconds + sides[1].seconds)
        ratio = 0.0 if rates[0] else math.inf
        return _Test(rates[0], rates[1], ratio, ratio, ratio, min(1.0, 2 * share ** (there.total / there.dispersion)))
    if by_run and min(side.per_run.min() for side in sides) > 0:
        difference, low, high, p_value = _welch(np.log(sides[0].per_run), np.log(sides[1].per_run))
    else:
        difference = math.log(rates[1] / rates[0])
        error = math.hypot(sides[0].log_error, sides[1].log_error)
        p_value = float(2 * stats.norm.sf(abs(difference) / error))
        low, high = difference - 1.96 * error, difference + 1.96 * error
    return _Test(rates[0], rates[1], math.exp(difference), math.exp(low), math.exp(high), p_value)


def _holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values, in the order given."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted.tolist()


def _share(side: Sequence[RunSamples]) -> dict[str, float]:
    total = sum(sum(run.budget_ns.values()) for run in side)
    parts = {part for run in side for part in run.budget_ns}
    return {part: sum(run.budget_ns.get(part, 0) for run in side) / total for part in parts} if total else {}


def _transitions(side: Sequence[RunSamples]) -> dict[tuple[str, str, str], int]:
    counts: dict[tuple[str, str, str], int] = {}
    for run in side:
        for edge, count in run.transitions.items():
            counts[edge] = counts.get(edge, 0) + count
    return counts


def _tests_of(key: Key, base: Sequence[RunSamples], new: Sequence[RunSamples], *, by_run: bool) -> dict[str, _Test]:
    sides = [[run.samples[key] for run in side if key in run.samples] for side in (base, new)]
    tests: dict[str, _Test] = {}
    if by_run or base[0].guest_ns is not None:  # per second of wall time a single run shows the host's load
        tests["rate"] = _test_rate(key, base, new, by_run=by_run)
    if all(sides):
        for metric, quantile in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
            test = _test_latency(sides[0], sides[1], quantile, by_run=by_run)
            if test is not None:
                tests[metric] = test
    return tests


def _count(key: Key, side: Sequence[RunSamples]) -> int:
    return sum(len(run.samples[key].dur_ns) for run in side if key in run.samples)


def _notes(base: Sequence[RunSamples], new: Sequence[RunSamples], *, by_run: bool) -> tuple[str, ...]:
    notes = []
    if not by_run:
        notes.append(
            f"fewer than {MIN_RUNS} runs on a side: blocks within runs were compared, and drift between runs cannot be "
            f"told from a change; only changes of {MIN_EFFECT_SINGLE:.0%} and more count by default. Give several runs"
        )
    if any(run.guest_ns is None for run in (*base, *new)):
        notes.append("guest time is not in every recording: rates are per second of wall time")
    different = _recorded(base) ^ _recorded(new)
    if different:
        notes.append(
            f"the sides recorded different events ({', '.join(sorted(different)[:4])}{' ...' * (len(different) > 4)}): "
            "tracing itself cost them differently, and that is part of every time above"
        )
    if {True, False} <= {run.late_exit for run in (*base, *new)}:
        notes.append(
            "kvm_exit is traced at different places (before or after host interrupts are served): exits by host "
            "interrupts take longer where it is early, though nothing became slower"
        )
    return tuple(notes)


def compare_runs(
    base: Sequence[RunSamples], new: Sequence[RunSamples], *, min_effect: float | None = None
) -> RecordingComparison:
    """Compare the runs of two sides.

    Parameters
    ----------
    base, new : one or more runs each
    min_effect : relative change below which nothing is called significant; by default MIN_EFFECT for runs against
        runs and MIN_EFFECT_SINGLE for blocks against blocks

    Returns
    -------
    RecordingComparison
    """
    by_run = min(len(base), len(new)) >= MIN_RUNS
    if min_effect is None:
        min_effect = MIN_EFFECT if by_run else MIN_EFFECT_SINGLE
    if any(run.guest_ns is None for run in (*base, *new)):
        base = [_without_guest_time(run) for run in base]
        new = [_without_guest_time(run) for run in new]
    keys = sorted({key for run in (*base, *new) for key in run.samples})
    counts = {key: (_count(key, base), _count(key, new)) for key in keys}
    tested = [key for key in keys if max(counts[key]) >= MIN_SAMPLES]
    tests: list[tuple[Key, str, _Test]] = [
        (key, metric, test) for key in tested for metric, test in _tests_of(key, base, new, by_run=by_run).items()
    ]
    adjusted = _holm([test.p_value for _, _, test in tests])
    changes = tuple(
        Change(
            key,
            metric,
            test.base,
            test.new,
            test.ratio,
            test.low,
            test.high,
            p_value,
            p_value < ALPHA and not 1 / (1 + min_effect) < test.ratio < 1 + min_effect,
        )
        for (key, metric, test), p_value in zip(tests, adjusted, strict=True)
    )
    shares = _share(base), _share(new)
    edges = _transitions(base), _transitions(new)
    return RecordingComparison(
        base_runs=tuple(run.name for run in base),
        new_runs=tuple(run.name for run in new),
        unit="runs" if by_run else "blocks",
        counts=counts,
        changes=changes,
        untested=tuple(key for key in keys if key not in tested),
        budget_share={p: (shares[0].get(p, 0.0), shares[1].get(p, 0.0)) for p in sorted({*shares[0], *shares[1]})},
        transitions_appeared={edge: n for edge, n in edges[1].items() if edge not in edges[0]},
        transitions_vanished={edge: n for edge, n in edges[0].items() if edge not in edges[1]},
        violations=(sum(run.violations for run in base), sum(run.violations for run in new)),
        notes=_notes(base, new, by_run=by_run),
    )


def _recorded(side: Sequence[RunSamples]) -> frozenset[str]:
    return frozenset[str]().union(*(run.recorded for run in side))


def _without_guest_time(run: RunSamples) -> RunSamples:
    """Rates of both sides need one denominator: drop guest time where one side lacks it."""
    return replace(run, guest_ns=None)
