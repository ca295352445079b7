"""How fast and how small kvmtrace is, beside trace-cmd, perf and another commit, in one run.

    .venv/bin/python tests/bench/bench.py [--rounds R] [--quick] [--only GOAL,...] [--base COMMIT] [-o FOLDER]

Every command runs once to warm the page cache and Python's byte code, then R times, the commands of a comparison in
turn; figures are medians of whole processes, start-up included, output to /dev/null. Ratios are of elapsed time; CPU
time stands beside it, which is what counts on a machine that does other things too. Peak memory is the largest
resident set of the process (ru_maxrss). `--quick` leaves out what takes 16 million events or more.

Each run leaves a JSON document and a Markdown table in bench-results/; none is overwritten.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loads import EXITS, SMALL, perf_data, record_storm, trace_dat
from measuring import (
    MIB,
    RESULTS,
    Command,
    Result,
    alternate,
    alternate_cold,
    at_least,
    at_most,
    kvmtrace,
    machine,
    other_commit,
    python,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FLAT_MIB = 400
READ = """
import pathlib, sys
data = memoryview(pathlib.Path({path!r}).read_bytes())
total = 0
for at in range(0, len(data), 1 << 20):
    total ^= hash(bytes(data[at:at + (1 << 20)]))
"""
EVENTS = """
import resource, kvmtrace
recording = kvmtrace.load({path!r})
events = recording.events{columns}
print(len(events))
"""
TIMELINE = """
import kvmtrace, matplotlib
matplotlib.use("agg")
from kvmtrace.plots import plot_timeline
plot_timeline(kvmtrace.load({path!r}))
"""


@dataclass(frozen=True)
class Bench:
    """What is measured, how often, and beside which other commit."""

    folder: Path
    rounds: int
    quick: bool
    base: Path | None

    def trace(self, times: int) -> Path:
        """Return a trace.dat of so many times about a million events."""
        return trace_dat(self.folder, times)


def n_events(path: Path) -> int:
    """Count a recording's events."""
    from kvmtrace.formats import open_recording

    return sum(len(table) for table in open_recording(str(path)).iter_events())


def full_report(bench: Bench) -> list[Result]:
    """Goal 1: beside trace-cmd, and beside another commit."""
    path = bench.trace(4)
    ours, theirs = kvmtrace("report", "--format", "json", path), Command(["trace-cmd", "report", "-i", str(path)])
    one = kvmtrace("report", "--format", "json", path, one_core=True)
    plain = kvmtrace("report", "--no-model", "--format", "json", path)
    before = [kvmtrace("report", "--format", "json", path, folder=bench.base)] if bench.base else []
    alternate(bench.rounds, ours, theirs, one, plain, *before)
    events = n_events(path)
    out = [
        at_least(
            "1",
            f"report of {events:,} events: {ours.said}, one core {one.said}; trace-cmd report {theirs.said}; "
            f"CPU time {theirs.cpu_seconds / ours.cpu_seconds:.1f} x",
            theirs.seconds / ours.seconds,
            12,
            ("ours", ours),
            ("one_core", one),
            ("trace_cmd", theirs),
        ),
        at_least(
            "1",
            f"statistics only (--no-model): {plain.said}; CPU time {theirs.cpu_seconds / plain.cpu_seconds:.1f} x",
            theirs.seconds / plain.seconds,
            12,
            ("no_model", plain),
        ),
        at_most(
            "5",
            f"peak memory of the report for a trace of {path.stat().st_size / MIB:.0f} MiB",
            ours.peak / path.stat().st_size,
            1.3,
            ("ours", ours),
        ),
    ]
    return [*out, *(_beside_base("1", "report", one, ours) for one in before)]


def _beside_base(goal: str, name: str, before: Command, now: Command, least: float = 1) -> Result:
    what = f"{name}: {now.said}, the other commit {before.said}; CPU time {before.cpu_seconds / now.cpu_seconds:.2f} x"
    return at_least(goal, what, before.seconds / now.seconds, least, ("now", now), ("base", before))


