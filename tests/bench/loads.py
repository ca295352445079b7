"""The recordings that the benchmarks work on: recorded once in the SVM lab, then repeated to the sizes wanted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from writers.repeat import repeat_trace_dat
from writers.repeat_perf import repeat_perf_data

EXITS = 165_000  # of the guest: about a million events
ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "fixtures" / "svm-6.1-storm.dat"
_COMMANDS = (
    f"kvmtrace record --guest storm --count {EXITS} -o storm.dat && "
    f"perf kvm stat record -m 2048 -a -o storm.perf.data {sys.executable} -m kvmtrace.workload storm --count {EXITS}"
)


def record_storm(folder: Path) -> None:
    """Record the guest `storm` with kvmtrace and with perf, in one boot of the lab; kept for the next time."""
    wanted = [folder / "storm.dat", folder / "storm.perf.data"]
    if all(path.exists() for path in wanted):
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"recording {EXITS:,} VM-exits in the SVM lab, twice (once; about two minutes)", flush=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "kvmtrace",
            "lab",
            "run",
            "--isa",
            "svm",
            "--cpus",
            "2",
            "-o",
            str(folder),
            "--",
            "sh",
            "-c",
            _COMMANDS,
        ],
        check=True,
    )


def trace_dat(folder: Path, times: int) -> Path:
    """Return a trace.dat of `times` times about a million events."""
    path = folder / f"storm-{times}.dat"
    if not path.exists():
        repeat_trace_dat(folder / "storm.dat", path, times)
    return path


def perf_data(folder: Path, times: int) -> Path:
    """Return a perf.data of `times` times about 330,000 samples."""
    path = folder / f"storm-{times}.perf.data"
    if not path.exists():
        repeat_perf_data(folder / "storm.perf.data", path, times)
    return path
