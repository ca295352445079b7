"""How fast and how small kvmtrace is, beside trace-cmd and perf, in one run.

    .venv/bin/python tests/bench/bench.py [--rounds R] [--quick] [-o FILE]

Every command runs once to warm the page cache and Python's byte code, then R times, the commands of a
comparison in turn, so that a busy moment hits all alike; figures are medians of whole processes, start-up
included, output to /dev/null. Peak memory is the largest resident set of the process (ru_maxrss). `--quick`
leaves out what takes 16 million events or more.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from loads import EXITS, ROOT, SMALL, perf_data, record_storm, trace_dat

if TYPE_CHECKING:
    from collections.abc import Sequence

RESULTS = ROOT / "bench-results"
KVMTRACE = [str(Path(sys.executable).with_name("kvmtrace"))]
ONE_CORE = ["taskset", "-c", "0"]
MIB = 1 << 20
SMALL_LIMIT_S, HELP_LIMIT_S, HTML_LIMIT_S = 0.7, 0.2, 5.0
SMALL_RATIO = 2.5


@dataclass
class Command:
    """A command and how its runs went (s, s, bytes)."""

    argv: list[str]
    exits: tuple[int, ...] = (0,)
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def run(self, *, keep: bool = True) -> None:
        """Run once."""
        began = time.perf_counter()
        process = subprocess.Popen(self.argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment())
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in self.exits:
            raise SystemExit(f"{' '.join(self.argv)}: exit code {process.returncode}")
        if keep:
            self.wall.append(wall)
            self.cpu.append(usage.ru_utime + usage.ru_stime)
            self.memory.append(usage.ru_maxrss * 1024)

    @property
    def seconds(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        return statistics.median(self.cpu)

    @property
    def said(self) -> str:
        return f"{self.seconds:.2f} s (CPU {self.cpu_seconds:.2f} s)"

    @property
    def peak(self) -> int:
        return max(self.memory)


@dataclass
class Result:
    """One line of the table.

    Parameters
    ----------
    met : None where nothing was promised
    """

    goal: str
    what: str
    measured: str
    wanted: str
    met: bool | None
    figures: dict[str, float]


def _environment() -> dict[str, str]:
    """Byte code is kept, as in any installation."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return environment | {"PYTHONPYCACHEPREFIX": str(RESULTS / "pycache")}


def alternate(commands: Sequence[Command], rounds: int) -> None:
    """Run all once for nothing, then in turn."""
    for command in commands:
        command.run(keep=False)
    for _ in range(rounds):
        for command in commands:
            command.run()


def kvmtrace(*arguments: str | Path, one_core: bool = False) -> Command:
    """Return a kvmtrace command; exit code 1 of `check` is a finding."""
    exits = (0, 1) if arguments[0] == "check" else (0,)
    return Command([*(ONE_CORE if one_core else ()), *KVMTRACE, *map(str, arguments)], exits)


def n_events(path: Path) -> int:
    """Count a recording's events."""
    from kvmtrace.formats import open_recording

    return sum(len(table) for table in open_recording(str(path)).iter_events())


def against_trace_cmd(path: Path, rounds: int) -> list[Result]:
    """Goal 1, and memory at this size (goal 4)."""
    ours, theirs = kvmtrace("report", "--format", "json", path), Command(["trace-cmd", "report", "-i", str(path)])
    one = kvmtrace("report", "--format", "json", path, one_core=True)
    plain = kvmtrace("report", "--no-model", "--format", "json", path)
    alternate([ours, theirs, one, plain], rounds)
    events, size = n_events(path), path.stat().st_size
    ratio, memory = theirs.seconds / ours.seconds, ours.peak / size
    return [
        Result(
            "1",
            f"report --format json, {events:,} events: {ours.seconds:.2f} s (CPU {ours.cpu_seconds:.2f} s, one "
            f"core {one.seconds:.2f} s, --no-model {plain.seconds:.2f} s); trace-cmd report "
            f"{theirs.seconds:.2f} s (CPU {theirs.cpu_seconds:.2f} s)",
            f"{ratio:.1f} x",
            ">= 4 x (aim 8)",
            ratio >= 4,
            {
                "ours_s": ours.seconds,
                "ours_cpu_s": ours.cpu_seconds,
                "one_core_s": one.seconds,
                "no_model_s": plain.seconds,
                "trace_cmd_s": theirs.seconds,
                "trace_cmd_cpu_s": theirs.cpu_seconds,
                "events": events,
            },
        ),
        Result(
            "4",
            f"its peak memory: {ours.peak / MIB:.0f} MiB for a trace of {size / MIB:.0f} MiB",
            f"{memory:.2f} x",
            "<= 2.5 x",
            memory <= 2.5,
            {"peak": ours.peak, "size": size},
        ),
    ]