def statistics_of_perf(bench: Bench) -> list[Result]:
    """Goal 2: the tables of `perf kvm stat report`, beside perf itself, with the file in memory and not."""
    out = []
    perf_ns = 0.0
    for times in (3, 7) if bench.quick else (3, 7, 70):
        path, samples = perf_data(bench.folder, times), 2 * times * EXITS
        argv = ("report", "--no-model", "--perf-compatible", path)
        for state in ("warm", "cold"):
            ours, theirs = kvmtrace(*argv), Command(["perf", "kvm", "-i", str(path), "stat", "report"])
            if state == "warm":
                alternate(bench.rounds, ours, theirs)
                perf_ns = theirs.seconds / samples
            else:
                alternate_cold(bench.rounds, path, ours, theirs)
            out.append(_beside_perf(f"perf.data of {samples:,} samples, {state}", ours, theirs))
    path = bench.trace(4)
    tables, plain = kvmtrace("report", "--no-model", "--perf-compatible", path), kvmtrace("report", "--no-model", path)
    alternate(bench.rounds, tables, plain)
    for name, command in (("the same tables", tables), ("all statistics", plain)):
        ratio = perf_ns / (command.seconds / n_events(path))
        out.append(at_least("2", f"{name} of a trace.dat, per event: {command.said}", ratio, 1.5, ("ours", command)))
    return out


def _beside_perf(what: str, ours: Command, theirs: Command) -> Result:
    said = f"{what}: {ours.said}; perf kvm stat report {theirs.said}; CPU time {_cpu_ratio(theirs, ours)}"
    return at_least("2", said, theirs.seconds / ours.seconds, 1, ("ours", ours), ("perf", theirs))


def _cpu_ratio(theirs: Command, ours: Command) -> str:
    return f"{theirs.cpu_seconds / ours.cpu_seconds:.2f} x"


def check_speed(bench: Bench) -> list[Result]:
    """Goal 3: on one core and two, and beside another commit."""
    path = bench.trace(4)
    one, both = kvmtrace("check", path, one_core=True), kvmtrace("check", path)
    before = [kvmtrace("check", path, one_core=True, folder=bench.base)] if bench.base else []
    alternate(bench.rounds, one, both, *before)
    rate = n_events(path) / one.seconds / 1e6
    what = f"check on two cores: {both.said}; on one {one.said}, {rate:.1f} M events/s"
    out = [at_least("3", what, one.seconds / both.seconds, 1.6, ("one", one), ("both", both))]
    return [*out, *(_beside_base("3", "check on one core", other, one, 4) for other in before)]


def start_up(bench: Bench) -> list[Result]:
    """Goal 4."""
    small, usage, numpy = kvmtrace("report", SMALL), kvmtrace("--help"), python("import numpy")
    alternate(max(bench.rounds, 7), small, usage, numpy)
    what = f"report of {n_events(SMALL):,} events: {small.said}; `import numpy` {numpy.said}"
    ratio = small.cpu_seconds / numpy.cpu_seconds
    return [
        at_most("4", what, small.seconds / numpy.seconds, 2.5, ("small", small), ("numpy", numpy)),
        Result("4", "the same in CPU time", f"{ratio:.2f} x", "<= 2.5 x", ratio <= 2.5, {}),
        Result("4", "--help", f"{usage.seconds:.2f} s", "< 0.2 s", usage.seconds < 0.2, usage.figures("help")),
    ]


def memory(bench: Bench) -> list[Result]:
    """Goal 5: nothing grows with the recording."""
    path = bench.trace(4)
    commands = {"compare": kvmtrace("compare", path, path)}
    for suffix in (".pftrace", ".perfetto.json", ".parquet", ".arrow", ".csv"):
        target = RESULTS / f"export{suffix}"
        commands[f"export {suffix}"] = kvmtrace("export", path, "-o", target, "--force")
    commands["plot_timeline"] = python(TIMELINE.format(path=str(path)))
    commands['rec.events[["ts_ns", "event"]]'] = python(EVENTS.format(path=str(path), columns='[["ts_ns", "event"]]'))
    for times in () if bench.quick else (16, 40):
        large = bench.trace(times)
        commands[f"report of {times} million events"] = kvmtrace("report", "--format", "json", large)
        commands[f"check of {times} million events"] = kvmtrace("check", large)
    out = []
    for name, command in commands.items():
        command.run()
        peak = command.peak / MIB
        what = f"{name}: {command.said}"
        out.append(Result("5", what, f"{peak:.0f} MiB", f"<= {FLAT_MIB} MiB", peak <= FLAT_MIB, command.figures(name)))
    return out


def growth(bench: Bench) -> list[Result]:
    """Goal 6: time per event at all sizes."""
    rates = []
    for times in (1, 4) if bench.quick else (1, 4, 16, 64):
        command = kvmtrace("report", "--format", "json", bench.trace(times))
        alternate(1, command)
        rates.append((command.seconds - _start_up_s()) / n_events(bench.trace(times)) * 1e9)
    what = f"ns per event, start-up aside: {', '.join(f'{rate:.0f}' for rate in rates)}"
    return [at_most("6", what, max(rates) / min(rates), 1.15)]


