"""Trials of the flight recorder: guests of which one exit in many is slow, or breaks a rule, or none.

    python trials.py FOLDER --trials 50 --count 1000000 --slow-ms 40 --on 'slower-than 30ms:IO' --judge
    python trials.py FOLDER --trials 50 --count 20000 --fault kvm/parameters/repeat_cpuid=10000 --on model
    python trials.py FOLDER --trials 10 --count 1000000 --quiet --on 'slower-than 10s'

It runs where the KVM is, on this machine or in a lab, and writes FOLDER/trials.json: of each trial when the guest ran
and what was saved; what the recorder's memory was before and after. `judge` reads the recordings themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmtrace.workload import run_guest, vmm

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = "trials.json"
PATIENCE_S = 120.0  # for a recording, on an emulated host
MODULES = Path("/sys/module")
# ESI exits that stay in the kernel, one that leaves to userspace, and some more
LISTING = """; one exit in many leaves to userspace
start:
1000  66 be {count}         mov esi, COUNT
many:
1006  66 31 c0                  xor eax, eax
1009  0f a2                     cpuid
100b  66 4e                     dec esi
100d  75 f7                     jne 0x1006
100f  e6 80                     out 0x80, al              ; the one
1011  66 be e8 03 00 00         mov esi, 1000
few:
1017  66 31 c0                  xor eax, eax
101a  0f a2                     cpuid
101c  66 4e                     dec esi
101e  75 f7                     jne 0x1017
1020  30 c0                     xor al, al
1022  e6 f4                     out 0xf4, al              ; the exit port: status 0
"""


def guest_of(folder: Path, count: int) -> Path:
    """Write the guest that makes so many exits; return its file."""
    path = folder / "one-in-many.lst"
    path.write_text(LISTING.format(count=" ".join(f"{byte:02x}" for byte in count.to_bytes(4, "little"))))
    return path


def spin(ns: int) -> None:
    """Take so much of the CPU, however long others keep it meanwhile: time that is waited is no exit's."""
    end = time.thread_time_ns() + ns
    while time.thread_time_ns() < end:
        pass


def recordings(folder: Path) -> set[str]:
    """Return the names of what was saved."""
    return {path.name for path in folder.glob("kvmtrace-*")}


def resident_kib(pid: int) -> int:
    """Return the memory of a process."""
    match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1])


