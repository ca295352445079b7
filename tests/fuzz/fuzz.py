"""Fuzz everything that reads a file, guided by what is reached: python tests/fuzz/fuzz.py --minutes 30.

Beside it, libFuzzer runs the compiled loops alone. A supervisor runs one worker after another, so that a worker that
dies is a finding like any other. Their compiled loops count the basic blocks reached; of every second one the address
sanitizer watches them, of the others memory is bounded. Findings are kept, minimised, in --keep; move them to
tests/fuzz/crashers once repaired.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from pathlib import Path
from typing import Any

os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")  # others reserve gigabytes of addresses
os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # for the workers: and so does one of every thread
sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.case import ALL, EVENTS, REPORT, Outcome, run_case
from fuzz.loops_fuzz import build_target, result_of, start_target
from fuzz.minimise import minimised
from fuzz.mutations import mutate
from fuzz.own_build import COVERAGE, SANITIZE, count_blocks, environment, own_build
from fuzz.reached import TRACED, NativeEdges, Reached, line_coverage
from fuzz.seeds import composed, recorded_seeds, synthetic_seeds
from kvmtrace.scratch import ScratchFolder

MAX_CORPUS_BYTES = 200_000
WORKER_S = 600
# how often more is done with a file than reading all its events, and how often Python's lines are watched meanwhile:
# deep and watched cases take a hundred times as long as the others, which find what they are to be used for
SHARE_ALL, SHARE_REPORT = 0.01, 0.08
WATCHED = {EVENTS: 0.3, REPORT: 0.15, ALL: 0.1}
COMPOSED = "composed"  # in place of a seed's name
CUTS_UNSEEN = ("text", "summary", "qmp")  # a text may end behind any line


def place_of(error: BaseException) -> str:
    """Name a finding by its type and where in kvmtrace it came from: one per place is kept."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/kvmtrace/" in f.filename]
    if not frames:
        return type(error).__name__
    path = Path(frames[-1].filename)
    return f"{type(error).__name__}-{path.parent.name}-{path.stem}-{frames[-1].name}"


