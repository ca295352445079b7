"""What recording costs: added time per VM-exit and per event, of every recorder this machine has, in one run.

    .venv/bin/python tests/bench/bench_record.py [--count N] [--rounds R] [--only NAME,...] [--load LOAD] [-o FILE]

Every round runs a bundled guest once per contender, in turn, so that a busy moment hits all alike;
the figures come from the best and from the median round. What is measured is the CPU time that the VMM's
process takes for the run of the guest, without the start of the interpreter: waiting for a CPU that others
use does not count (it does in the column `wall`, the best round's elapsed time per event). What a recorder
itself takes (`CPU s`) stands beside it; for perf and trace-cmd it holds their start and end too.

Two loads. `storm` (CPUID in a loop) is for the recorders of events: all record the same tracepoints, those that
this KVM fires for it; kvmtrace records its whole event set. `userspace` (the guest `lifecycle`, over and over) is for
`--summary`, which has programs only where a vCPU's phases change: bpftrace counts the same tracepoints in a map. Where
a KVM fires kvm_entry and kvm_exit, `storm` shows both. The floors are what the kernel takes alone, see floors.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from floors import bare_ftrace, empty_programs

from kvmtrace.capture.bpf.summary_maps import EVENTS as SUMMARY_EVENTS
from kvmtrace.formats import open_recording

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

# the most frequent first; those that this machine's KVM does not fire for the load are harmless
STORM = tuple(
    ("kvm", name)
    for name in ("kvm_entry", "kvm_exit", "kvm_cpuid", "kvm_emulate_insn", "kvm_fpu", "kvm_pio", "kvm_userspace_exit")
)
EXITS_PER_ROUND = 102  # to userspace, of the guest lifecycle
SETTLE_S = 0.5  # the kernel detaches BPF programs and frees buffers after their process has ended
KVMTRACE = [sys.executable, "-m", "kvmtrace"]


@dataclass
class Run:
    """One run of the guest under one contender."""

    cpu_ns: float  # of the VMM
    wall_ns: int
    events: int | None = None
    lost: int | None = None
    recorder_cpu_s: float | None = None


@dataclass(frozen=True)
class Load:
    """What the guest does, and the tracepoints that all record of it."""

    name: str
    guest: str
    count: int  # the guest's argument
    exits: int
    tracepoints: tuple[tuple[str, str], ...]

    def known_tracepoints(self) -> list[tuple[str, str]]:
        """Return those that this kernel has."""
        return [(s, n) for s, n in self.tracepoints if Path("/sys/kernel/tracing/events", s, n).exists()]


@dataclass
class Contender:
    """A recorder, and how it is started."""

    name: str
    run: Callable[[Load, Path], Run]
    runs: list[Run] = field(default_factory=list)
    refused: str = ""


GUEST = """
import json, resource, sys, time
from kvmtrace.workload import run_guest
def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
before, began = cpu(), time.monotonic_ns()
run = run_guest(sys.argv[3], {"count": int(sys.argv[1])}, timeout_s=280)
assert run.succeeded, run
json.dump({"cpu_ns": (cpu() - before) * 1e9, "wall_ns": time.monotonic_ns() - began}, open(sys.argv[2], "w"))
"""


@dataclass
class Guest:
    """The guest's command line and where it says how long it took."""

    argv: list[str]
    result: Path

    @classmethod
    def prepare(cls, load: Load, directory: Path) -> Guest:
        """Return the guest of a load."""
        result = directory / "guest.json"
        result.unlink(missing_ok=True)
        return cls([sys.executable, "-c", GUEST, str(load.count), str(result), load.guest], result)

    def run(self, prefix: list[str]) -> tuple[Run, subprocess.CompletedProcess[str]]:
        """Run it under `prefix`; the CPU time of everything but the guest is the recorder's."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*prefix, *self.argv], capture_output=True, text=True, timeout=300, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if not self.result.exists():
            raise RuntimeError(((done.stderr + done.stdout).strip().splitlines() or ["the guest did not run"])[-1])
        took = json.loads(self.result.read_text())
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Run(took["cpu_ns"], took["wall_ns"], recorder_cpu_s=cpu_s - took["cpu_ns"] / 1e9), done


def run_bare(load: Load, directory: Path) -> Run:
    """No recorder."""
    return Guest.prepare(load, directory).run([])[0]


def run_kvmtrace(*options: str) -> Callable[[Load, Path], Run]:
    """Return a runner of `kvmtrace record OPTIONS`."""

    def run(load: Load, directory: Path) -> Run:
        output = directory / "kvmtrace.dat"
        run, _ = Guest.prepare(load, directory).run([*KVMTRACE, "record", "--force", *options, "-o", str(output), "--"])
        wait_detached()
        text = output.read_bytes()
        meta = json.loads(text)["meta"] if text[:1] == b"{" else open_recording(output).capture.meta
        output.unlink()
        cpu_ns = meta.get("recorder_cpu_ns")
        return replace(
            run, events=meta.get("n_events"), lost=meta["loss"]["events"], recorder_cpu_s=cpu_ns and cpu_ns / 1e9
        )

    return run


def wait_detached() -> None:
    """Wait until the kernel has detached the last recording's programs: they would cost the next contender time."""
    from kvmtrace.capture.bpf.bpf_syscall import loaded_programs

    while loaded_programs():
        time.sleep(0.2)