def run_trials(options: argparse.Namespace, running: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """Run the guest so many times; yield of each what it did and what was saved."""
    guest = guest_of(options.folder, options.count)
    slow = {"io": options.slow_ms * 10**6}
    for _ in range(options.trials):
        time.sleep(0 if options.quiet else options.keep)  # so that the promised time lies behind the last recording
        before = recordings(options.folder)
        if options.fault:
            place, _, value = options.fault.partition("=")
            (MODULES / place).write_text(value)
        began = time.monotonic_ns()
        run = run_guest(str(guest), slow_ns=slow, timeout_s=PATIENCE_S)
        ended = time.monotonic_ns()
        until = time.monotonic() + (0 if options.quiet else PATIENCE_S)
        while not recordings(options.folder) - before and time.monotonic() < until:
            time.sleep(0.05)
        yield {
            "began_ns": began,
            "ended_ns": ended,
            "succeeded": run.succeeded,
            "tids": list(run.vcpu_tids.values()),
            "saved": sorted(recordings(options.folder) - before),
            "resident_kib": resident_kib(running.pid),
        }


def main() -> None:
    """Run the trials under a flight recorder of their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--on", required=True, help="the trigger")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--count", type=int, default=20_000, help="exits of a guest before the one")
    parser.add_argument("--slow-ms", type=int, default=0, help="how long the VMM takes for the one")
    parser.add_argument("--fault", default="", help="MODULE/parameters/NAME=VALUE, written before each trial")
    parser.add_argument("--keep", type=float, default=1.0)
    parser.add_argument("--judge", action="store_true", help="look at what was saved, and print what came of it")
    parser.add_argument("--quiet", action="store_true", help="nothing is expected to be saved")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    vmm.spin = spin
    argv = [sys.executable, "-m", "kvmtrace", "watch", "-a", "-o", str(options.folder), "--on", options.on]
    argv += ["--keep", f"{options.keep:g}s", "--tail", "100ms", "--at-most", "1000/s", "--buffer-size", "128M"]
    log = options.folder / "watch.log"
    with log.open("wb") as stderr:
        running = subprocess.Popen(argv, stderr=stderr)
        while "watching" not in log.read_text():
            assert running.poll() is None, log.read_text()
            time.sleep(0.1)
        time.sleep(1)
        result = {"keep_s": options.keep, "count": options.count, "slow_ms": options.slow_ms, "on": options.on}
        result["trials"] = []
        for trial in run_trials(options, running):
            result["trials"].append(trial)
            note(options.folder, result)
        time.sleep(1)
        running.send_signal(signal.SIGTERM)
        result["status"] = running.wait(PATIENCE_S)
    note(options.folder, result)
    if options.judge:
        print(json.dumps(judge(options.folder), indent=1))


def note(folder: Path, result: dict[str, Any]) -> None:
    """Write down what there is so far: the host may fail."""
    result["files"] = sorted(recordings(folder))
    result["hidden"] = sorted(name for name in os.listdir(folder) if name.startswith("."))
    (folder / RESULTS).write_text(json.dumps(result, indent=1))


def judge(folder: Path) -> dict[str, Any]:
    """Look at what was saved: return how many trials were caught, with how much before, and whatever is wrong."""
    from kvmtrace.formats import open_recording
    from kvmtrace.report.build import build_report

    result = json.loads((folder / RESULTS).read_text())
    wrong, kept = [], []
    for number, trial in enumerate(result["trials"], 1):
        if len(trial["saved"]) != 1 or not trial["succeeded"]:
            wrong.append(f"trial {number}: saved {trial['saved']}, guest ended well: {trial['succeeded']}")
            continue
        recording = open_recording(folder / trial["saved"][0])
        report = build_report(recording)
        first = report.triggers[0]
        before_s = (first.ts_ns - recording.capture.meta["complete_from_ns"]) / 1e9
        kept.append(before_s)
        if before_s < result["keep_s"]:
            wrong.append(f"trial {number}: only {before_s:.3f} s before")
        if report.loss.events:
            wrong.append(f"trial {number}: {report.loss.events} events lost")
        wrong += [f"trial {number}: {text}" for text in _misses(result, trial, report)]
    wrong += [f"{name} was saved, too" for name in result["files"] if not _is_expected(name, result)]
    caught = len(kept)
    return {"trials": len(result["trials"]), "caught": caught, "least_before_s": min(kept, default=None),
            "exits_each": result["count"], "wrong": wrong}  # fmt: skip


def _is_expected(name: str, result: dict[str, Any]) -> bool:
    return any(name in trial["saved"] for trial in result["trials"])


def _misses(result: dict[str, Any], trial: dict[str, Any], report: Any) -> Iterator[str]:
    """Yield what of the cause the recording lacks: the slow exit itself, or the violation."""
    first = report.triggers[0]
    if result["slow_ms"]:
        if (first.tid not in trial["tids"]) or (first.dur_ns or 0) < result["slow_ms"] * 10**6:
            yield f"fired by thread {first.tid}, {first.dur_ns} ns"
        if not trial["began_ns"] <= first.ts_ns - (first.dur_ns or 0) <= trial["ended_ns"]:
            yield "fired outside the guest's time"
        longest = max((row.dur_ns for row in report.slowest if row.tid in trial["tids"]), default=0)
        longest = max([longest, *(row.max_ns or 0 for row in report.userspace_exits)])
        if longest < result["slow_ms"] * 10**6:
            yield f"the longest exit that was recorded is {longest} ns"
    elif report.model is None or not report.model.n_violations:
        yield "no violation was recorded"


if __name__ == "__main__":
    main()