def _start_up_s() -> float:
    command = kvmtrace("report", SMALL)
    alternate(3, command)
    return command.seconds


def exports(bench: Bench) -> list[Result]:
    """Goal 7."""
    path, target = bench.trace(4), RESULTS / "export.parquet"
    export = kvmtrace("export", path, "-o", target, "--grouped", "--force")
    alternate(bench.rounds, export)
    of_parquet, of_trace = (kvmtrace("report", "--format", "json", p) for p in (target, path))
    alternate(bench.rounds, of_parquet, of_trace)
    rate = n_events(path) / export.seconds / 1e6
    million = bench.trace(6)
    page = kvmtrace("report", "--format", "html", million, "-o", RESULTS / "million.html")
    document = kvmtrace("report", "--format", "json", million, "-o", RESULTS / "million.json")
    alternate(bench.rounds, page, document)
    return [
        Result("7", f"export to Parquet: {export.said}", f"{rate:.1f} M/s", ">= 3 M/s", rate >= 3, export.figures("x")),
        at_least(
            "7",
            f"report of that Parquet {of_parquet.said}, of the trace.dat {of_trace.said}",
            of_trace.seconds / of_parquet.seconds,
            1,
            ("parquet", of_parquet),
            ("trace", of_trace),
        ),
        at_most(
            "7",
            f"HTML of {6 * EXITS:,} exits {page.said}, JSON {document.said}",
            page.seconds / document.seconds,
            1.5,
            ("html", page),
            ("json", document),
        ),
    ]


def limit(bench: Bench) -> list[Result]:
    """Goal 9: beside reading the file and walking its bytes once; start-up aside."""
    path = bench.trace(4)
    ours, read, nothing = kvmtrace("report", "--format", "json", path), python(READ.format(path=str(path))), python("")
    alternate(bench.rounds, ours, read, nothing)
    work, floor = ours.seconds - _start_up_s(), read.seconds - nothing.seconds
    what = f"report, start-up aside: {work:.2f} s; reading and walking the file {floor:.2f} s"
    return [at_most("9", what, work / floor, 3, ("ours", ours), ("read", read))]


GOALS: dict[str, Callable[[Bench], list[Result]]] = {
    "1": full_report,
    "2": statistics_of_perf,
    "3": check_speed,
    "4": start_up,
    "5": memory,
    "6": growth,
    "7": exports,
    "9": limit,
}


def markdown(results: Sequence[Result], card: dict[str, object]) -> str:
    """Return the results as a table for the README."""
    lines = [f"{card['cpu']}, {card['cpus']} CPUs, load {card['load_before']:.1f}, commit {card['commit']}", ""]
    lines += ["| goal | what | measured | wanted | met |", "|---|---|---|---|---|"]
    for r in results:
        met = {True: "yes", False: "no", None: ""}[r.met]
        lines.append(f"| {r.goal} | {r.what} | {r.measured} | {r.wanted} | {met} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print the table, and keep it."""
    parser = argparse.ArgumentParser(description="Measure kvmtrace's performance goals.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="nothing of 16 million events or more")
    parser.add_argument("--only", help=f"goals, separated by commas, of {', '.join(GOALS)}")
    parser.add_argument("--base", help="a commit to measure beside this one")
    parser.add_argument("--loads", type=Path, default=RESULTS / "loads", help="where the recordings are made and kept")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    card = {**machine(), "rounds": options.rounds, "base": options.base, "load_before": os.getloadavg()[0]}
    record_storm(options.loads)
    base = other_commit(options.base) if options.base else None
    bench = Bench(options.loads, options.rounds, options.quick, base)
    chosen = options.only.split(",") if options.only else list(GOALS)
    results: list[Result] = []
    stem = options.output / time.strftime("bench-%Y%m%d-%H%M%S", time.gmtime())
    for goal in chosen:  # what was measured stays, however the rest ends
        results += GOALS[goal](bench)
        card["load_after"] = os.getloadavg()[0]
        document = {"schema": "kvmtrace.bench/2", **card, "results": [asdict(r) for r in results]}
        stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
        stem.with_suffix(".md").write_text(markdown(results, card))
        print(f"goal {goal}: measured", flush=True)
    print(f"{markdown(results, card)}\n{stem}.json and .md")


if __name__ == "__main__":
    main()