class Fuzzer:
    """The loop of one worker.

    Parameters
    ----------
    keep : directory for findings, and for inputs that reached something new
    seed : of the random numbers
    seeds : name -> file to begin with
    """

    def __init__(self, keep: Path, seed: int, seeds: dict[str, bytes] | None = None) -> None:
        self.keep, self.rng = keep, random.Random(seed)
        self.reached, self.native = Reached(), NativeEdges()
        self.counts: dict[str, int] = {"executions": 0, "refused": 0, "read": 0, "damage_stated": 0, "bytes": 0}
        self.findings: dict[str, int] = {}
        scratch = ScratchFolder("fuzz")
        weakref.finalize(self, scratch.close)
        self.path = str(scratch.path / "case")
        self.seeds = {**synthetic_seeds(), **recorded_seeds()} if seeds is None else seeds
        self.saved = keep / ".corpus"
        self.saved.mkdir(exist_ok=True)
        self.n_events: dict[str, int] = {}
        # what each seed led to: one is as likely to be used as another, however many files it has become
        self.corpus: dict[str, list[bytes]] = {name: [data] for name, data in self.seeds.items()}
        for name, data in self.seeds.items():
            outcome = self.execute(data, EVENTS, name, watched=True)
            assert outcome is not None, name
            assert outcome.n_events is not None, (name, outcome.error)
            self.n_events[name] = outcome.n_events
        for path in sorted(self.saved.iterdir()):  # what earlier workers found, as far as it still is new
            self.execute(path.read_bytes(), EVENTS, path.name.rpartition("-")[0], watched=True)

    def execute(self, data: bytes, depth: int, seed: str, *, watched: bool | None = None) -> Outcome | None:
        """Run one file that came of a seed, note what it reached; None where it is a finding."""
        watched = self.rng.random() < WATCHED[depth] if watched is None else watched
        Path(self.path).write_bytes(data)
        before = len(self.reached.edges)
        self.counts["executions"] += 1
        self.counts["bytes"] += len(data)
        try:
            case = functools.partial(run_case, self.path, depth)
            outcome: Outcome = self.reached.call(case) if watched else case()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
            sys.settrace(None)
            self.found(place_of(error), data, "".join(traceback.format_exception(error)), depth)
            return None
        if (self.native.grew() or len(self.reached.edges) > before) and len(data) <= MAX_CORPUS_BYTES:
            self.corpus.setdefault(seed, []).append(data)
            (self.saved / f"{seed}-{hashlib.sha1(data, usedforsecurity=False).hexdigest()}").write_bytes(data)
        self.counts["refused" if outcome.n_events is None else "read"] += 1
        self.counts["damage_stated"] += outcome.n_events is not None and outcome.stated
        return outcome

    def found(self, name: str, data: bytes, text: str, depth: int) -> None:
        """Keep a finding: the first of its place, minimised."""
        self.findings[name] = self.findings.get(name, 0) + 1
        target = self.keep / name
        if target.exists():
            return
        target.write_bytes(data)
        (self.keep / f"{name}.txt").write_text(f"depth {depth}\n{text}")
        print(f"FOUND {name}\n{text[-1500:]}", flush=True)
        if not name.startswith(("Hang", "MemoryError", "cut")):
            target.write_bytes(minimised(data, lambda part: self._fails(part, depth) == name, seconds=20))

    def _fails(self, data: bytes, depth: int) -> str:
        Path(self.path).write_bytes(data)
        try:
            run_case(self.path, depth)
        except BaseException as error:  # noqa: BLE001
            return place_of(error)
        return ""

    def step(self) -> None:
        """Run one mutated file."""
        rng = self.rng
        depth = ALL if rng.random() < SHARE_ALL else REPORT if rng.random() < SHARE_REPORT else EVENTS
        kind = rng.random()
        if kind < 0.1:
            self.check_cut()
        elif kind < 0.3:
            self.execute(composed(rng, mutate), depth, COMPOSED)
        else:
            seed = rng.choice(list(self.corpus))
            recent = self.corpus[seed][-50:] if rng.random() < 0.3 else self.corpus[seed]
            self.execute(mutate(rng, rng.choice(recent)), depth, seed)

    def check_cut(self) -> None:
        """Cut a seed: fewer events than before must not look like a whole recording."""
        name = self.rng.choice(list(self.seeds))
        data = self.seeds[name]
        part = data[: self.rng.randrange(len(data))]
        outcome = self.execute(part, EVENTS, name)
        if outcome is None or outcome.n_events is None or name in CUTS_UNSEEN:
            return
        if outcome.n_events > self.n_events[name] or (outcome.n_events < self.n_events[name] and not outcome.stated):
            self.found(f"cut-{name}", part, f"{len(part)} of {len(data)} bytes: {outcome}", EVENTS)

    def state(self) -> dict[str, Any]:
        """What this worker did."""
        return {
            "counts": self.counts,
            "findings": self.findings,
            "corpus": sum(map(len, self.corpus.values())),
            "edges": self.reached.named(),
            "native_edges": self.native.edges(),
            "native_blocks": self.native.blocks(),
        }


def work(keep: Path, seed: int, seconds: float) -> None:
    """Fuzz in this process until the time is over; the state is saved twice a minute."""
    fuzzer = Fuzzer(keep, seed)
    (keep / f".path-{seed}").write_text(fuzzer.path)
    end = time.monotonic() + seconds
    saved = 0.0
    while time.monotonic() < end:
        fuzzer.step()
        if time.monotonic() - saved > 20:
            saved = time.monotonic()
            (keep / f".state-{seed}").write_text(json.dumps(fuzzer.state()))
    (keep / f".state-{seed}").write_text(json.dumps(fuzzer.state()))


