"""Who had the CPU while vCPUs waited: against a plain walk through the events, and cut anywhere."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

from kvmtrace.cli.main import cli
from kvmtrace.formats import open_recording
from kvmtrace.render.text.waits_text import waits_sentence
from kvmtrace.report import build
from kvmtrace.report.build import build_report
from kvmtrace.spans.cpu_waits import OF_KVM, PER_OCTAVE, CpuWaits, quantile_of
from kvmtrace.stats.stolen import StolenAccumulator
from kvmtrace.table.event_table import EventKind, EventTable
from kvmtrace.table.payload import ColumnPayload
from kvmtrace.table.recording import Capture, Recording
from tests.writers.capture_meta import HOST_PIDS, two_vms

if TYPE_CHECKING:
    from collections.abc import Sequence

FIXTURES = Path(__file__).parents[2] / "fixtures"
SMP, LINUX = "svm-6.12-smp.dat", "svm-6.12-linux-2vcpu.dat"
MANY = pytest.mark.slow  # events: the plain walk takes its time
NAMES = (SMP, "vmx-6.1-smp.dat", pytest.param(LINUX, marks=MANY), pytest.param("vmx-6.1-linux-1vcpu.dat", marks=MANY))


def walked(table: EventTable, tids: set[int], apics: dict[int, int]) -> tuple[Counter[Any], dict[int, list[int]]]:
    """Return (vCPU, who ran) -> ns, and vCPU -> times to guest mode, by looking at one event after the other."""
    switches = {int(row): at for at, row in enumerate(table.rows("sched_switch"))}
    fields = {name: table.field("sched_switch", name) for name in ("prev_pid", "next_pid", "prev_state")}
    accepts = {int(row): at for at, row in enumerate(table.rows("kvm_apic_accept_irq"))}
    apicid = table.field("kvm_apic_accept_irq", "apicid") if accepts else None
    entries = set(table.rows("kvm_entry").tolist())
    of_kvm = {int(row) for event in OF_KVM for row in table.rows(event)}
    begun: set[int] = set()
    state: dict[int, tuple[str, int, int]] = {}
    accepted: dict[int, int] = {}
    entering: dict[int, int] = {}
    to_entry: dict[int, list[int]] = {}
    waits = []
    history: dict[int, list[tuple[int, int, int]]] = {}  # CPU -> (since, who came, who left)
    for row in range(len(table)):
        tid, ts, cpu = int(table.tid[row]), int(table.ts_ns[row]), int(table.cpu[row])
        if row in of_kvm and tid in tids:
            begun.add(tid)
        if row in entries and tid in entering:
            to_entry.setdefault(tid, []).append(ts - entering.pop(tid))
        if row in accepts and apicid is not None:
            target = apics.get(int(apicid[accepts[row]]), -1)
            if state.get(target, ("", 0, 0))[0] == "asleep":
                accepted.setdefault(target, ts)
        if row not in switches:
            continue
        prev, after = int(fields["prev_pid"][switches[row]]), int(fields["next_pid"][switches[row]])
        history.setdefault(cpu, []).append((ts, after, prev))
        if prev in begun:
            asleep = int(fields["prev_state"][switches[row]]) & 0xFF
            state[prev] = ("asleep" if asleep else "preempted", ts, cpu)
            entering.pop(prev, None)
        if after in begun:
            what, since, left = state.pop(after, ("", 0, 0))
            if what == "preempted":
                waits.append((after, since, ts, left))
            elif what == "asleep" and after in accepted:
                waits.append((after, accepted[after], ts, cpu))
                entering[after] = accepted[after]
            accepted.pop(after, None)
    return ran_meanwhile(waits, history), to_entry


def ran_meanwhile(waits: list[Any], history: dict[int, list[tuple[int, int, int]]]) -> Counter[Any]:
    found: Counter[Any] = Counter()
    for tid, begin, end, cpu in waits:
        stretches = [(0, -1, -1), *history[cpu], (1 << 62, -1, history[cpu][-1][1])]
        for (start, who, _), (stop, _, left) in itertools.pairwise(stretches):
            ns = min(stop, end) - max(start, begin)
            if ns > 0:
                found[tid, who if who == left else -1] += ns
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("piece", [1 << 18, 700])
def test_as_a_plain_walk_finds_it(name: str, piece: int) -> None:
    recording = open_recording(FIXTURES / name)
    report = build_report(recording)
    tids = [row.tid for row in report.vcpus]
    apics = {row.vcpu_id: row.tid for row in report.vcpus if row.vcpu_id is not None}
    expected, to_entry = walked(recording.events(), set(tids), apics)
    waits = CpuWaits()
    for table in recording.iter_events(piece):
        waits.feed(table, tids, apics)
    assert {pair: one.ns for pair, one in waits.stolen.items() if one.ns} == dict(expected)
    for tid, times in to_entry.items():
        own = waits.waited[tid]
        assert (own.to_entry_ns, own.to_entry_max_ns, own.to_entry.sum()) == (sum(times), max(times), len(times))
        assert abs(np.log2(quantile_of(own.to_entry, 0.5) / np.quantile(times, 0.5, method="lower"))) < 2 / PER_OCTAVE


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_changes_nothing_and_preemptions_are_the_budgets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build_report(open_recording(FIXTURES / name))
    monkeypatch.setattr(build, "PIECE_EVENTS", 501)
    cut = build_report(open_recording(FIXTURES / name))
    assert (cut.stolen, cut.wake_ups) == (whole.stolen, whole.wake_ups)
    stolen = sum(row.total_ns for row in whole.stolen)
    woken = sum(row.to_cpu_ns for row in whole.wake_ups)
    preempted = sum(row.budget.preempted_ns or 0 for row in whole.vcpus)
    assert abs(stolen - woken - preempted) <= 0.01 * stolen


SWITCH = EventKind("sched_switch", "sched", {
    "prev_pid": np.dtype(np.int32), "prev_state": np.dtype(np.int64), "next_pid": np.dtype(np.int32),
    "next_comm": np.dtype("S16"),
})  # fmt: skip
FPU = EventKind("kvm_fpu", "kvm", {"load": np.dtype(np.uint32)})
COMMS = {0: b"swapper/0", 10: b"CPU 0/KVM", 20: b"CPU 0/KVM", 30: b"vhost-200", 40: b"kworker/0:1H", 50: b"node"}
RUNNING, ASLEEP = 0, 1


def table_of(switches: Sequence[tuple[int, int, int, int, int]]) -> EventTable:
    """Return events: each vCPU (10, 20) does something of KVM, then (ts, cpu, prev, prev_state, next)."""
    n = len(switches) + 2
    columns = {
        "ts_ns": np.array([0, 0, *(row[0] for row in switches)], np.int64),
        "cpu": np.array([0, 0, *(row[1] for row in switches)], np.int16),
        "tid": np.array([10, 20, *(row[2] for row in switches)], np.int32),
        "kind": np.array([1, 1] + [0] * (n - 2), np.uint16),
        "irq_flags": np.zeros(n, np.uint8),
        "preempt_count": np.zeros(n, np.uint8),
    }
    payload = {
        "prev_pid": np.array([row[2] for row in switches], np.int32),
        "prev_state": np.array([row[3] for row in switches], np.int64),
        "next_pid": np.array([row[4] for row in switches], np.int32),
        "next_comm": np.array([COMMS[row[4]] for row in switches], "S16"),
    }
    loads = {"load": np.ones(2, np.uint32)}
    return EventTable(columns, (SWITCH, FPU), {0: ColumnPayload(payload), 1: ColumnPayload(loads)})


class Host(Recording):
    """A recording that says who is who."""

    def __init__(self) -> None:
        vms = [{"pid": 100, "name": "web"}, {"pid": 200, "name": "db"}]
        self.capture = Capture("x", "y", meta={"vms": vms})
        self.comms, self.processes, self.kinds = {}, {10: 100, 20: 200, 50: 50}, ()


def told(switches: Sequence[tuple[int, int, int, int, int]]) -> dict[tuple[str, str], int]:
    stolen = StolenAccumulator()
    stolen.feed(table_of(switches), [10, 20], {})
    rows, _ = stolen.finish(Host(), {10: 100, 20: 200})
    return {(row.kind, row.who): row.total_ns for row in rows}


def test_who_ran_is_told_by_what_it_is() -> None:
    found = told([
        (100, 0, 10, RUNNING, 20), (110, 0, 20, ASLEEP, 30), (130, 0, 30, ASLEEP, 40), (160, 0, 40, ASLEEP, 50),
        (200, 0, 50, ASLEEP, 0), (205, 0, 0, RUNNING, 10),
    ])  # fmt: skip
    assert found == {
        ("vcpu", "db"): 10, ("vhost", "vhost of db"): 20, ("kernel", "kworker"): 30, ("process", "node"): 40,
        ("idle", "nobody: the CPU was idle"): 5,
    }  # fmt: skip


def test_what_was_not_recorded_is_said() -> None:
    """A target's recording has only the target's switches: who came between is not known."""
    assert told([(100, 0, 10, RUNNING, 50), (200, 0, 40, RUNNING, 10)]) == {("unknown", "not recorded"): 100}


def test_a_thread_waits_where_it_left() -> None:
    found = told([(50, 1, 0, RUNNING, 50), (100, 0, 10, RUNNING, 40), (150, 1, 50, ASLEEP, 10)])
    assert found == {("kernel", "kworker"): 50}


def test_a_sleeping_vcpu_waits_for_nobody() -> None:
    assert told([(100, 0, 10, ASLEEP, 50), (200, 0, 50, RUNNING, 10)]) == {}


def test_other_vms_are_named(tmp_path: Path) -> None:
    report = build_report(open_recording(two_vms(FIXTURES / SMP, tmp_path / "host.dat")))
    of_web = [row for row in report.stolen if row.vm == "web-1" and row.kind == "vcpu"]
    assert [(row.who, row.by_pid) for row in of_web] == [("db", HOST_PIDS["db"])]
    text = CliRunner().invoke(cli, ["report", str(tmp_path / "host.dat")], catch_exceptions=False).stdout
    assert "Who had the CPU while vCPUs waited for one" in text
    assert "another VM" in text
    hidden = (
        CliRunner().invoke(cli, ["report", "--anonymize", str(tmp_path / "host.dat")], catch_exceptions=False).stdout
    )
    assert "web-1" not in hidden


def test_the_first_sentence_says_when_it_matters() -> None:
    report = build_report(open_recording(FIXTURES / SMP))
    assert not waits_sentence(report), "its own vCPUs took turns"
    shared = replace(report, stolen=tuple(replace(row, kind="vcpu", who="db") for row in report.stolen))
    assert "of their time" in waits_sentence(shared)
    assert "db ran" in waits_sentence(shared)


def test_explain_says_who_ran() -> None:
    report = build_report(open_recording(FIXTURES / SMP))
    one = max((row for row in report.slowest if row.preempted_ns), key=lambda row: row.preempted_ns or 0)
    arguments = ["report", str(FIXTURES / SMP), "--explain", str(one.number), "--tid", str(one.tid)]
    text = CliRunner().invoke(cli, arguments, catch_exceptions=False).stdout
    assert "While the vCPU waited for a CPU, there ran:" in text
