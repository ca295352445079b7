"""What each host did per VM-exit reason: rate, share of time, latency. The unit of every statement about a fleet."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.stats.exponential_histogram import PER_OCTAVE, ZERO

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.fleet.reduce import Fleet

# metric -> what it is, as sentences say it
METRICS = {
    "rate": "exits per second of vCPU time",
    "share": "share of vCPU time",
    "mean": "mean time",
    "p50": "median time",
    "p99": "99th percentile of the time",
}
TAIL_SAMPLES = 500  # fewer say nothing of a 99th percentile
MEAN_SAMPLES = 50  # ... of a mean: VM-exits have heavy tails
RATE_COUNT = 10  # ... of a rate
HALF_BUCKET = math.log(2) / PER_OCTAVE / 2

_PER_HOST = """
SELECT host, kernel, cpu_model, isa, exit_reason, any_value(name) AS name,
       sum(count)::BIGINT AS count, sum(samples)::BIGINT AS samples, sum(total_ns)::BIGINT AS total_ns,
       sum(squares_ns2::DOUBLE) AS squares
FROM exits GROUP BY host, kernel, cpu_model, isa, exit_reason
ORDER BY host, kernel, cpu_model, isa, exit_reason
"""
_QUANTILE = """
WITH bins AS (
  SELECT host, kernel, cpu_model, isa, exit_reason, unnest(buckets) AS bucket, unnest(counts) AS n FROM exits
), added AS (
  SELECT host, kernel, cpu_model, isa, exit_reason, bucket, sum(n)::BIGINT AS n
  FROM bins GROUP BY ALL
), ranked AS (
  SELECT *, sum(n) OVER (PARTITION BY host, kernel, cpu_model, isa, exit_reason ORDER BY bucket) AS seen,
         sum(n) OVER (PARTITION BY host, kernel, cpu_model, isa, exit_reason) AS total
  FROM added
)
SELECT host, kernel, cpu_model, isa, exit_reason,
       min(bucket) FILTER (seen >= ceil($q * total))::BIGINT AS bucket,
       min(bucket) FILTER (seen >= ceil($q * total - 2 * sqrt($q * (1 - $q) * total)))::BIGINT AS low,
       min(bucket) FILTER (seen >= least(total, ceil($q * total + 2 * sqrt($q * (1 - $q) * total))))::BIGINT AS high
FROM ranked GROUP BY host, kernel, cpu_model, isa, exit_reason
"""
_WALL = """
SELECT host, kernel, cpu_model, recordings.isa AS isa, sum(wall)::BIGINT AS wall_ns FROM recordings JOIN (
  SELECT checksum, sum(wall_ns) AS wall FROM vcpus GROUP BY checksum
) USING (checksum) GROUP BY host, kernel, cpu_model, recordings.isa
"""


@dataclass(frozen=True)
class HostMetrics:
    """One row per host, cohort and exit reason; arrays of the same length.

    Parameters
    ----------
    host, kernel, cpu_model, isa, name : object; None where not told
    exit_reason : int64
    count, samples : int64
    values : metric -> natural logarithm of its value; NaN where nothing can be said
    errors : metric -> standard error of that logarithm that comes from counting alone
    """

    host: NDArray[np.object_]
    kernel: NDArray[np.object_]
    cpu_model: NDArray[np.object_]
    isa: NDArray[np.object_]
    exit_reason: NDArray[np.int64]
    name: NDArray[np.object_]
    count: NDArray[np.int64]
    samples: NDArray[np.int64]
    share: NDArray[np.float64]
    values: dict[str, NDArray[np.float64]]
    errors: dict[str, NDArray[np.float64]]

    def __len__(self) -> int:
        return len(self.host)


def _objects(table: Any, name: str) -> NDArray[np.object_]:
    values = table.column(name).to_pylist()
    found = np.empty(len(values), np.object_)
    found[:] = values
    return found


def host_metrics(fleet: Fleet) -> HostMetrics:
    """Return the metrics of every host, several recordings of one added up."""
    rows = fleet.arrow(_PER_HOST)
    key = list(zip(*(rows.column(name).to_pylist() for name in ("host", "kernel", "cpu_model", "isa")), strict=True))
    walls = fleet.arrow(_WALL)
    wall_of = dict(
        zip(
            zip(*(walls.column(name).to_pylist() for name in ("host", "kernel", "cpu_model", "isa")), strict=True),
            walls.column("wall_ns").to_pylist(),
            strict=True,
        )
    )
    wall = np.array([wall_of.get(one, 0) for one in key], np.float64)
    numbers = {
        name: rows.column(name).to_numpy().astype(np.float64) for name in ("count", "samples", "total_ns", "squares")
    }
    count, samples, total, squares = (numbers[name] for name in ("count", "samples", "total_ns", "squares"))
    reasons = rows.column("exit_reason").to_numpy()
    median, median_error = _quantiles(fleet, key, reasons, 0.5)
    tail, tail_error = _quantiles(fleet, key, reasons, 0.99)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = total / samples
        spread = np.sqrt(np.maximum(squares / samples - mean**2, 0)) / mean
        values = {
            "rate": np.log((count + 0.5) / wall * 1e9),
            "share": np.where((samples >= MEAN_SAMPLES) & (total > 0), np.log(total / wall), np.nan),
            "mean": np.where((samples >= MEAN_SAMPLES) & (mean > 0), np.log(mean), np.nan),
            "p50": np.where(samples >= MEAN_SAMPLES, median, np.nan),
            "p99": np.where(samples >= TAIL_SAMPLES, tail, np.nan),
        }
        errors = {
            "rate": 1 / np.sqrt(count + 0.5),
            "share": np.sqrt(1 / count + spread**2 / samples),
            "mean": spread / np.sqrt(samples),
            "p50": np.maximum(median_error, HALF_BUCKET),
            "p99": np.maximum(tail_error, HALF_BUCKET),
        }
        share = total / wall
    values["rate"][wall <= 0] = np.nan
    return HostMetrics(
        host=_objects(rows, "host"),
        kernel=_objects(rows, "kernel"),
        cpu_model=_objects(rows, "cpu_model"),
        isa=_objects(rows, "isa"),
        exit_reason=reasons,
        name=_objects(rows, "name"),
        count=count.astype(np.int64),
        samples=samples.astype(np.int64),
        share=share,
        values=values,
        errors=errors,
    )


def _quantiles(
    fleet: Fleet, key: list[tuple[object, ...]], reasons: NDArray[np.int64], q: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the logarithm of each row's q-quantile and its error, NaN where it has none.

    The error is half the way between the percentiles that lie two standard deviations of the rank away.
    """
    rows = fleet.arrow(_QUANTILE.replace("$q", str(q)))
    names = ("host", "kernel", "cpu_model", "isa", "exit_reason")
    at = zip(*(rows.column(name).to_pylist() for name in ("bucket", "low", "high")), strict=True)
    found = dict(zip(zip(*(rows.column(name).to_pylist() for name in names), strict=True), at, strict=True))
    none = (None, None, None)
    own = [found.get((*one, reason), none) for one, reason in zip(key, reasons.tolist(), strict=True)]
    buckets = np.array([[np.nan if b is None or b == ZERO else b for b in row] for row in own], np.float64)
    octaves = (buckets.reshape(-1, 3) - 0.5) / PER_OCTAVE
    return np.log(2) * octaves[:, 0], np.log(2) * (octaves[:, 2] - octaves[:, 1]) / 2
