"""What each host, and each VM of it, did per VM-exit reason: rate, share of time, latency."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.stats.exponential_histogram import PER_OCTAVE, ZERO

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
BUCKET_BITS = 16  # a bucket's number fits
HALF_BUCKET = math.log(2) / PER_OCTAVE / 2

# what tells one host from others; its kernel may have been another at another time
_HOST = ("host", "kernel", "cpu_model", "isa")
# A VM is known by its name, which outlives its process; where two of a recording have the same, by the process as well.
_VMS = """(
  SELECT checksum, pid AS vm_pid, coalesce(name, uuid, comm, 'VM') ||
    CASE WHEN coalesce(name, uuid) IS NULL OR count(*) OVER (PARTITION BY checksum, coalesce(name, uuid)) > 1
    THEN ' (pid ' || pid || ')' ELSE '' END AS vm
  FROM vms
)"""
_NAMED = f"JOIN {_VMS} USING (checksum, vm_pid)"
_SEVERAL = f"SELECT host FROM exits {_NAMED} GROUP BY host HAVING count(DISTINCT vm) > 1"
ALONE = "the only one"  # what a VM is called in the rows of a host that has no other
_PER_UNIT = """
SELECT {unit}, exit_reason, any_value(name) AS name,
       sum(count)::BIGINT AS count, sum(samples)::BIGINT AS samples, sum(total_ns)::BIGINT AS total_ns,
       sum(squares_ns2::DOUBLE) AS squares
