"""The tests behind a comparison: medians of blocks or runs, rates of bursty events, Holm's correction.

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
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from kvmtrace.ab.run import Key, RunSamples, Samples

METRICS = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))
N_BLOCKS = 10  # per run: long blocks see slow drift, ten still give Welch's t enough degrees of freedom
MIN_SAMPLES = 50  # per side; below that a median says too little to be called changed
MIN_RUNS = 3  # per side, to use whole runs as the unit
ALPHA = 0.05
MIN_EFFECT = 0.05
# between single runs of one and the same software on a busy machine medians drifted by up to 13 % (measured:
# 24 runs, 100 pairs): without repetitions only changes well beyond that are called changes
MIN_EFFECT_SINGLE = 0.25


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


def seconds_of(run: RunSamples) -> float:
    """Return the time that rates are per: in guest mode, else on the clock."""
    return max(run.guest_ns or run.wall_ns, 1) / 1e9


@dataclass(frozen=True)
class Test:
    """A tested quantity: both sides, ratio with its 95 % interval, probability of it by chance."""

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


def _test_latency(base: Sequence[Samples], new: Sequence[Samples], quantile: float, *, by_run: bool) -> Test | None:
    units = [_log_quantiles(side, quantile, by_run=by_run) for side in (base, new)]
    if min(len(unit) for unit in units) < MIN_RUNS:
        return None
    difference, low, high, p_value = _welch(*units)
    pooled = [float(np.quantile(np.concatenate([run.dur_ns for run in side]), quantile)) for side in (base, new)]
    return Test(pooled[0], pooled[1], math.exp(difference), math.exp(low), math.exp(high), p_value)


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
    seconds = np.array([seconds_of(run) for run in side])
    slices = np.array([_slice_counts(run.samples.get(key), run) for run in side])
    mean = slices.mean()
    dispersion = max(1.0, float(slices.var(ddof=1) / mean)) if mean > 0 else 1.0
    return _Rate(float(slices.sum()), float(seconds.sum()), slices.sum(axis=1) / seconds, dispersion)


def _test_rate(key: Key, base: Sequence[RunSamples], new: Sequence[RunSamples], *, by_run: bool) -> Test:
    """Compare events per second: run against run, or as counts over-dispersed as their time slices show."""
    from scipy import stats

    sides = _rate(key, base), _rate(key, new)
    rates = [side.total / side.seconds for side in sides]
    if min(rates) == 0:
        # all events on one side: under equal rates each burst lands there with its share of the time
        there = sides[0] if rates[0] else sides[1]
        share = there.seconds / (sides[0].seconds + sides[1].seconds)
        ratio = 0.0 if rates[0] else math.inf
        return Test(rates[0], rates[1], ratio, ratio, ratio, min(1.0, 2 * share ** (there.total / there.dispersion)))
    if by_run and min(side.per_run.min() for side in sides) > 0:
        difference, low, high, p_value = _welch(np.log(sides[0].per_run), np.log(sides[1].per_run))
    else:
        difference = math.log(rates[1] / rates[0])
        error = math.hypot(sides[0].log_error, sides[1].log_error)
        p_value = float(2 * stats.norm.sf(abs(difference) / error))
        low, high = difference - 1.96 * error, difference + 1.96 * error
    return Test(rates[0], rates[1], math.exp(difference), math.exp(low), math.exp(high), p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's step-down adjusted p-values, in the order given."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted.tolist()


def tests_of(
    key: Key, base: Sequence[RunSamples], new: Sequence[RunSamples], *, by_run: bool, quantities: Collection[str]
) -> dict[str, Test]:
    """Test one key.

    Parameters
    ----------
    by_run : bool, the runs are the units, else blocks within them
    quantities : "times", "rates": what may be tested

    Returns
    -------
    metric ("rate" "p50" "p90" "p99") -> Test, for those with enough samples
    """
    sides = [[run.samples[key] for run in side if key in run.samples] for side in (base, new)]
    tests: dict[str, Test] = {}
    # per second of wall time a single run shows the host's load
    if "rates" in quantities and (by_run or base[0].guest_ns is not None):
        tests["rate"] = _test_rate(key, base, new, by_run=by_run)
    if "times" in quantities and all(sides):
        for metric, quantile in METRICS:
            test = _test_latency(sides[0], sides[1], quantile, by_run=by_run)
            if test is not None:
                tests[metric] = test
    return tests
