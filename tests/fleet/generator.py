"""A made fleet: summaries of real recordings, varied by a seeded model, with faults planted where the test knows.

Every VM of every host varies by its own factors (latency and rate per exit reason, logarithmically normal); what is
planted stands out of that by a known amount.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvmtrace.fleet.summarize import summarize
from kvmtrace.fleet.summary_schema import SUMMARY
from kvmtrace.stats.exponential_histogram import PER_OCTAVE, middle_ns, quantile_ns

if TYPE_CHECKING:
    from numpy.random import Generator

ROOT = Path(__file__).parents[2]
LATENCY_SPREAD, RATE_SPREAD = 0.06, 0.10
MODELS = ("Model A", "Model B", "Model C")
KERNELS = ("6.1.0-30-amd64", "6.12.9-amd64")
# what the hosts run, by instruction set
BASES = {"svm": "svm-6.1-linux-1vcpu.dat", "vmx": "vmx-6.1-linux-1vcpu.dat"}
SVM_MODEL = "Model C"
ROWS_PER_OBJECT = 500
VMS = {4: 3, 40: 8}  # of every so many-th host of each model and kernel; of the others one
N_HOSTS_UNLIKE, N_VMS_UNLIKE = 7, 3
KINDS = ("rate", "rate", "latency", "latency", "tail", "tail", "silence", *("latency", "rate", "latency"))
CHANGES = {"rate": (1, 4), "latency": (3, 1), "silence": (1, 0.1)}  # of times, of numbers
FIRST_DAY = datetime(2026, 11, 23, tzinfo=UTC)


@dataclass
class Planted:
    """What was hidden in a fleet.

    Parameters
    ----------
    outliers : (host, VM or None) -> (exit reason's name, kind)
    regression : (CPU model, exit reason's name)
    """

    outliers: dict[tuple[str, str | None], tuple[str, str]] = field(default_factory=dict)
    regression: tuple[str, str] = ("", "")


@lru_cache
def base_summary(isa: str) -> dict[str, Any]:
    """Return the summary of a real recording."""
    path = ROOT / "fixtures" / BASES[isa]
    return summarize(path, path.name)


@lru_cache
def _middle(bucket: int) -> int:
    return round(middle_ns(bucket))


def shifted(row: dict[str, Any], latency: float, rate: float, rng: Generator) -> None:
    """Vary one exit row: its times by a factor, its number by another."""
    steps = round(PER_OCTAVE * math.log2(latency))
    unpaired = row["count"] - row["samples"]
    counts = rng.poisson(np.array(row["counts"], np.float64) * rate)
    buckets = np.array(row["buckets"], np.int64) + steps
    _refill(row, buckets, counts)
    row["count"] = row["samples"] + unpaired


def _refill(row: dict[str, Any], buckets: np.ndarray, counts: np.ndarray) -> None:
    kept = counts > 0
    buckets, counts = buckets[kept], counts[kept]
    middles = np.array([_middle(bucket) for bucket in buckets.tolist()], np.int64)
    row |= {
        "buckets": buckets.tolist(),
        "counts": counts.tolist(),
        "samples": int(counts.sum()),
        "total_ns": int((middles * counts).sum()),
        "squares_ns2": Decimal(sum(m * m * n for m, n in zip(middles.tolist(), counts.tolist(), strict=True))),
        "min_ns": int(middles.min()) if len(middles) else None,
        "max_ns": int(middles.max()) if len(middles) else None,
    }


def longer_tail(row: dict[str, Any]) -> None:
    """Make every 20th VM-exit of a row 200 times as long: its median stays, its 99th percentile is far off."""
    counts = np.array(row["counts"], np.int64)
    slow = counts // 20
    buckets = np.array(row["buckets"], np.int64)
    merged: dict[int, int] = {}
    for bucket, count in zip(
        [*buckets.tolist(), *(buckets + round(PER_OCTAVE * math.log2(200))).tolist()],
        [*(counts - slow).tolist(), *slow.tolist()],
        strict=True,
    ):
        merged[bucket] = merged.get(bucket, 0) + count
    keys = sorted(merged)
    _refill(row, np.array(keys), np.array([merged[key] for key in keys]))


def _n_vms(number: int) -> int:
    place = number // (len(MODELS) * len(KERNELS))
    return next((n for every, n in sorted(VMS.items(), reverse=True) if place % every == 0), 1)


def make_host(number: int, model: str, kernel: str, rng: Generator) -> dict[str, Any]:
    """Return the summary of a healthy host."""
    base = base_summary("svm" if model == SVM_MODEL else "vmx")
    begun = FIRST_DAY + timedelta(seconds=int(rng.integers(0, 3 * 86400)))
    row = {**base, "exits": [], "vcpus": [], "vms": []}
    row |= {
        "checksum": f"{number:064x}",
        "source": f"s3://traces/host-{number:05}.dat",
        "host": f"host-{number:05}",
        "kernel": kernel,
        "cpu_model": model,
        "started": begun.isoformat(),
        "day": begun.date().isoformat(),
    }
    for place in range(_n_vms(number)):
        pid = 1000 + place
        row["vms"].append({"pid": pid, "comm": "qemu-system-x86", "name": f"web-{number}-{place}", "uuid": None})
        for rows in ("exits", "vcpus"):
            row[rows] += [{**one, "vm_pid": pid, "tid": one["tid"] + place} for one in base[rows]]
    for exits in row["exits"]:
        shifted(exits, math.exp(rng.normal(0, LATENCY_SPREAD)), math.exp(rng.normal(0, RATE_SPREAD)), rng)
    return row


def _busiest(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the exit rows of a host's first VM that are many enough for every metric, by time."""
    first = row["vms"][0]["pid"]
    return sorted(
        (e for e in row["exits"] if e["samples"] > 600 and e["vm_pid"] == first), key=lambda e: -e["total_ns"]
    )


def _is_short_tailed(row: dict[str, Any]) -> bool:
    """Say whether a long tail would be news."""
    counts = dict(zip(row["buckets"], row["counts"], strict=True))
    return (quantile_ns(counts, 0.998) or 0) < 10 * (quantile_ns(counts, 0.5) or 0)


def _plant(row: dict[str, Any], kind: str, pid: int | None, rng: Generator) -> tuple[str, str]:
    """Make one of a host's exit reasons unlike its peers', of one VM or of all; return its name and the kind."""
    candidates = [e for e in _busiest(row) if kind != "tail" or _is_short_tailed(e)]
    if not candidates:
        kind, candidates = "latency", _busiest(row)
    name = candidates[int(rng.integers(0, len(candidates)))]["name"]
    for exits in row["exits"]:
        if exits["name"] != name or (pid is not None and exits["vm_pid"] != pid):
            continue
        if kind == "tail":
            longer_tail(exits)
        else:
            shifted(exits, *CHANGES[kind], rng)
    return name, kind


def _unlike(n_hosts: int, rng: Generator) -> dict[int, tuple[str, bool]]:
    """Return the numbers of the hosts to plant something in -> (kind, whether in one of its VMs alone)."""
    order = rng.permutation(n_hosts).tolist()
    of_vms = [next(n for n in order if _n_vms(n) == 8), *[n for n in order if _n_vms(n) == 3][:2]]
    hosts = [n for n in order if n not in of_vms][:N_HOSTS_UNLIKE]
    places = [*((host, False) for host in hosts), *((host, True) for host in of_vms[:N_VMS_UNLIKE])]
    return {host: (kind, vm) for (host, vm), kind in zip(places, KINDS, strict=True)}


def make_fleet(folder: Path, n_hosts: int, seed: int) -> Planted:
    """Write the summaries of a made fleet.

    Parameters
    ----------
    folder : becomes a DEST
    """
    rng = np.random.default_rng(seed)
    planted, unlike = Planted(), _unlike(n_hosts, rng)
    model, regressed = MODELS[0], ""
    rows: list[dict[str, Any]] = []
    target = folder / "summaries" / "day=mixed" / "kernel=mixed" / "cpu_model=mixed"
    target.mkdir(parents=True)
    for number in range(n_hosts):
        own_model, kernel = MODELS[number % 3], KERNELS[(number // 3) % 2]
        row = make_host(number, own_model, kernel, rng)
        if own_model == model and kernel == KERNELS[1]:
            regressed = regressed or str(_busiest(row)[1]["name"])
            for exits in row["exits"]:
                if exits["name"] == regressed:
                    shifted(exits, 1.08, 1.0, rng)
        if number in unlike:
            kind, in_a_vm = unlike[number]
            vm = row["vms"][int(rng.integers(0, len(row["vms"])))] if in_a_vm else {"pid": None, "name": None}
            planted.outliers[row["host"], vm["name"]] = _plant(row, kind, vm["pid"], rng)
        rows.append(row)
        if len(rows) == ROWS_PER_OBJECT or number == n_hosts - 1:
            table = pa.Table.from_pylist(rows, schema=SUMMARY)
            pq.write_table(table, target / f"{number:064x}.parquet", compression="zstd")
            rows = []
    planted.regression = (model, regressed)
    return planted
