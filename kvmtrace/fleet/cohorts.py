"""Two groups of hosts compared, to tell whether a kernel made anything slower, and on which CPU models.

The host is the statistical unit: all recordings of a host in a group are added up first. Within one CPU model
and instruction set, each metric of each exit reason (and the time of each call of the VM's construction) is compared by
Mann and Whitney's test on logarithms, with Hodges and Lehmann's estimate of the ratio and its interval; the
false-discovery rate over all comparisons is held by Benjamini and Hochberg's procedure.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.fleet.host_metrics import METRICS, host_metrics
from kvmtrace.fleet.outliers import adjusted
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.fleet.host_metrics import HostMetrics
    from kvmtrace.fleet.reduce import Fleet

MIN_HOSTS = 4  # on each side of a comparison
FALSE_DISCOVERIES = 0.01
MIN_CHANGE = 0.02  # of the ratio: a smaller change is told, but is no regression
CONFIDENCE = 0.95
MAX_PAIRS = 4_000_000  # of hosts; larger groups are thinned for the interval, evenly by rank
HIGHER_IS_WORSE = frozenset({"mean", "p50", "p99", "share", "call"})

_CALLS = """
SELECT host, cpu_model, isa, name, median(ln(dur_ns)) AS value FROM calls
WHERE dur_ns > 0 AND verdict = 'ok' GROUP BY host, cpu_model, isa, name
"""


@dataclass(frozen=True)
class Change:
    """One metric of one exit reason (or call) on one CPU model, base against new.

    Parameters
    ----------
    what : the exit reason's name, or the call's
    metric : one of METRICS, or "call" (the time of the first such call)
    base, new : medians over hosts (rate in 1/s, share 0..1, times in ns)
    ratio, low, high : new / base, with its CONFIDENCE interval
    q : false-discovery rate at which it would just be significant
    """

    cpu_model: str | None
    isa: str | None
    what: str
    metric: str
    n_base: int
    n_new: int
    base: float
    new: float
    ratio: float
    low: float
    high: float
    q: float

    @property
    def significant(self) -> bool:
        """Say whether the change is more than chance."""
        return self.q <= FALSE_DISCOVERIES and abs(self.ratio - 1) >= MIN_CHANGE

    @property
    def is_regression(self) -> bool:
        """Say whether something became worse."""
        return self.significant and self.ratio > 1 and self.metric in HIGHER_IS_WORSE


@dataclass(frozen=True)
class FleetComparison:
    """All changes between two groups, the significant ones first.

    Parameters
    ----------
    base, new : the SQL conditions
    hosts_base, hosts_new : hosts of each group
    not_compared : what could not be compared, and why, in words
    """

    base: str
    new: str
    hosts_base: int
    hosts_new: int
    changes: tuple[Change, ...]
    not_compared: tuple[str, ...]

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What became worse."""
        return tuple(change for change in self.changes if change.is_regression)


# (cpu model, isa, what, metric) -> logarithms, one per host
Sides = dict[tuple[str | None, str | None, str, str], "NDArray[np.float64]"]


def compare_cohorts(base: Fleet, new: Fleet, conditions: tuple[str, str]) -> FleetComparison:
    """Compare the hosts of two fleets (usually the same one, narrowed twice).

    Parameters
    ----------
    conditions : SQL of base and new, for the report
    """
    sides = [_sides(fleet) for fleet in (base, new)]
    shared = [key for key in sides[0] if key in sides[1]]
    enough = [key for key in shared if min(len(sides[0][key]), len(sides[1][key])) >= MIN_HOSTS]
    p = np.array([_p_value(sides[0][key], sides[1][key]) for key in enough])
    q = adjusted(p)
    changes = [_change(key, sides[0][key], sides[1][key], float(q[i])) for i, key in enumerate(enough)]
    ranked = sorted(changes, key=lambda one: (not one.significant, -abs(math.log(one.ratio)), one.what, one.metric))
    return FleetComparison(
        base=conditions[0],
        new=conditions[1],
        hosts_base=_n_hosts(base),
        hosts_new=_n_hosts(new),
        changes=tuple(ranked),
        not_compared=tuple(_not_compared(base, new, sides, shared, enough)),
    )


def _n_hosts(fleet: Fleet) -> int:
    return int(fleet.arrow("SELECT count(DISTINCT host) AS n FROM recordings").column("n")[0].as_py())


