"""The flight recorder on this machine's KVM: what it catches, what it leaves."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmtrace.capture.recover import reclaim
from kvmtrace.capture.tracefs import find_tracefs
from kvmtrace.formats import open_recording
from kvmtrace.report.build import build_report
from tests.capture.bpf_held import forgotten_programs
from tests.watch.test_exporter_kvm import assert_unloaded, run_guest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.kvm, pytest.mark.slow]  # minutes on a busy machine

MS = 10**6


def left_by(pid: int) -> set[str]:
    """Return what there is of a process in tracefs; others may be recording."""
    tracefs = find_tracefs()
    instances = {path.name for path in (tracefs / "instances").iterdir() if path.name.startswith(f"kvmtrace-{pid}-")}
    control = tracefs / "kprobe_events"  # not in every kernel
    probes = re.findall(rf"kvmtrace_{pid}_\w+", control.read_text()) if control.exists() else []
    return instances | set(probes)


@contextlib.contextmanager
def watching(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "kvmtrace", "watch", "-a", "-o", str(folder), "--tail", "200ms", *arguments]
    running = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stderr is not None
        assert "watching" in running.stderr.readline()
        yield running
    finally:
        running.kill()
        running.communicate()


def saved(running: subprocess.Popen[str]) -> Path:
    """Wait for the next recording."""
    assert running.stderr is not None
    line = running.stderr.readline()
    match = re.search(r"saved (\S+\.dat):", line)
    assert match, line
    return Path(match[1])


def stop(running: subprocess.Popen[str]) -> str:
    assert running.stderr is not None
    running.send_signal(signal.SIGTERM)
    rest = running.stderr.read()
    assert running.wait(120) == 0
    return rest


def test_a_slow_exit_is_caught_and_nothing_else(tmp_path: Path) -> None:
    programs = forgotten_programs()
    with watching(tmp_path, "--keep", "1s", "--on", "slower-than 30ms:IO", "--at-most", "9/s") as running:
        run_guest("lifecycle", "--count", "2000")
        time.sleep(1)
        slow = run_guest("lifecycle", "--count", "1", "--slow-reason", f"io:{40 * MS}")
        path = saved(running)
        time.sleep(1)
        stop(running)
    assert path.parent == tmp_path
    assert path in set(tmp_path.iterdir())
    recording = open_recording(path)
    report = build_report(recording)
    first = report.triggers[0]
    assert (first.kind, first.reason, first.pid) == ("slower-than", "KVM_EXIT_IO", slow["pid"])
    assert (first.dur_ns or 0) >= 30 * MS
    assert report.loss.events == 0
    assert report.capture.start_ns is not None
    assert first.ts_ns - report.capture.start_ns >= 0.9e9, "the promised second before it"
    assert recording.capture.meta["ended_by"] == "trigger"
    assert report.model is not None
    assert not report.model.n_violations
    assert slow["pid"] in {row.pid for row in report.vms}
    assert left_by(running.pid) == set()
    assert_unloaded(programs)


def test_it_records_while_it_saves(tmp_path: Path) -> None:
    """Two triggers one after the other: the second recording begins where the first one ended."""
    with watching(tmp_path, "--keep", "5s", "--on", "signal USR1") as running:
        recordings = []
        for _ in range(2):
            run_guest("lifecycle", "--count", "20")
            running.send_signal(signal.SIGUSR1)
            recordings.append(open_recording(saved(running)))
        stop(running)
    spans = [(table.ts_ns[0], table.ts_ns[-1]) for table in (one.events() for one in recordings)]
    assert spans[1][0] <= spans[0][1], "nothing lies between the two"
    notes = recordings[1].capture.meta["notes"]
    assert any("kept instead of 5 s" in note for note in notes)


def test_other_triggers(tmp_path: Path) -> None:
    arguments = ["--keep", "500ms", "--on", "rate KVM_EXIT_IO>500/s", "--on", "command sleep 3", "--at-most", "2/h"]
    with watching(tmp_path, *arguments) as running:
        guest = subprocess.Popen([sys.executable, "-m", "kvmtrace.workload", "lifecycle", "--count", "100000"],
                                 stdout=subprocess.DEVNULL)  # fmt: skip
        kinds = {build_report(open_recording(saved(running))).triggers[0].kind for _ in range(2)}
        guest.kill()
        guest.wait()
        stop(running)
    assert kinds == {"rate", "command"}


def test_killed_it_leaves_what_the_next_command_removes(tmp_path: Path) -> None:
    with watching(tmp_path, "--on", "signal USR1") as running:
        assert len(left_by(running.pid)) >= 2
        running.kill()
        running.wait()
    reclaim()
    assert left_by(running.pid) == set()
    assert not list(tmp_path.iterdir())


def test_memory_and_disk_stay_as_they_are(tmp_path: Path) -> None:
    with watching(tmp_path, "--buffer-size", "1M", "--on", "slower-than 10s") as running:
        run_guest("lifecycle", "--count", "200")
        first = resident_kib(running.pid)
        run_guest("lifecycle", "--count", "20000")
        assert resident_kib(running.pid) < first + 2048
        assert not list(tmp_path.iterdir())
        stop(running)


def resident_kib(pid: int) -> int:
    match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    assert match
    return int(match[1])


def test_a_folder_that_is_full_is_told_and_the_watch_goes_on(tmp_path: Path) -> None:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", str(place)], check=True)
    try:
        with watching(place, "--on", "signal USR1") as running:
            run_guest("lifecycle", "--count", "3000")
            os.kill(running.pid, signal.SIGUSR1)
            assert running.stderr is not None
            assert re.search(r"nothing was saved|saved ", running.stderr.readline())
            assert running.poll() is None
            stop(running)
        left: list[Any] = [path for path in place.iterdir() if path.name.startswith(".")]
        assert not left
    finally:
        subprocess.run(["umount", str(place)], check=True)