def against_perf(path: Path, rounds: int, samples: int, least: float) -> list[Result]:
    """Goal 2 at one size; `least`: how many times as fast as perf it shall be."""
    ours = kvmtrace("report", "--no-model", "--perf-compatible", path)
    theirs = Command(["perf", "kvm", "-i", str(path), "stat", "report"])
    alternate([ours, theirs], rounds)
    ratio = theirs.seconds / ours.seconds
    return [
        Result(
            "2",
            f"report --no-model --perf-compatible, {samples:,} samples: {ours.seconds:.2f} s "
            f"(CPU {ours.cpu_seconds:.2f} s, {ours.peak / MIB:.0f} MiB); perf kvm stat report "
            f"{theirs.said} {theirs.peak / MIB:.0f} MiB",
            f"{ratio:.2f} x",
            f">= {least:g} x",
            ratio >= least,
            {"ours_s": ours.seconds, "perf_s": theirs.seconds, "samples": samples},
        )
    ]


def check_speed(path: Path, rounds: int) -> list[Result]:
    """Goal 3."""
    one, both = kvmtrace("check", path, one_core=True), kvmtrace("check", path)
    alternate([one, both], rounds)
    events = n_events(path)
    rate, gain = events / one.seconds, one.seconds / both.seconds
    return [
        Result(
            "3",
            f"check, {events:,} events, one core: {one.said}",
            f"{rate / 1e6:.2f} M/s",
            ">= 2 M/s",
            rate >= 2e6,
            {"one_s": one.seconds, "one_cpu_s": one.cpu_seconds, "events": events},
        ),
        Result(
            "3",
            f"check on two cores: {both.seconds:.2f} s",
            f"{gain:.2f} x",
            "> 1 x",
            gain > 1.1,
            {"both_s": both.seconds},
        ),
    ]


def growth(paths: Sequence[Path], rounds: int) -> list[Result]:
    """Goals 4 (bounded memory) and 5 (linear)."""
    rates, out = [], []
    for path in paths:
        command = kvmtrace("report", "--format", "json", path)
        alternate([command], rounds)
        events = n_events(path)
        rates.append(command.seconds / events)
        small = command.peak < 1.5 * 1024 * MIB
        out.append(
            Result(
                "4",
                f"report of {events:,} events: {command.said}",
                f"{command.peak / MIB:.0f} MiB",
                "< 1536 MiB",
                small,
                {"seconds": command.seconds, "events": events, "peak": command.peak},
            )
        )
    spread = rates[-1] / min(rates)
    out.append(
        Result(
            "5",
            "time per event, largest recording against the best: "
            + ", ".join(f"{rate * 1e9:.0f}" for rate in rates)
            + " ns",
            f"{spread:.2f} x",
            "<= 1.3 x",
            spread <= 1.3,
            {},
        )
    )
    return out


def start_up(rounds: int) -> list[Result]:
    """Goal 6."""
    small, usage = kvmtrace("report", SMALL), kvmtrace("--help")
    numpy = Command([sys.executable, "-c", "import numpy"])
    alternate([small, usage, numpy], rounds)
    ratio = small.seconds / numpy.seconds
    return [
        Result(
            "6",
            f"report of {n_events(SMALL):,} events {small.said}, `import numpy` alone {numpy.said}",
            f"{ratio:.2f} x",
            f"<= {SMALL_RATIO} x",
            ratio <= SMALL_RATIO,
            {"seconds": small.seconds, "numpy_s": numpy.seconds},
        ),
        Result(
            "6",
            f"report of {n_events(SMALL):,} events",
            f"{small.seconds:.2f} s",
            f"< {SMALL_LIMIT_S} s",
            small.seconds < SMALL_LIMIT_S,
            {"seconds": small.seconds},
        ),
        Result(
            "6",
            "kvmtrace --help",
            f"{usage.seconds:.2f} s",
            f"< {HELP_LIMIT_S} s",
            usage.seconds < HELP_LIMIT_S,
            {"seconds": usage.seconds},
        ),
    ]