def _sides(fleet: Fleet) -> Sides:
    """Return each metric's values over the fleet's hosts."""
    fleet.load("exits", "vcpus", "calls")
    metrics = host_metrics(fleet)
    found: dict[tuple[str | None, str | None, str, str], list[float]] = {}
    for metric in METRICS:
        values = metrics.values[metric]
        for row in np.flatnonzero(np.isfinite(values)):
            found.setdefault(_key(metrics, int(row), metric), []).append(float(values[row]))
    calls = fleet.arrow(_CALLS)
    names = ("cpu_model", "isa", "name", "value")
    for cpu_model, isa, name, value in zip(*(calls.column(name).to_pylist() for name in names), strict=True):
        found.setdefault((cpu_model, isa, name, "call"), []).append(value)
    return {key: np.array(values) for key, values in found.items()}


def _key(metrics: HostMetrics, row: int, metric: str) -> tuple[str | None, str | None, str, str]:
    return metrics.cpu_model[row], metrics.isa[row], metrics.name[row], metric


def _p_value(base: NDArray[np.float64], new: NDArray[np.float64]) -> float:
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(base, new, alternative="two-sided").pvalue)


def _change(
    key: tuple[str | None, str | None, str, str], base: NDArray[np.float64], new: NDArray[np.float64], q: float
) -> Change:
    cpu_model, isa, what, metric = key
    ratio, low, high = (math.exp(value) for value in shift_of(base, new))
    return Change(
        cpu_model=cpu_model,
        isa=isa,
        what=what,
        metric=metric,
        n_base=len(base),
        n_new=len(new),
        base=math.exp(float(np.median(base))),
        new=math.exp(float(np.median(new))),
        ratio=ratio,
        low=low,
        high=high,
        q=q,
    )


def shift_of(base: NDArray[np.float64], new: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return Hodges and Lehmann's estimate of new - base, and its CONFIDENCE interval.

    Source: M. Hollander, D. Wolfe, Nonparametric Statistical Methods (the interval that belongs to the rank sum test)
    """
    from scipy.stats import norm

    base, new = _thinned(base), _thinned(new)
    n, m = len(base), len(new)
    width = norm.ppf(0.5 + CONFIDENCE / 2) * math.sqrt(n * m * (n + m + 1) / 12)
    rank = int(max(math.floor(n * m / 2 - width), 0))
    ranks = [rank, (n * m - 1) // 2, n * m // 2, n * m - 1 - rank]  # the median is between the middle two
    differences = np.partition((new[:, None] - base[None, :]).ravel(), ranks)
    low, *middle, high = (float(differences[rank]) for rank in ranks)
    return sum(middle) / 2, low, high


def _thinned(values: NDArray[np.float64]) -> NDArray[np.float64]:
    most = int(math.sqrt(MAX_PAIRS))
    if len(values) <= most:
        return values
    return np.sort(values)[np.linspace(0, len(values) - 1, most).astype(np.intp)]


def _not_compared(
    base: Fleet, new: Fleet, sides: list[Sides], shared: list[tuple[str | None, str | None, str, str]],
    enough: list[tuple[str | None, str | None, str, str]],
) -> list[str]:  # fmt: skip
    """Say what could not be compared."""
    found = []
    for one, other, side in ((sides[0], sides[1], "new"), (sides[1], sides[0], "base")):
        models = sorted({str(key[0]) for key in one} - {str(key[0]) for key in other})
        found += [f"CPU model {model}: no host of it in {side}" for model in models]
        for model, isa in sorted({key[:2] for key in one} & {key[:2] for key in other}, key=str):
            there = {key[2] for key in other if key[:2] == (model, isa)}
            names = sorted({key[2] for key in one if key[:2] == (model, isa)} - there)
            if names:
                found.append(f"{model}: nothing in {side} of {', '.join(names[:4])}{_and_more(len(names) - 4)}")
    few = {(key[0], key[2]) for key in shared} - {(key[0], key[2]) for key in enough}
    if few:
        found.append(f"{len(few)} pairs of CPU model and exit reason: fewer than {MIN_HOSTS} hosts on a side")
    recorded = [_event_sets(fleet) for fleet in (base, new)]
    if recorded[0] != recorded[1]:
        lack = sorted(set.union(set(), *recorded[0]) ^ set.union(set(), *recorded[1]))
        if lack:
            found.append(f"events recorded on one side only: {', '.join(lack[:6])}{_and_more(len(lack) - 6)}")
    return found


def _and_more(n: int) -> str:
    return f" and {n} more" if n > 0 else ""


def _event_sets(fleet: Fleet) -> list[set[str]]:
    lists = fleet.arrow("SELECT DISTINCT events FROM recordings ORDER BY events").column("events").to_pylist()
    return [set(events or ()) for events in lists]
