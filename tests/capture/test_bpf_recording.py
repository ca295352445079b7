"""Real recordings of the bpf back end on this machine's KVM."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvmtrace.capture.bpf.bpf_syscall import loaded_ids
from kvmtrace.capture.ftrace.probe_events import Probes
from kvmtrace.formats import open_recording
from kvmtrace.formats.summary.summary_file import read_summary
from kvmtrace.render.text.report_text import filter_line
from tests.capture.bpf_held import held_by
from tests.capture.record_twice import bpf_runs, record_twice, wait_until

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Recording

pytestmark = pytest.mark.kvm

# strings behind a tracepoint's fixed part are not readable for BPF programs
DYNAMIC = {"comm", "parent_comm", "child_comm"}


def record(output: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "kvmtrace", "record", "--backend", "bpf", "-o", str(output), *options],
        capture_output=True,
        text=True,
        check=False,
    )
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


SKEW_NS = 50_000  # between the two recorders' time stamps of one event
INTERRUPT = 0x58  # TRACE_FLAG_HARDIRQ, _SOFTIRQ, _NMI


def of_threads(table: EventTable, tids: set[int]) -> EventTable:
    return table.take(np.flatnonzero(np.isin(table.tid, list(tids))))


def vmm_threads(table: EventTable) -> set[int]:
    """Return the threads that do more than being scheduled."""
    own = np.array([kind.system != "sched" for kind in table.kinds])
    return set(np.unique(table.tid[own[table.kind]]).tolist())


def in_interrupts(ftrace: EventTable, bpf: EventTable) -> tuple[NDArray[np.intp], NDArray[np.intp], Counter[str]]:
    """Return the rows of what interrupts traced, in both tables, pair by pair, and the kinds that bpf has not.

    ftrace says which they are. Their partners stand at nearly the same time; where an interrupt came between the two
    recorders' calls for one event, that event's own two times lie further apart.
    """
    ours, theirs, missing = [], [], Counter()
    taken: set[int] = set()
    for row in np.flatnonzero(ftrace.irq_flags & INTERRUPT).tolist():
        name = ftrace.kinds[ftrace.kind[row]].name
        rows = bpf.rows(name)
        near = rows[(bpf.tid[rows] == ftrace.tid[row]) & (np.abs(bpf.ts_ns[rows] - ftrace.ts_ns[row]) < SKEW_NS)]
        free = [r for r in near.tolist() if r not in taken]
        if not free:
            missing[name] += 1
            continue
        partner = min(free, key=lambda r: abs(int(bpf.ts_ns[r] - ftrace.ts_ns[row])))
        taken.add(partner)
        ours.append(row)
        theirs.append(partner)
    return np.array(ours, np.intp), np.array(theirs, np.intp), missing


def in_order(table: EventTable, without: NDArray[np.intp]) -> NDArray[np.intp]:
    """Return the other rows, thread by thread, in their order."""
    rows = np.setdiff1d(np.arange(len(table)), without)
    return rows[np.argsort(table.tid[rows], kind="stable")]


def compare(ftrace: EventTable, bpf: EventTable, missed: dict[str, int]) -> Counter[str]:
    """Assert that both tables hold the same events with the same fields; return the events compared per kind.

    Thread by thread: events of two CPUs within the skew of the two time stamps may stand in either order. Each
    thread's own events are in the same order. What interrupts do in between is compared pair by pair: the kernel calls
    the two recorders one after the other, and an interrupt (as the ring buffers' own, that wakes a recorder) may come
    between the calls, so that its events stand before the thread's event in one recording and behind it in the other.

    Parameters
    ----------
    missed : event -> number that bpf says it could not record, in interrupts
    """
    ours, theirs, missing = in_interrupts(ftrace, bpf)
    unseen = np.setdiff1d(np.flatnonzero(ftrace.irq_flags & INTERRUPT), ours)
    assert not missing - Counter(missed), (missing, missed)
    a = in_order(ftrace, np.concatenate((ours, unseen)))
    b = in_order(bpf, theirs)
    sequences = [[(int(t.tid[r]), t.kinds[t.kind[r]].name) for r in rows] for t, rows in ((ftrace, a), (bpf, b))]
    assert sequences[0] == sequences[1]
    assert not np.any(bpf.irq_flags[b] & INTERRUPT)
    assert np.array_equal(ftrace.irq_flags[ours] & INTERRUPT, bpf.irq_flags[theirs] & INTERRUPT)
    return same_fields(ftrace.take(np.concatenate((a, ours))), bpf.take(np.concatenate((b, theirs))))


def same_fields(ftrace: EventTable, bpf: EventTable) -> Counter[str]:
    """Assert that two tables with the same kinds in the same order have the same fields, strings left out."""
    seen: Counter[str] = Counter()
    for kind in ftrace.kinds:
        for name in set(kind.fields) - DYNAMIC if ftrace.count(kind.name) else ():
            if not name.startswith("__probe"):
                a, b = ftrace.field(kind.name, name), bpf.field(kind.name, name)
                assert np.array_equal(a, b), (kind.name, name)
                seen[kind.name] = len(a)
    return seen


def missed_by(recording: Recording) -> dict[str, int]:
    """Return what a bpf recording says it missed in interrupts."""
    missed: dict[str, int] = recording.capture.meta["loss"].get("missed_in_interrupts", {})
    return missed


@pytest.mark.parametrize(("guest", "arguments"), [("lifecycle", []), ("smp", []), ("string-io", []), ("interrupt", [])])
def test_both_back_ends_see_the_same(tmp_path: Path, guest: str, arguments: list[str]) -> None:
    record_twice(tmp_path, guest, arguments)
    ftrace, bpf = (open_recording(tmp_path / f"{name}.dat") for name in ("ftrace", "bpf"))
    # threads that the kernel makes for the VMM are followed by bpf alone
    tids = vmm_threads(ftrace.events())
    a, b = of_threads(ftrace.events(), tids), of_threads(bpf.events(), tids)
    seen = compare(a, b, missed_by(bpf))
    assert seen["kvm_userspace_exit"] > 0
    assert seen["kvm_fpu"] > 0
    for name in seen:
        if a.count(name) == b.count(name):
            skew = b.ts_ns[b.rows(name)] - a.ts_ns[a.rows(name)]
            assert abs(np.median(skew)) < SKEW_NS, name


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


@pytest.mark.parametrize("options", [[], ["--summary"]], ids=["events", "summary"])
def test_a_killed_recorder_leaves_nothing_but_a_readable_capture(tmp_path: Path, options: list[str]) -> None:
    output = tmp_path / "k.bpf"
    recorder = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "kvmtrace",
            "record",
            "--backend",
            "bpf",
            *options,
            "--guest",
            "storm",
            "--count",
            "100000000",
            "-o",
            str(output),
        ]
    )
    wait_until(lambda: bpf_runs(output) or (options and runs_guest(recorder.pid)), recorder)
    if options:
        first = draft_of(output)
        wait_until(lambda: draft_of(output) not in (first, None), recorder)  # the next second's
    else:
        wait_until(lambda: grown(output), recorder)
    programs, maps = held_by(recorder.pid)
    assert len(programs) >= 5
    assert maps
    recorder.send_signal(signal.SIGKILL)
    recorder.wait()
    said = subprocess.run(
        [sys.executable, "-m", "kvmtrace", "report", str(output)], capture_output=True, text=True, check=False
    )
    wait_until(lambda: not programs & loaded_ids())
    assert not list(tmp_path.glob(".k.bpf*"))
    assert not list(Path("/sys/kernel/tracing/instances").glob(f"kvmtrace-{recorder.pid}-*"))
    assert not any(str(recorder.pid) in group for group in Probes.groups(Path("/sys/kernel/tracing")))
    assert said.returncode == 0, said.stderr
    if options:
        summary = json.loads(output.read_text())
        assert summary["meta"]["ended_by"] == "killed"
        assert summary["vcpus"][0]["time_ns"]["kernel"] > 0
        return
    recording = open_recording(output)
    assert len(recording.events()) > 1000
    assert recording.capture.meta["duration_ns"] is None


def draft_of(output: Path) -> int | None:
    """Return what tells one draft of a running summary from the next."""
    for path in output.parent.glob(f".{output.name}.kvmtrace-*/out"):
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_mtime_ns
    return None


def grown(output: Path, n_bytes: int = 300_000) -> bool:
    """Say whether a running recorder has stored events; its header takes less than 100 KB."""
    return any(path.stat().st_size > n_bytes for path in output.parent.glob(f".{output.name}.kvmtrace-*/out"))


def runs_guest(pid: int) -> bool:
    """Say whether the recorder holds programs that hang on something and its guest has been let go."""
    programs, _ = held_by(pid)
    return len(programs) >= 5


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
    guest = subprocess.Popen(
        [sys.executable, "-m", "kvmtrace.workload", "lifecycle", "--count", "65535"], stdout=subprocess.DEVNULL
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "kvmtrace", "top", "-p", str(guest.pid), "-n", "2", "-i", "0.5"],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        guest.kill()
        guest.wait()
    blocks = done.stdout.strip().split("\n\n")
    assert len(blocks) == 2
    assert blocks[1].startswith("1 VM, 1 vCPU")
    assert f"{guest.pid} python" in blocks[1]


def test_one_thread_alone(tmp_path: Path) -> None:
    guest = subprocess.Popen(
        [sys.executable, "-m", "kvmtrace.workload", "smp", "--count", "60000"], stdout=subprocess.DEVNULL
    )
    try:
        wait_until(lambda: vcpu_threads(guest.pid).get("CPU 1/KVM"), guest)
        thread = vcpu_threads(guest.pid)["CPU 1/KVM"]
        guest.send_signal(signal.SIGSTOP)  # or it may be through before the recorder, on a busy machine, has begun
        argv = [sys.executable, "-m", "kvmtrace", "record", "--backend", "bpf", "-o", str(tmp_path / "t.bpf")]
        recorder = subprocess.Popen([*argv, "-p", str(guest.pid), "--thread", str(thread)])
        wait_until(lambda: bpf_runs(tmp_path / "t.bpf"), recorder)
        guest.send_signal(signal.SIGCONT)
        wait_until(lambda: grown(tmp_path / "t.bpf"), recorder)
    finally:
        guest.kill()
        guest.wait()
    assert recorder.wait(300) == 0
    recording = open_recording(tmp_path / "t.bpf")
    table = recording.events()
    assert table.count("kvm_msr") > 0
    switches = table.rows("sched_switch")
    ours = (table.tid[switches] == thread) | (table.field("sched_switch", "next_pid") == thread)
    assert ours.all()
    assert set(np.delete(table.tid, switches).tolist()) == {thread}
    assert recording.capture.meta["filters"]["thread"] == f"only thread {thread}"
    assert "filtered_events" not in recording.capture.meta
    assert filter_line(recording.capture.meta["filters"]) == f"only thread {thread}"


def vcpu_threads(pid: int) -> dict[str, int]:
    """Return thread name -> tid of a process."""
    return {(path / "comm").read_text().strip(): int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()}


def test_wrong_uses_end_with_one_line(tmp_path: Path) -> None:
    for options, code in (
        (["--clock", "local"], 2),
        (["--max-size", "1M"], 2),
        (["--summary", "--sample", "5"], 2),
        (["--thread", "1"], 2),
    ):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "kvmtrace",
                "record",
                "--backend",
                "bpf",
                "--guest",
                "lifecycle",
                "-o",
                str(tmp_path / "x"),
                *options,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    assert list(tmp_path.iterdir()) == []
