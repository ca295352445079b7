"""Hosts and VMs unlike their peers: same kernel, CPU model and instruction set, another rate, share or latency.

Each metric is compared on a logarithmic scale with the median of the cohort, in units of its robust spread (the median
absolute deviation) together with the error of counting alone. The false-discovery rate over all tests of all hosts,
VMs, reasons and metrics is held by Benjamini and Hochberg's procedure; what is significant but small is not reported.

VMs are compared with VMs; one that is alone on its host is a peer of others, and what it does is told of its host. If
most VMs of a host are unlike their peers in the same way, it is the host; if some are, it is they.
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
    """An exit reason of a host, or of one of its VMs, that is unlike its peers'.

    Parameters
    ----------
    vm : what the VM is called; None of a host
    metric : the most unlike of METRICS; `also` names the others that are
    value, usual : of the metric (rate in 1/s, share 0..1, times in ns)
    ratio : value / usual
    q : false-discovery rate at which it would just be reported
    n_peers : hosts (or VMs) of the cohort, this one included
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
    vm: str | None = None


# (host, kernel, CPU model, instruction set, exit reason)
Place = tuple[str, "str | None", "str | None", "str | None", int]


def find_outliers(hosts: HostMetrics, vms: HostMetrics | None = None) -> tuple[Outlier, ...]:
    """Return the outliers, the most unlike first.

    Parameters
    ----------
    vms : of all VMs; None: they are not looked at
    """
    units = [unit for unit in (hosts, vms) if unit is not None and len(unit)]
    if not units:
        return ()
    tests = [_tests(unit) for unit in units]
    q = adjusted(np.concatenate([p.ravel() for p, _, _ in tests]))
    ends = np.cumsum([p.size for p, _, _ in tests])[:-1]
    found: list[Outlier] = []
    for unit, (p, usual, n_peers), own in zip(units, tests, np.split(q, ends), strict=True):
        found += _outliers(unit, own.reshape(p.shape), usual, n_peers)
    kept = found if len(units) == 1 else _told_once(found, units[1])
    return tuple(sorted(kept, key=lambda one: -abs(math.log(one.ratio))))


def _tests(metrics: HostMetrics) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Return _test() of each of METRICS, a row each; VMs that are alone on their host are not tested."""
    cohorts = _cohorts(metrics)
    rows = [_test(metrics, name, cohorts) for name in METRICS]
    p, usual, n_peers = (np.array(parts) for parts in zip(*rows, strict=True))
    if metrics.vm[0] is not None:
        p[:, ~_has_neighbours(metrics)] = np.nan
    return p, usual, n_peers


def _has_neighbours(metrics: HostMetrics) -> NDArray[np.bool_]:
    """Say of each row whether its VM has others beside it on the same host."""
    on: dict[tuple[object, ...], set[str]] = {}
    keys = list(zip(metrics.host, metrics.kernel, metrics.cpu_model, metrics.isa, strict=True))
    for key, vm in zip(keys, metrics.vm, strict=True):
        on.setdefault(key, set()).add(vm)
    return np.array([len(on[key]) > 1 for key in keys])


def _outliers(
    metrics: HostMetrics, q: NDArray[np.float64], usual: NDArray[np.float64], n_peers: NDArray[np.int64]
) -> list[Outlier]:
    """Return what is significant and large, one of each unit and exit reason; q and the others: a row per metric."""
    share = _largest_share(metrics, _cohorts(metrics))
    best: dict[tuple[object, ...], list[Outlier]] = {}
    for number, metric in enumerate(METRICS):
        values = metrics.values[metric]
        ratio = np.exp(values - usual[number])
        large = (np.maximum(ratio, 1 / ratio) >= MIN_RATIO) & (share >= MIN_SHARE)
        for row in np.flatnonzero((q[number] <= FALSE_DISCOVERIES) & large):
            found = Outlier(
                host=metrics.host[row] or "?",
                vm=metrics.vm[row],
                kernel=metrics.kernel[row],
                cpu_model=metrics.cpu_model[row],
                isa=metrics.isa[row],
                exit_reason=int(metrics.exit_reason[row]),
                name=metrics.name[row],
                metric=metric,
                value=float(math.exp(values[row])),
                usual=float(math.exp(usual[number][row])),
                ratio=float(ratio[row]),
                q=float(q[number][row]),
                n_peers=int(n_peers[number][row]),
            )
            best.setdefault((*_place(found), found.vm), []).append(found)
    return [_strongest(own) for own in best.values()]


def _place(one: Outlier) -> Place:
    return one.host, one.kernel, one.cpu_model, one.isa, one.exit_reason


def _told_once(found: list[Outlier], vms: HostMetrics) -> list[Outlier]:
    """Leave out the VMs of a host that is unlike its peers because most of them are, else the host beside its VMs."""
    of_vms: dict[Place, list[Outlier]] = {}
    hosts = {_place(one): one for one in found if one.vm is None}
    for one in found:
        if one.vm is not None:
            of_vms.setdefault(_place(one), []).append(one)
    n_vms: dict[Place, int] = {}
    for row in range(len(vms)):
        place = (
            vms.host[row] or "?", vms.kernel[row], vms.cpu_model[row], vms.isa[row], int(vms.exit_reason[row])
        )  # fmt: skip
        n_vms[place] = n_vms.get(place, 0) + 1
    kept = [one for place, one in hosts.items() if place not in of_vms]
    for place, some in of_vms.items():
        kept += [hosts[place]] if place in hosts and 2 * len(some) > n_vms[place] else some
    return kept


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
