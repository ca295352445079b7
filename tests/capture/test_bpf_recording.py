"""Real recordings of the bpf back end on this machine's KVM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvmtrace.decode.summary import read_summary
from kvmtrace.events.opening import open_recording
from tests.capture.record_twice import bpf_runs, record_twice, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.events.recording import Recording
    from kvmtrace.events.table import EventTable

pytestmark = pytest.mark.kvm

# strings behind a tracepoint's fixed part are not readable for BPF programs
DYNAMIC = {"comm", "parent_comm", "child_comm"}


def record(output: Path, *options: str) -> str:
    done = subprocess.run([sys.executable, "-m", "kvmtrace", "record", "--backend", "bpf", "-o", str(output), *options],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


def known_counts(recording: Recording) -> dict[str, int]:
    counts: dict[str, int] = recording.capture.meta["guest_run"]["known"]["tracepoints"]
    return counts


def test_the_guests_known_counts_are_recorded(tmp_path: Path) -> None:
    record(tmp_path / "l.bpf", "--guest", "lifecycle")
    recording = open_recording(tmp_path / "l.bpf")
    table = recording.events()
    for name, count in known_counts(recording).items():
        assert table.count(name) == count, name
    assert recording.loss.events == 0
    assert recording.capture.format == "kvmtrace-bpf"
    assert recording.capture.meta["attached"]["tracepoint"]
    assert len(table) == recording.capture.meta["n_events"]


SWAPPED = 12  # positions that may differ, of some hundred to thousand: a handful of interrupts


def of_threads(table: EventTable, tids: set[int]) -> EventTable:
    return table.take(np.flatnonzero(np.isin(table.tid, list(tids))))


def vmm_threads(table: EventTable) -> set[int]:
    """Return the threads that do more than being scheduled."""
    own = np.array([kind.system != "sched" for kind in table.kinds])
    return set(np.unique(table.tid[own[table.kind]]).tolist())


def kinds_per_thread(table: EventTable) -> dict[int, list[str]]:
    return {tid: [table.kinds[k].name for k in table.kind[table.tid == tid]] for tid in np.unique(table.tid).tolist()}


def compare(ftrace: EventTable, bpf: EventTable) -> Counter[str]:
    """Assert that both tables hold the same events with the same fields; return the events compared per kind.

    Thread by thread: events of two CPUs within the skew of the two time stamps may stand in either order.
    """
    seen: Counter[str] = Counter()
    ftrace, bpf = (table.take(np.argsort(table.tid, kind="stable")) for table in (ftrace, bpf))
    ours, theirs = kinds_per_thread(ftrace), kinds_per_thread(bpf)
    for tid in ours.keys() | theirs.keys():
        assert Counter(ours.get(tid)) == Counter(theirs.get(tid)), tid
    # the two recorders are called one after the other: an interrupt between the calls stands before the event in one
    # recording and behind it in the other
    swapped = sum(a != b for tid in ours for a, b in zip(ours[tid], theirs[tid], strict=True))
    assert swapped <= SWAPPED, (swapped, ours, theirs)
    for kind in ftrace.kinds:
        for name in set(kind.fields) - DYNAMIC if ftrace.count(kind.name) else ():
            if not name.startswith("__probe"):
                a, b = ftrace.field(kind.name, name), bpf.field(kind.name, name)
                assert np.array_equal(a, b), (kind.name, name)
                seen[kind.name] = len(a)
    return seen


@pytest.mark.parametrize(("guest", "arguments"), [("lifecycle", []), ("smp", []), ("string-io", [])])
def test_both_back_ends_see_the_same(tmp_path: Path, guest: str, arguments: list[str]) -> None:
    record_twice(tmp_path, guest, arguments)
    ftrace, bpf = (open_recording(tmp_path / f"{name}.dat") for name in ("ftrace", "bpf"))
    # threads that the kernel makes for the VMM are followed by bpf alone
    tids = vmm_threads(ftrace.events())
    a, b = of_threads(ftrace.events(), tids), of_threads(bpf.events(), tids)
    seen = compare(a, b)
    assert seen["kvm_userspace_exit"] > 0
    assert seen["kvm_fpu"] > 0
    for name in seen:
        skew = b.ts_ns[b.rows(name)] - a.ts_ns[a.rows(name)]
        assert abs(np.median(skew)) < 50_000, name


def test_recorded_and_lost_are_what_the_guest_did(tmp_path: Path) -> None:
    said = record(tmp_path / "s.bpf", "--guest", "storm", "--count", "20000", "--buffer-size", "16k")
    recording = open_recording(tmp_path / "s.bpf")
    table, known = recording.events(), known_counts(recording)
    loss = recording.capture.meta["loss"]
    lost: Counter[str] = Counter()
    for kinds in loss["by_cpu_and_event"].values():
        lost.update(kinds)
    assert sum(lost.values()) > 1000
    assert "lost 0 events" not in said
    for name, count in known.items():
        assert table.count(name) + lost[name] == count, name
    assert recording.loss.events == loss["events"]
    marked = table.field("lost_events", "count")
    assert 0 < marked.sum() <= sum(lost.values())


def test_a_killed_recorder_leaves_a_readable_capture(tmp_path: Path) -> None:
    output = tmp_path / "k.bpf"
    recorder = subprocess.Popen([sys.executable, "-m", "kvmtrace", "record", "--backend", "bpf", "--guest", "storm",
                                 "--count", "100000000", "-o", str(output)])
    wait_until(lambda: bpf_runs(output))
    time.sleep(1)
    recorder.send_signal(signal.SIGKILL)
    recorder.wait()
    subprocess.run([sys.executable, "-m", "kvmtrace", "doctor"], capture_output=True, check=False)
    recording = open_recording(output)
    assert len(recording.events()) > 1000
    assert recording.capture.meta["duration_ns"] is None
    wait_until(lambda: not programs_of(recorder.pid))
    assert not list(tmp_path.glob(".k.bpf*"))


def programs_of(pid: int) -> bool:
    """Say whether the process holds BPF programs still (a killed one gives them back while it dies)."""
    try:
        return any("bpf-prog" in os.readlink(path) for path in _fds(pid))
    except OSError:
        return False


def _fds(pid: int) -> list[str]:
    try:
        return [f"/proc/{pid}/fd/{name}" for name in os.listdir(f"/proc/{pid}/fd")]
    except OSError:
        return []


def test_the_summary_counts_what_the_guest_did(tmp_path: Path) -> None:
    record(tmp_path / "s.json", "--summary", "--guest", "lifecycle")
    text = (tmp_path / "s.json").read_bytes()
    summary = read_summary(text, "s.json")
    known = json.loads(text)["meta"]["guest_run"]["known"]["userspace_exits"]
    numbers = {"KVM_EXIT_IO": 2, "KVM_EXIT_HLT": 5, "KVM_EXIT_MMIO": 6}
    cells: dict[Any, Any] = summary.vcpus[0].userspace_exits
    assert {name: cells[numbers[name]].count for name in known} == known
    for cell in cells.values():
        assert sum(cell.buckets) == cell.samples <= cell.count
    for vcpu in summary.vcpus:
        assert sum(vcpu.time_ns.values()) == vcpu.wall_ns


def test_top_in_a_pipe_prints_rates() -> None:
    guest = subprocess.Popen([sys.executable, "-m", "kvmtrace.workload", "lifecycle", "--count", "5000"],
                             stdout=subprocess.DEVNULL)
    try:
        done = subprocess.run([sys.executable, "-m", "kvmtrace", "top", "-p", str(guest.pid), "-n", "2", "-i", "0.5"],
                              capture_output=True, text=True, check=True)
    finally:
        guest.kill()
        guest.wait()
    blocks = done.stdout.strip().split("\n\n")
    assert len(blocks) == 2
    assert blocks[1].startswith("1 VM, 1 vCPU")
    assert f"{guest.pid} python" in blocks[1]


def test_wrong_uses_end_with_one_line(tmp_path: Path) -> None:
    for options, code in ((["--clock", "local"], 2), (["--max-size", "1M"], 2), (["--summary", "--sample", "5"], 2)):
        done = subprocess.run([sys.executable, "-m", "kvmtrace", "record", "--backend", "bpf", "--guest", "lifecycle",
                               "-o", str(tmp_path / "x"), *options], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert list(tmp_path.iterdir()) == []