def summarise(keep: Path) -> str:
    """Return the figures of all workers."""
    states = [json.loads(path.read_text()) for path in sorted(keep.glob(".state-*"))]
    counts = {key: sum(s["counts"][key] for s in states) for key in (states[0]["counts"] if states else {})}
    edges = {tuple(edge) for s in states for edge in s["edges"]}
    lines = {(file, line) for file, _, line in edges}
    native = {number for s in states for number in s["native_edges"]}
    blocks = max((len(s["native_blocks"]) for s in states), default=0)
    rows = [f"{key.replace('_', ' ')}: {value:,}" for key, value in counts.items()]
    rows.append(
        f"inputs that reached something new: {len(list((keep / '.corpus').iterdir())):,}; "
        f"edges: {len(edges):,} of Python's lines, {len(native):,} of compiled code"
    )
    n_blocks = json.loads((keep / ".builds").read_text())
    rows.append(f"basic blocks of the compiled loops: {blocks:,} of {n_blocks:,}")
    rows.append(str(result_of(keep)))
    found = sorted(p.name for p in keep.iterdir() if p.name[0] != "." and p.suffix != ".txt")
    rows.append(f"findings: {', '.join(found) or 'none'}")
    for folder in TRACED[:4]:
        modules = line_coverage(lines, folder)
        ran, total = (sum(column) for column in zip(*modules.values(), strict=True))
        rows.append(f"line coverage of kvmtrace/{folder}: {100 * ran / total:.1f} % ({ran} of {total})")
        rows += [f"  {name}: {100 * a / b:.0f} %" for name, (a, b) in modules.items() if a < b]
    return "\n".join(rows)


def supervise(keep: Path, minutes: float, seed: int) -> int:
    """Run workers until the time is over; a worker that died left its input."""
    folder = keep / ".copies"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    builds = []
    for name, flags in (("bounded", COVERAGE), ("sanitized", (*SANITIZE, COVERAGE[2]))):
        (folder / name).mkdir()
        builds.append(environment(own_build(folder / name, flags, edges=True), sanitized=name == "sanitized"))
    (keep / ".builds").write_text(str(count_blocks(next((folder / "bounded").glob("kvmtrace/_native/*.so")))))
    end = time.monotonic() + 60 * minutes
    loops = start_target(build_target(folder), keep, f"-max_total_time={int(60 * minutes)}", f"-seed={seed}")
    try:
        if not run_workers(keep, seed, end, builds):
            return 1
        if loops.wait():
            print((keep / ".loops.log").read_text("utf-8", "replace")[-3000:])
    finally:
        loops.kill()
    print(summarise(keep))
    return int(any(p.name[0] != "." for p in keep.iterdir()))


def run_workers(keep: Path, seed: int, end: float, builds: list[dict[str, str]]) -> bool:
    """Run one worker after another; say whether they began at all."""
    while (left := end - time.monotonic()) > 3:
        seed += 1
        arguments = ["--worker", str(seed), "--keep", str(keep), "--seconds", str(min(left, WORKER_S))]
        command = [sys.executable, "-W", "error", __file__, *arguments]
        status = subprocess.run(command, env=builds[seed % len(builds)], check=False).returncode
        if status:
            print(f"worker {seed} ended with {status}", flush=True)
            path = keep / f".path-{seed}"
            if not path.exists():
                return False
            (keep / f"died-{seed}").write_bytes(Path(path.read_text()).read_bytes())
    return True


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description="Fuzz everything that reads a file.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, help="directory for findings (default: a new one)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options.keep, options.worker, options.seconds)
        return 0
    keep = options.keep or Path(tempfile.mkdtemp(prefix="kvmtrace-findings-"))
    keep.mkdir(parents=True, exist_ok=True)
    print(f"findings go to {keep}, seed {options.seed}", flush=True)
    return supervise(keep, options.minutes, options.seed)


if __name__ == "__main__":
    sys.exit(main())