def run_service(ready: str, *arguments: str) -> Callable[[Load, Path], Run]:
    """Return a runner of the guest while a service of kvmtrace looks at the whole machine."""

    def run(load: Load, directory: Path) -> Run:
        told = directory / "service.log"
        with told.open("wb") as log:
            service = subprocess.Popen([*KVMTRACE, *arguments], stderr=log, cwd=directory)
            try:
                while ready not in (text := told.read_text()):
                    if service.poll() is not None:
                        raise RuntimeError((text.strip().splitlines() or ["it ended"])[-1])
                    time.sleep(0.1)
                return Guest.prepare(load, directory).run([])[0]
            finally:
                service.terminate()
                service.wait(120)
                wait_detached()

    return run


WATCH = ("watching", "watch", "-a", "-o", ".", "--on", "slower-than 10s")
EXPORTER = ("exporting to", "exporter", "--no-listen", "--textfile", "kvmtrace.prom")


def run_perf(*options: str) -> Callable[[Load, Path], Run]:
    """Return a runner of `perf record OPTIONS`."""
    return lambda load, directory: _run_perf(load, directory, options)


def _run_perf(load: Load, directory: Path, options: tuple[str, ...]) -> Run:
    output = directory / "perf.data"
    prefix = ["perf", "record", *options, "-o", str(output)]
    for system, name in load.known_tracepoints():
        prefix += ["-e", f"{system}:{name}"]
    run, _ = Guest.prepare(load, directory).run([*prefix, "--"])
    report = subprocess.run(
        ["perf", "report", "-i", str(output), "--stats"], capture_output=True, text=True, check=True
    )
    samples = re.search(r"SAMPLE events:\s+(\d+)", report.stdout)
    lost = _perf_lost(output) if re.search(r"\bLOST(_SAMPLES)? events:", report.stdout) else 0
    output.unlink()
    if samples is None or int(samples[1]) < load.exits:
        raise RuntimeError("a BPF program on the same tracepoints keeps the samples from perf")
    return replace(run, events=int(samples[1]), lost=lost)


def _perf_lost(path: Path) -> int:
    """Return how many samples perf says it lost."""
    script = subprocess.run(
        ["perf", "script", "-i", str(path), "--show-lost-events", "-F", "event"],
        capture_output=True,
        text=True,
        check=True,
    )
    return sum(int(number) for number in re.findall(r"PERF_RECORD_LOST(?:_SAMPLES)? lost (\d+)", script.stdout))


def run_trace_cmd(load: Load, directory: Path) -> Run:
    """Run trace-cmd record, which refuses on a locked-down host."""
    output = directory / "trace.dat"
    prefix = ["trace-cmd", "record", "-C", "mono", "-b", "16384", "-o", str(output), "-F", "-c"]
    for system, name in load.known_tracepoints():
        prefix += ["-e", f"{system}:{name}"]
    run, done = Guest.prepare(load, directory).run(prefix)
    if not output.exists():
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    output.unlink()
    return run