FROM exits {named} GROUP BY {unit}, exit_reason
ORDER BY {unit}, exit_reason
"""
# each row's place in the order of _PER_UNIT
_HISTOGRAMS = """
SELECT dense_rank() OVER (ORDER BY {unit}, exit_reason) - 1 AS place, buckets, counts
FROM exits {named} ORDER BY place
"""
_WALL = "SELECT {unit}, sum(wall_ns)::BIGINT AS wall_ns FROM vcpus {named} GROUP BY {unit}"


@dataclass(frozen=True)
class HostMetrics:
    """One row per host (or VM of a host), cohort and exit reason; arrays of the same length.

    Parameters
    ----------
    host, kernel, cpu_model, isa, name : object; None where not told
    vm : object, what the VM is called; None in the rows of hosts
    exit_reason : int64
    count, samples : int64
    values : metric -> natural logarithm of its value; NaN where nothing can be said
    errors : metric -> standard error of that logarithm that comes from counting alone
    """

    host: NDArray[np.object_]
    kernel: NDArray[np.object_]
    cpu_model: NDArray[np.object_]
    isa: NDArray[np.object_]
    vm: NDArray[np.object_]
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
    """Return a column of strings; equal ones are one object, of which a fleet has few."""
    column = table.column(name).combine_chunks().dictionary_encode()
    words: NDArray[np.object_] = np.array([*column.dictionary.to_pylist(), None], np.object_)
    found: NDArray[np.object_] = words[column.indices.fill_null(len(words) - 1).to_numpy(zero_copy_only=False)]
    return found


def host_metrics(fleet: Fleet) -> HostMetrics:
    """Return the metrics of every host, several recordings of one added up."""
    fleet.load("exits", "vcpus")
    return _metrics(fleet, _HOST, "")


def vm_metrics(fleet: Fleet, hosts: HostMetrics) -> HostMetrics | None:
    """Return the metrics of every VM; of one that is alone on its host they are the host's.

    Returns
    -------
    HostMetrics, None where no host has more than one VM
    """
    fleet.load("exits", "vcpus", "vms")
    several = set(fleet.arrow(_SEVERAL).column("host").to_pylist())
    if not several:
        return None
    together = _metrics(fleet, (*_HOST, "vm"), f"{_NAMED} WHERE host IN ({_SEVERAL})")
    return _joined(together, hosts, np.array([host not in several for host in hosts.host]))


def _joined(vms: HostMetrics, hosts: HostMetrics, chosen: NDArray[np.bool_]) -> HostMetrics:
    """Return the rows of VMs and behind them those chosen of the hosts, as VMs that are ALONE."""

    def both(one: NDArray[Any], other: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([one, other[chosen]])

    made: dict[str, Any] = {}
    for name, one in vars(vms).items():
        other = getattr(hosts, name)
        made[name] = {key: both(one[key], other[key]) for key in one} if isinstance(one, dict) else both(one, other)
    made["vm"][len(vms) :] = ALONE
    return HostMetrics(**made)


def _metrics(fleet: Fleet, unit: tuple[str, ...], named: str) -> HostMetrics:
    """Return a row per unit and exit reason.

    Parameters
    ----------
    unit : columns that tell one unit from others
    named : what joins the column `vm` to a table
    """
    words = {"unit": ", ".join(unit), "named": named}
    rows = fleet.arrow(_PER_UNIT.format(**words))
    walls = fleet.arrow(_WALL.format(**words))
    wall_of = dict(zip(_keys(walls, unit), walls.column("wall_ns").to_pylist(), strict=True))
    wall = np.array([wall_of.get(one, 0) for one in _keys(rows, unit)], np.float64)
    numbers = {
        name: rows.column(name).to_numpy().astype(np.float64) for name in ("count", "samples", "total_ns", "squares")
    }
    count, samples, total, squares = (numbers[name] for name in ("count", "samples", "total_ns", "squares"))
    reasons = rows.column("exit_reason").to_numpy()
    (median, median_error), (tail, tail_error) = _quantiles(
        fleet.batches(_HISTOGRAMS.format(**words)), len(wall), (0.5, 0.99)
    )
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
        vm=_objects(rows, "vm") if "vm" in unit else np.full(len(wall), None, np.object_),
        exit_reason=reasons,
        name=_objects(rows, "name"),
        count=count.astype(np.int64),
        samples=samples.astype(np.int64),
        share=share,
        values=values,
        errors=errors,
    )


def _keys(table: Any, unit: tuple[str, ...]) -> list[tuple[str | None, ...]]:
    return list(zip(*(_objects(table, name).tolist() for name in unit), strict=True))


def _quantiles(
    batches: Iterable[Any], n: int, quantiles: tuple[float, ...]
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Return the logarithm of each of n rows' quantiles and its error, NaN where it has none.

    The error is half the way between the percentiles that lie two standard deviations of the rank away.
    """
    buckets = np.full((len(quantiles), 3, n), np.nan)
    for place, bucket, count in _bins(batches):
        first = np.flatnonzero(np.diff(place, prepend=-1))  # of each row's bins
        seen = np.cumsum(count)
        before = seen[first] - count[first]
        total = np.append(before[1:], seen[-1]) - before
        for number, q in enumerate(quantiles):
            spread = 2 * np.sqrt(q * (1 - q) * total)
            ranks = (q * total, q * total - spread, np.minimum(total, np.ceil(q * total + spread)))
            for kind, rank in enumerate(ranks):
                # ranks begin at 1; below are those of the whole run of rows
                at = np.searchsorted(seen, before + np.maximum(np.ceil(rank), 1).astype(np.int64))
                buckets[number, kind, place[first]] = bucket[at]
    octaves = (np.where(buckets == ZERO, np.nan, buckets) - 0.5) / PER_OCTAVE
    return [(np.log(2) * middle, np.log(2) * (high - low) / 2) for middle, low, high in octaves]


def _bins(batches: Iterable[Any]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Give the histograms by place: (place, bucket, count) of some whole places after the other, in order."""
    held = [np.empty(0, np.int64)] * 3
    for batch in batches:
        lengths = np.diff(batch.column("buckets").offsets.to_numpy())
        place = np.repeat(batch.column("place").to_numpy(), lengths)
        new = (place, *(batch.column(name).flatten().to_numpy() for name in ("buckets", "counts")))
        parts = [np.concatenate(pair) for pair in zip(held, new, strict=True)]
        whole = int(np.searchsorted(parts[0], parts[0][-1])) if len(parts[0]) else 0
        held = [part[whole:] for part in parts]
        if whole:
            yield _added(*(part[:whole] for part in parts))
    if len(held[0]):
        yield _added(*held)


def _added(
    place: NDArray[np.int64], bucket: NDArray[np.int64], count: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the sums of counts by place and bucket, in their order."""
    keys = (place.astype(np.int64) << BUCKET_BITS) + (bucket.astype(np.int64) - ZERO)
    order = np.argsort(keys, kind="stable")  # which is quick where most of it is in order
    keys = keys[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    keys = keys[first]
    return keys >> BUCKET_BITS, (keys & ((1 << BUCKET_BITS) - 1)) + ZERO, np.add.reduceat(count[order], first)
