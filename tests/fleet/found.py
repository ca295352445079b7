"""What was found in a made fleet beside what was planted: `python tests/fleet/found.py N_HOSTS FIRST_SEED LAST_SEED`.

Prints a JSON object per seed: of outliers, broken rules, regressions and failures how many were planted, and which were
missed or reported wrongly.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest

from fleet.generator import KERNELS, make_fleet
from fleet.real_sources import put_sources
from fleet.s3_server import s3_server
from kvmtrace.fleet.cohorts import compare_cohorts
from kvmtrace.fleet.executors import Engine
from kvmtrace.fleet.fleet_report import build_fleet_report
from kvmtrace.fleet.reduce import Fleet
from kvmtrace.fleet.summarizing import summarize_all

if TYPE_CHECKING:
    from fleet.generator import Planted
    from fleet.real_sources import RealSources
    from kvmtrace.fleet.cohorts import FleetComparison
    from kvmtrace.fleet.fleet_report import FleetReport


@dataclass(frozen=True)
class MadeFleet:
    """A fleet and what is hidden in it; `folder` is a DEST."""

    folder: Path
    planted: Planted
    real: RealSources


def make_whole_fleet(folder: Path, n_hosts: int, seed: int, files: Any) -> MadeFleet:
    """Make a fleet whose healthy hosts are made, and whose other sources went through `fleet summarize`.

    Parameters
    ----------
    n_hosts : recordings, those that cannot be read included
    files : s3_server()
    """
    files.mkdir("traces")
    real = put_sources(files, seed)
    planted = make_fleet(folder, n_hosts - len(real.sources), seed)
    progress = summarize_all(Engine(workers=1), real.sources, str(folder))
    assert progress.counts == {"made": len(real.sources) - len(real.failures), "failed": len(real.failures)}
    return MadeFleet(folder, planted, real)


def ask(folder: Path) -> tuple[FleetReport, FleetComparison]:
    """Return the report over a fleet, and its two kernels compared."""
    with Fleet(str(folder)) as fleet:
        base, new = (fleet.part(f"kernel = '{kernel}'") for kernel in KERNELS)
        return build_fleet_report(fleet), compare_cohorts(base, new, KERNELS)


def expected_and_found(
    made: MadeFleet, report: FleetReport, compared: FleetComparison
) -> dict[str, tuple[set[Any], set[Any]]]:
    """Return what was planted and what was reported, of each kind."""
    outliers = {(*where, name) for where, (name, _) in made.planted.outliers.items()}
    with Fleet(str(made.folder)) as fleet:
        broken = fleet.arrow("SELECT DISTINCT host, rule FROM rules WHERE violated > 0").to_pylist()
        failures = fleet.arrow("SELECT source, kind FROM failures").to_pylist()
    assert {row.rule for row in report.findings} == {row["rule"] for row in broken}
    changed = {(change.cpu_model, change.what) for change in compared.changes if change.significant}
    return {
        "outliers": (outliers, {(one.host, one.vm, one.name) for one in report.outliers}),
        "faulty": (set(made.real.faulty), {(row["host"], row["rule"]) for row in broken}),
        "regressions": ({made.planted.regression}, changed),
        "failures": (set(made.real.failures.items()), {(row["source"], row["kind"]) for row in failures}),
    }


def _row(n_hosts: int, seed: int) -> dict[str, Any]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch, s3_server(patch) as files:
        made = make_whole_fleet(Path(folder) / "dest", n_hosts, seed, files)
        asked = time.monotonic()
        told = expected_and_found(made, *ask(made.folder))
    row: dict[str, Any] = {"seed": seed, "recordings": n_hosts}
    for kind, (expected, found) in told.items():
        row[kind] = {
            "planted": len(expected),
            "found": len(expected & found),
            "missed": sorted(map(str, expected - found)),
            "false": sorted(map(str, found - expected)),
        }
    return row | {"made_s": round(asked - began, 1), "asked_s": round(time.monotonic() - asked, 1)}


def main() -> None:
    """Print a row per seed."""
    n_hosts, first, last = map(int, sys.argv[1:])
    for seed in range(first, last + 1):
        print(json.dumps(_row(n_hosts, seed)), flush=True)


if __name__ == "__main__":
    main()