def run_bpftrace(load: Load, directory: Path) -> Run:
    """Count events by name in a BPF map: no event leaves the kernel."""
    places = ",".join(f"tracepoint:{system}:{name}" for system, name in load.known_tracepoints())
    program = places + " { @[probe] = count(); }"
    # not with -c: it must be attached before the guest begins
    with subprocess.Popen(
        ["bpftrace", "-e", f'BEGIN {{ printf("up\\n"); }} {program}'],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as tracer:
        assert tracer.stdout is not None
        while (line := tracer.stdout.readline()) and line.strip() != "up":
            pass
        if not line:
            raise RuntimeError((tracer.communicate()[1].strip().splitlines() or ["bpftrace failed"])[-1])
        try:
            run, _ = Guest.prepare(load, directory).run([])
        finally:
            tracer.send_signal(2)
            counts = tracer.communicate(timeout=30)[0]
    events = sum(int(n) for n in re.findall(r"\]: (\d+)", counts))
    return replace(run, events=events, lost=0, recorder_cpu_s=None)


def run_floor(floor: Callable[[list[tuple[str, str]]], AbstractContextManager[None]]) -> Callable[[Load, Path], Run]:
    """Return a runner with nothing but what the kernel does for an event."""

    def run(load: Load, directory: Path) -> Run:
        with floor(load.known_tracepoints()):
            return Guest.prepare(load, directory).run([])[0]

    return run


def contenders() -> list[Contender]:
    """Return everything that is compared; the first is the baseline."""
    return [
        Contender("none", run_bare),
        Contender("kvmtrace ftrace", run_kvmtrace("--backend", "ftrace")),
        Contender("kvmtrace bpf", run_kvmtrace("--backend", "bpf")),
        Contender("kvmtrace --summary", run_kvmtrace("--summary")),
        Contender("kvmtrace --monitor", run_kvmtrace("--monitor")),
        Contender("kvmtrace watch", run_service(*WATCH)),
        Contender("watch --on monitor", run_service(*WATCH, "--on", "monitor")),
        Contender("kvmtrace exporter", run_service(*EXPORTER)),
        Contender("exporter --monitor", run_service(*EXPORTER, "--monitor")),
        Contender("perf record", run_perf()),
        Contender("perf record -m 16M", run_perf("-m", "16M")),
        Contender("bpftrace count", run_bpftrace),
        Contender("trace-cmd record", run_trace_cmd),
        Contender("floor: ftrace", run_floor(bare_ftrace)),
        Contender("floor: BPF", run_floor(lambda names: empty_programs(names, raw=False))),
        Contender("floor: raw BPF", run_floor(lambda names: empty_programs(names, raw=True))),
    ]


def loads(count: int) -> list[tuple[Load, set[str] | None]]:
    """Return the loads, each with the names of its contenders (None: all)."""
    rounds = max(1, count // EXITS_PER_ROUND)
    summary = {"none", "kvmtrace --summary", "kvmtrace --monitor", "bpftrace count", "floor: BPF", "floor: raw BPF",
               "perf record",
               "kvmtrace watch", "watch --on monitor", "kvmtrace exporter", "exporter --monitor", "kvmtrace ftrace",
               "floor: ftrace"}  # fmt: skip
    return [
        (Load("storm", "storm", count, count, STORM), None),
        (Load("userspace", "lifecycle", rounds, rounds * EXITS_PER_ROUND, SUMMARY_EVENTS), summary),
    ]


def measure(chosen: list[Contender], load: Load, rounds: int) -> None:
    """Run all contenders in turn, `rounds` times."""
    with tempfile.TemporaryDirectory(prefix="kvmtrace-bench-") as name:
        for _ in range(rounds):
            for contender in chosen:
                if contender.refused and not contender.runs:
                    continue
                time.sleep(SETTLE_S)
                try:
                    contender.runs.append(contender.run(load, Path(name)))
                except (RuntimeError, OSError, KeyError, subprocess.SubprocessError) as error:
                    contender.refused = str(error).splitlines()[0]


def summarise(chosen: list[Contender], load: Load) -> list[dict[str, Any]]:
    """Return a row per contender: added ns per VM-exit and per event over the first contender.

    What counts no events itself had as many as bpftrace or perf counted.
    """
    counted = next((c.runs[0].events for c in reversed(chosen) if c.runs and c.runs[0].events), None)
    rows = []
    base = chosen[0].runs
    for contender in chosen:
        row: dict[str, Any] = {"name": contender.name, "refused": contender.refused}
        if contender.runs:
            for label, pick in (("best", min), ("median", statistics.median)):
                own = pick([run.cpu_ns for run in contender.runs])
                added = (own - pick([run.cpu_ns for run in base])) / load.exits
                row[f"ns_per_exit_{label}"] = added
                events = contender.runs[0].events or (counted if contender is not chosen[0] else None)
                row[f"ns_per_event_{label}"] = added * load.exits / events if events else None
                walls = pick([run.wall_ns for run in contender.runs]) - pick([run.wall_ns for run in base])
                row[f"wall_ns_per_event_{label}"] = walls / events if events else None
            last = min(contender.runs, key=lambda run: run.cpu_ns)
            row |= {
                "events": last.events,
                "lost": last.lost,
                "recorder_cpu_s": last.recorder_cpu_s,
                "guest_s": last.cpu_ns / 1e9,
                "events_per_s": last.events / last.wall_ns * 1e9 if last.events else None,
            }
        rows.append(row)
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table."""

    def number(value: float | None, form: str = ",.0f") -> str:
        return "-" if value is None else format(value, form)

    titles = f"{'recorder':20} {'guest s':>8} {'+ns/exit':>9} {'median':>8} {'+ns/event':>10} {'median':>8} {'wall':>6}"
    lines = [titles + f" {'events':>11} {'lost':>8} {'events/s':>10} {'CPU s':>6}"]
    for row in rows:
        if "guest_s" not in row:
            lines.append(f"{row['name']:20} {row['refused']}")
            continue
        lines.append(
            f"{row['name']:20} {row['guest_s']:8.3f} {number(row['ns_per_exit_best']):>9}"
            f" {number(row['ns_per_exit_median']):>8} {number(row['ns_per_event_best']):>10}"
            f" {number(row['ns_per_event_median']):>8} {number(row['wall_ns_per_event_best']):>6}"
            f" {number(row['events']):>11} {number(row['lost']):>8}"
            f" {number(row['events_per_s']):>10} {number(row['recorder_cpu_s'], '.2f'):>6}"
        )
    return "\n".join(lines)


# load, contenders, per what, goal
GOALS = (
    ("storm", "kvmtrace ftrace", "perf record", "event", 1 / 3),
    ("storm", "kvmtrace bpf", "perf record", "event", 1.0),
    ("userspace", "kvmtrace --summary", "bpftrace count", "event", 0.5),
    ("userspace", "kvmtrace exporter", "kvmtrace --summary", "exit", None),
    ("userspace", "kvmtrace watch", "kvmtrace --summary", "exit", None),
    ("userspace", "kvmtrace watch", "floor: ftrace", "exit", None),
)


def render_goals(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return a line per pair: the ratio of the added cost of two contenders, and the goal if there is one."""
    lines = []
    for load, ours, theirs, per, goal in GOALS:
        rows = {row["name"]: row for row in results.get(load, [])}
        if not all("guest_s" in rows.get(name, {}) for name in (ours, theirs)):
            continue
        best, median = (rows[ours][key] / rows[theirs][key] for key in (f"ns_per_{per}_best", f"ns_per_{per}_median"))
        aim = "" if goal is None else f", goal {goal:.2f}"
        lines.append(f"{ours} / {theirs} per {per}, {load}: {best:.2f} (of medians: {median:.2f}){aim}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300_000, help="VM-exits per run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="names of contenders, separated by commas")
    parser.add_argument("--load", help="storm or userspace; default: both")
    parser.add_argument("-o", "--output", type=Path, default=Path("bench-results/record.json"))
    options = parser.parse_args()
    results = {}
    for load, names in loads(options.count):
        if options.load not in (None, load.name):
            continue
        only = {"none", *options.only.split(",")} if options.only else None
        chosen = [c for c in contenders() if (not only or c.name in only) and (not names or c.name in names)]
        measure(chosen, load, options.rounds)
        results[load.name] = summarise(chosen, load)
        print(f"{load.name}: {load.exits:,} VM-exits, {options.rounds} rounds, {os.uname().release}")
        print(render(results[load.name]) + "\n", flush=True)
    print(render_goals(results))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"count": options.count, "rounds": options.rounds, "loads": results}
    options.output.write_text(json.dumps(result, indent=2))
    print(f"\n{options.output}")


if __name__ == "__main__":
    main()