def parquet(path: Path, rounds: int) -> list[Result]:
    """Goal 7."""
    target = path.with_suffix(".parquet")
    export = kvmtrace("export", path, "-o", target)
    for _ in range(rounds):
        target.unlink(missing_ok=True)
        export.run()
    of_parquet, of_trace = (kvmtrace("report", "--format", "json", p) for p in (target, path))
    alternate([of_parquet, of_trace], rounds)
    events = n_events(path)
    rate, ratio = events / export.seconds, of_trace.seconds / of_parquet.seconds
    return [
        Result(
            "7",
            f"export to Parquet: {export.said} {export.peak / MIB:.0f} MiB, file of "
            f"{target.stat().st_size / MIB:.0f} MiB",
            f"{rate / 1e6:.2f} M/s",
            ">= 1 M/s",
            rate >= 1e6,
            {"seconds": export.seconds, "events": events},
        ),
        Result(
            "7",
            f"report of the Parquet {of_parquet.seconds:.2f} s, of the trace.dat {of_trace.seconds:.2f} s",
            f"{ratio:.2f} x",
            "> 1 x",
            ratio > 1,
            {"seconds": of_parquet.seconds},
        ),
    ]


def html(path: Path, exits: int, rounds: int) -> list[Result]:
    """Goal 8."""
    target = RESULTS / "million.html"
    command = kvmtrace("report", "--format", "html", path, "-o", target)
    alternate([command], rounds)
    size = target.stat().st_size / 1e6
    met = command.seconds < HTML_LIMIT_S and size < 3
    return [
        Result(
            "8",
            f"HTML of {exits:,} exits: {command.said} {command.peak / MIB:.0f} MiB",
            f"{size:.2f} MB",
            f"< {HTML_LIMIT_S:g} s, < 3 MB",
            met,
            {"seconds": command.seconds, "megabytes": size},
        )
    ]


def measure(loads: Path, rounds: int, *, quick: bool) -> list[Result]:
    """Make the recordings and measure all goals."""
    record_storm(loads)
    out = against_trace_cmd(trace_dat(loads, 4), rounds)
    out += against_perf(perf_data(loads, 7), rounds, 14 * EXITS, 0.25)
    if not quick:
        out += against_perf(perf_data(loads, 70), rounds, 140 * EXITS, 1)
    out += check_speed(trace_dat(loads, 4), rounds)
    out += growth([trace_dat(loads, n) for n in ((1, 4) if quick else (1, 4, 16, 40))], rounds)
    out += start_up(max(rounds, 5))
    out += parquet(trace_dat(loads, 4), rounds)
    return out + html(trace_dat(loads, 6), 6 * EXITS, rounds)


def render(results: Sequence[Result]) -> str:
    """Return the table."""
    rows = [("goal", "measured", "wanted", "", "what")]
    rows += [(r.goal, r.measured, r.wanted, {True: "yes", False: "NO", None: ""}[r.met], r.what) for r in results]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join([*(row[i].ljust(widths[i]) for i in range(4)), row[4]]) for row in rows)


def main() -> None:
    """Measure, print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description="Measure kvmtrace's performance goals.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="nothing of 16 million events or more")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "bench.json")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    results = measure(RESULTS / "loads", options.rounds, quick=options.quick)
    print(render(results))
    print(
        f"load average before {load_before:.2f}, after {os.getloadavg()[0]:.2f}; {options.rounds} rounds; "
        f"{os.cpu_count()} CPUs"
    )
    document = {
        "schema": "kvmtrace.bench/1",
        "python": platform.python_version(),
        "kernel": platform.release(),
        "rounds": options.rounds,
        "load_before": load_before,
        "results": [asdict(r) for r in results],
    }
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
