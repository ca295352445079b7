"""Hosts unlike their peers: same kernel, CPU model and instruction set, another rate, share or latency of some exit.

Each metric is compared on a logarithmic scale with the median of the cohort, in units of its robust spread (the median
absolute deviation) together with the error of counting alone. The false-discovery rate over all tests of all hosts,
reasons and metrics is held by Benjamini and Hochberg's procedure; what is significant but small is not reported.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.fleet.host_metrics import HALF_BUCKET, METRICS, RATE_COUNT
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.fleet.host_metrics import HostMetrics

MIN_PEERS = 8  # a cohort with fewer hosts has no usual
FALSE_DISCOVERIES = 0.0001  # rate over everything reported
MIN_RATIO = 1.3  # a difference below that is no finding, however sure
MIN_SHARE = 0.0005  # of vCPU time, here or usually: a reason that takes less is nobody's problem
MIN_SPREAD = 0.03  # of the logarithm: hosts never are more alike than that
MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Outlier:
    """A host's exit reason that is unlike its peers'.

    Parameters
    ----------
    metric : the most unlike of METRICS; `also` names the others that are
    value, usual : of the metric (rate in 1/s, share 0..1, times in ns)
    ratio : value / usual
    q : false-discovery rate at which it would just be reported
    n_peers : hosts of the cohort, this one included
    """

    host: str
    kernel: str | None
    cpu_model: str | None
    isa: str | None
    exit_reason: int
    name: str
    metric: str
    value: float
    usual: float
    ratio: float
    q: float
    n_peers: int
    also: tuple[str, ...] = ()


def find_outliers(metrics: HostMetrics) -> tuple[Outlier, ...]:
    """Return the outliers, the most unlike first."""
    if not len(metrics):
        return ()
    cohorts = _cohorts(metrics)
    tests = [_test(metrics, metric, cohorts) for metric in METRICS]
    q = adjusted(np.concatenate([p for p, _, _ in tests])).reshape(len(METRICS), -1)
    best: dict[tuple[object, ...], list[Outlier]] = {}
    for number, (metric, (_, usual, n_peers)) in enumerate(zip(METRICS, tests, strict=True)):
        values = metrics.values[metric]
        ratio = np.exp(values - usual)
        share = _largest_share(metrics, cohorts)
        large = (np.maximum(ratio, 1 / ratio) >= MIN_RATIO) & (share >= MIN_SHARE)
        for row in np.flatnonzero((q[number] <= FALSE_DISCOVERIES) & large):
            found = Outlier(
                host=metrics.host[row] or "?",
                kernel=metrics.kernel[row],
                cpu_model=metrics.cpu_model[row],
                isa=metrics.isa[row],
                exit_reason=int(metrics.exit_reason[row]),
                name=metrics.name[row],
                metric=metric,
                value=float(math.exp(values[row])),
                usual=float(math.exp(usual[row])),
                ratio=float(ratio[row]),
                q=float(q[number][row]),
                n_peers=int(n_peers[row]),
            )
            best.setdefault((found.host, found.kernel, found.cpu_model, found.isa, found.exit_reason), []).append(found)
    return tuple(sorted((_strongest(own) for own in best.values()), key=lambda one: -abs(math.log(one.ratio))))


def _strongest(found: list[Outlier]) -> Outlier:
    """Return the outlier whose metric says most; the others are named in it."""
    ranked = sorted(found, key=lambda one: (one.q, -abs(math.log(one.ratio))))
    return Outlier(**{**vars(ranked[0]), "also": tuple(one.metric for one in ranked[1:])})


def _cohorts(metrics: HostMetrics) -> NDArray[np.intp]:
    """Return a number for each row's cohort and exit reason."""
    keys = zip(
        metrics.kernel.tolist(), metrics.cpu_model.tolist(), metrics.isa.tolist(), metrics.exit_reason.tolist(),
        strict=True,
    )  # fmt: skip
    numbers: dict[tuple[object, ...], int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.intp)


def _grouped(cohorts: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    order = np.argsort(cohorts, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(cohorts[order])) + 1)


def _test(
    metrics: HostMetrics, metric: str, cohorts: NDArray[np.intp]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return each row's p-value (NaN: not tested), its cohort's median and how many hosts that is of."""
    from scipy.stats import norm

    values, errors = metrics.values[metric], metrics.errors[metric]
    p = np.full(len(metrics), np.nan)
    usual = np.full(len(metrics), np.nan)
    n_peers = np.zeros(len(metrics), np.int64)
    for rows in _grouped(cohorts):
        told = rows[np.isfinite(values[rows])]
        if len(told) < MIN_PEERS or (metric == "rate" and np.median(metrics.count[told]) < RATE_COUNT):
            continue
        middle = np.median(values[told])
        # percentiles are whole buckets, and so would be their median deviation: hosts of one bucket need not be alike
        spread = MAD_TO_SIGMA * (float(np.median(np.abs(values[told] - middle))) + HALF_BUCKET)
        # which is an estimate from few hosts, and may be two of its own standard errors too small
        spread = max(spread * (1 + 2 / math.sqrt(len(told))), MIN_SPREAD)
        # the cohort's spread holds the usual error already; a host that lacks the rare long exit looks surer than it is
        own = np.maximum(np.nan_to_num(errors[told]), np.nanmedian(errors[told]))
        score = np.abs(values[told] - middle) / np.maximum(spread, own)
        p[told] = 2 * norm.sf(score)
        usual[told], n_peers[told] = middle, len(told)
    return p, usual, n_peers


def _largest_share(metrics: HostMetrics, cohorts: NDArray[np.intp]) -> NDArray[np.float64]:
    """Return the larger of each host's share of a reason and of what is usual in its cohort."""
    usual = np.zeros(len(metrics))
    for rows in _grouped(cohorts):
        usual[rows] = np.nanmedian(np.nan_to_num(metrics.share[rows]))
    return np.maximum(np.nan_to_num(metrics.share), usual)


def adjusted(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Benjamini and Hochberg's adjusted p-values; NaN stays."""
    from scipy.stats import false_discovery_control

    adjusted = np.full(len(p), np.nan)
    told = np.isfinite(p)
    if told.any():
        adjusted[told] = false_discovery_control(p[told])
    return adjusted
