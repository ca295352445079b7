"""The flight recorder on this machine's KVM: what it catches, what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmtrace.capture.recover import reclaim, reclaim_file
from kvmtrace.capture.tracefs import find_tracefs
from kvmtrace.fleet.executors import Engine
from kvmtrace.fleet.reduce import Fleet
from kvmtrace.fleet.summarizing import summarize_all
from kvmtrace.formats import open_recording
from kvmtrace.report.build import ReportOptions, build_report
from tests.capture.bpf_held import forgotten_programs
from tests.watch.test_exporter_kvm import assert_unloaded, run_guest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.table.recording import Recording

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
def watching(folder: Path, *arguments: str, target: tuple[str, ...] = ("-a",)) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "kvmtrace", "watch", *target, "-o", str(folder), "--tail", "200ms", *arguments]
    running = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stderr is not None
        assert "watching" in running.stderr.readline()
        yield running
    finally:
        running.kill()
        running.communicate()


def next_line(running: subprocess.Popen[str]) -> str:
    """Wait for what it says next; that the buffers reach back less far than asked for is no matter."""
    assert running.stderr is not None
    line = running.stderr.readline()
    while "reach back" in line:
        line = running.stderr.readline()
    return line


def saved(running: subprocess.Popen[str]) -> Path:
    """Wait for the next recording."""
    line = next_line(running)
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


def test_what_is_saved_is_summarised(tmp_path: Path) -> None:
    """The summary that it writes is the one that `fleet summarize` makes, with the VM in it."""
    out, dest, again = (tmp_path / name for name in ("out", "dest", "again"))
    out.mkdir()
    with watching(out, "--keep", "20s", "--on", "signal USR1", "--summaries", str(dest)) as running:
        guest = run_guest("lifecycle", "--count", "300")
        running.send_signal(signal.SIGUSR1)
        path = saved(running)
        assert "summarised" not in stop(running)
    summarize_all(Engine(workers=1), [str(path)], str(again))
    with Fleet(str(dest)) as written, Fleet(str(again)) as made:
        for table in ("recordings", "vms", "vcpus", "userspace_exits", "rules"):
            query = f"SELECT * FROM {table} ORDER BY ALL"
            assert written.arrow(query).equals(made.arrow(query))
        vms = written.sql("SELECT pid FROM vms").pid.tolist()
        (count,) = written.sql(
            f"SELECT sum(userspace_exits)::BIGINT AS n FROM vcpus WHERE vm_pid = {guest['pid']}"
        ).n.tolist()
    assert guest["pid"] in vms
    assert count == sum(guest["known"]["userspace_exits"].values())


def test_it_records_while_it_saves(tmp_path: Path) -> None:
    """A guest runs through several savings: each of its userspace exits is in a recording, as many as there were."""
    fd = os.memfd_create("run")
    argv = [sys.executable, "-P", "-m", "kvmtrace.workload", "lifecycle", "--count", "800", "--json-fd", str(fd)]
    arguments = ["--keep", "30m", "--on", "signal USR1", "--at-most", "1000/s", "--buffer-size", "64M"]
    recordings = []
    with watching(tmp_path, *arguments) as running:
        with subprocess.Popen(argv, stdout=subprocess.DEVNULL, pass_fds=(fd,)) as guest:
            for _ in range(4):
                time.sleep(0.2)
                running.send_signal(signal.SIGUSR1)
                recordings.append(open_recording(saved(running)))
            guest.wait()
        running.send_signal(signal.SIGUSR1)
        recordings.append(open_recording(saved(running)))
        stop(running)
    run = json.loads(os.pread(fd, 1 << 20, 0))
    os.close(fd)
    assert all(recording.capture.meta["loss"]["events"] == 0 for recording in recordings)
    (tid,) = run["vcpu_tids"].values()
    parts = [part for part in (userspace_exits(recording, tid) for recording in recordings) if part]
    assert len(parts) > 1, "it ran while something was saved"
    n_twice = sum(in_both(before, after) for before, after in pairwise(parts))
    n_exits = sum(run["known"]["userspace_exits"].values())
    assert sum(map(len, parts)) - n_twice == n_exits, "nothing lies between the recordings"
    notes = recordings[-1].capture.meta["notes"]
    assert any("kept instead of 1800 s" in note for note in notes)


def userspace_exits(recording: Recording, tid: int) -> list[tuple[int, int]]:
    """Return when a thread left to userspace, and why."""
    table = recording.events()
    rows = table.rows("kvm_userspace_exit")
    reasons = table.field("kvm_userspace_exit", "reason")
    own = table.tid[rows] == tid
    return list(zip(table.ts_ns[rows[own]].tolist(), reasons[own].tolist(), strict=True))


def in_both(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> int:
    """Return how many events at the end of a recording begin the next one: both instances were on for a moment.

    Each gives an event a time of its own.
    """
    for n in range(min(len(before), len(after)), 0, -1):
        pairs = list(zip(before[-n:], after[:n], strict=True))
        if all(abs(one[0] - other[0]) < 5_000 and one[1] == other[1] for one, other in pairs):
            return n
    return 0


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


def test_systemd_is_told_of_start_reload_and_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        folder = tmp_path / "recordings"
        folder.mkdir()
        with watching(folder, "--on", "signal USR1") as running:
            running.send_signal(signal.SIGHUP)
            assert running.stderr is not None
            assert "looked at the VMs again" in running.stderr.readline()
            stop(running)
        told = [listener.recv(200).partition(b"\n")[0] for _ in range(4)]
    assert told == [b"READY=1", b"RELOADING=1", b"READY=1", b"STOPPING=1"]


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
            assert re.search(r"nothing was saved|saved ", next_line(running))
            assert running.poll() is None
            stop(running)
        left: list[Any] = [path for path in place.iterdir() if path.name.startswith(".")]
        assert not left
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("last", ["Reader.finish", "keep_from", "seal"])
def test_killed_in_a_save_it_counts_nothing_that_was_overwritten_as_lost(last: str, tmp_path: Path) -> None:
    """The buffers went round many times; whoever finishes the recording knows that this is no loss."""
    output = tmp_path / "saved.dat"
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            die_in_a_save(output, last)
        os._exit(1)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 9
    assert not output.exists()
    assert any("finished the recording of a killed recorder" in line for line in reclaim_file(output))
    meta = open_recording(output).capture.meta
    assert meta["loss"] == {"events": 0, "by_cpu": {}}
    assert meta["triggers"]
    report = build_report(open_recording(output), ReportOptions(model=False))
    assert (report.loss.events, report.loss.truncated) == (0, False)
    assert not list(tmp_path.glob(".*"))


def die_in_a_save(output: Path, last: str) -> None:
    """Let small buffers go round, and end behind (Reader.finish), or before, a step of saving them."""
    from kvmtrace.capture.ftrace.page_mover import Reader
    from kvmtrace.capture.settings import RecordSettings, TargetSpec
    from kvmtrace.capture.target import Target
    from kvmtrace.watch import rings, saving
    from kvmtrace.watch.triggers import Fired, parse_trigger

    settings = RecordSettings(output=output, target=TargetSpec("all"), buffer_bytes=64 << 10)
    with Target(settings.target) as target:
        both = rings.Rings(find_tracefs(), settings, target)
        while not all(both.active.instance.stats(cpu).get("overrun") for cpu in both.active.instance.cpus()):
            for cpu in os.sched_getaffinity(0):
                subprocess.run(["taskset", "-c", str(cpu), "sh", "-c", "true; true; sleep 0; sleep 0"], check=True)
        ring = both.swap()
        if last == "Reader.finish":
            finish = Reader.finish
            Reader.finish = lambda self: (finish(self), os._exit(9))  # type: ignore[method-assign]
        else:
            setattr(saving, last, lambda *_: os._exit(9))
        fired = Fired(parse_trigger("signal USR1"), time.monotonic_ns())
        saving.save(both, ring, output, saving.Wanted((fired,), 10**12, 0, []))
