"""Triggers that fire on a real KVM: what made them fire is in what was saved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvmtrace.formats import open_recording
from kvmtrace.report.build import build_report
from tests.watch.test_exporter_kvm import run_guest
from tests.watch.test_watch_kvm import MS, left_by, saved, stop, watching
from tests.watch.trials import RESULTS, judge

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.kvm, pytest.mark.slow]

# runs guests one after the other once told to; a thread of its own per vCPU, one process
GUESTS = """
import sys
from kvmtrace.workload import run_guest
sys.stdin.readline()
for count, slow_ms in {runs}:
    run_guest("lifecycle", {{"count": count}}, slow_ns={{"io": slow_ms * 10**6}})
"""


def waiting_guests(*runs: tuple[int, int], cpu: int | None = None) -> subprocess.Popen[str]:
    """Start a VMM that waits for a line, so that it can be watched from the beginning."""
    argv = [sys.executable, "-P", "-c", GUESTS.format(runs=runs)]
    pinned = [] if cpu is None else ["taskset", "-c", str(cpu)]
    return subprocess.Popen([*pinned, *argv], stdin=subprocess.PIPE, text=True)


def go(guests: subprocess.Popen[str]) -> None:
    assert guests.stdin is not None
    guests.stdin.write("\n")
    guests.stdin.close()


def test_a_vcpu_that_waits_for_a_cpu_is_caught_with_who_had_it(tmp_path: Path) -> None:
    """A process that takes the vCPU's only CPU; the recording names it."""
    cpu = min(os.sched_getaffinity(0))
    guests = waiting_guests((300, 0), cpu=cpu)
    thief = None
    try:
        with watching(tmp_path, "--keep", "1s", "--on", "run-delay 1ms", target=("-p", str(guests.pid))) as running:
            thief = subprocess.Popen(["taskset", "-c", str(cpu), sys.executable, "-c", "while True: pass"])
            go(guests)
            path = saved(running)
            stop(running)
    finally:
        for process in (guests, thief):
            if process is not None:
                process.kill()
                process.wait()
    report = build_report(open_recording(path))
    first = report.triggers[0]
    assert (first.kind, first.pid) == ("run-delay", guests.pid)
    assert (first.dur_ns or 0) >= MS
    assert first.tid in {row.tid for row in report.vcpus}
    assert max(row.longest_ns for row in report.stolen if row.pid == guests.pid) >= MS
    assert left_by(running.pid) == set()


def test_a_quantile_above_its_limit_is_caught_once(tmp_path: Path) -> None:
    """Exits are quick at first, then slow: it fires once the slow ones are the hundredth of ten seconds."""
    guests = waiting_guests((400, 0), (60, 4))
    trigger = "slo p99 KVM_EXIT_IO > 2ms over 10s"
    try:
        with watching(tmp_path, "--keep", "2s", "--on", trigger, target=("-p", str(guests.pid))) as running:
            go(guests)
            path = saved(running)
            guests.wait()
            rest = stop(running)
    finally:
        guests.kill()
        guests.wait()
    assert "saved" not in rest
    report = build_report(open_recording(path))
    first = report.triggers[0]
    assert (first.kind, first.pid, first.reason) == ("slo", guests.pid, "KVM_EXIT_IO")
    assert (first.value or 0) > 2 * MS
    (row,) = (row for row in report.userspace_exits if row.name == "KVM_EXIT_IO")
    assert (row.max_ns or 0) >= 4 * MS


def test_the_part_before_is_there_though_the_model_was_just_asked(tmp_path: Path) -> None:
    """`model` has just begun a new part; what is saved then is given the last one."""
    arguments = ["--keep", "10s", "--on", "model", "--on", "signal USR1", "--at-most", "99/s"]
    with watching(tmp_path, *arguments) as running:
        run_guest("lifecycle", "--count", "50")
        until = time.monotonic() + 60
        while not list(tmp_path.glob(".kvmtrace-part-*-1.dat")):
            assert time.monotonic() < until
            time.sleep(0.05)
        running.send_signal(signal.SIGUSR1)
        path = saved(running)
        stop(running)
    before = tmp_path / f"{path.stem}-before.dat"
    assert {one.name for one in tmp_path.iterdir()} == {path.name, before.name}
    first, second = open_recording(before), open_recording(path)
    assert any(f"what was before is in {before.name}" in note for note in second.capture.meta["notes"])
    assert second.capture.meta["complete_from_ns"] <= int(first.events().ts_ns[-1]) + 100 * MS
    assert first.capture.meta["loss"]["events"] == second.capture.meta["loss"]["events"] == 0


def trials(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run trials.py on this machine; return what it found."""
    argv = [sys.executable, "-P", "-m", "tests.watch.trials", str(folder), *arguments]
    subprocess.run(argv, check=True, timeout=580)
    found: dict[str, Any] = json.loads((folder / RESULTS).read_text())
    assert found["status"] == 0
    assert not found["hidden"]
    return found


def test_one_slow_exit_in_a_million_is_caught_each_time(tmp_path: Path) -> None:
    """Ten of the fifty; `python tests/watch/trials.py` makes as many as asked for."""
    trials(tmp_path, "--trials", "10", "--count", "1000000", "--slow-ms", "60", "--on", "slower-than 30ms:IO")
    found = judge(tmp_path)
    assert not found["wrong"]
    assert found["caught"] == 10
    assert found["least_before_s"] >= 1


def test_ten_million_events_and_no_trigger_cost_neither_memory_nor_disk(tmp_path: Path) -> None:
    found = trials(tmp_path, "--trials", "10", "--count", "1000000", "--quiet", "--on", "slower-than 100s")
    assert not found["files"]
    first, *others = (trial["resident_kib"] for trial in found["trials"])
    assert max(others) < first + 1024
