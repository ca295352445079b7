"""The monitor in the kernel: its step, compiled for user space, agrees with the checker on every fixture; it runs."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvmtrace._native.automaton import Knowledge, take_steps
from kvmtrace.capture.bpf.monitor import HEAD, N_LAST, PAST, TRAIL_BYTES, Monitor, step_expression
from kvmtrace.check.alphabet import classify
from kvmtrace.check.monitor_table import FORBIDDEN, N_STEPS, MonitorTable, monitor_table
from kvmtrace.check.state_machine import ILLEGAL, UNKNOWN, compile_for
from kvmtrace.formats import open_recording
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
FIXTURES = sorted((ROOT / "fixtures").glob("*.dat")) + sorted((ROOT / "tests/check/recorded").glob("*.dat"))
TABLE = monitor_table()
STEPS = np.array([step.number for step in TABLE.steps])
DRIVER = """
#include <stdint.h>
typedef uint64_t u64;
typedef uint32_t u32;
#include "monitor.h"
u32 trail_bytes(void) { return sizeof(struct trail); }
void take(struct trail *t, const unsigned char *table, const u32 *steps, u64 n, u32 *places)
{
        for (u64 i = 0; i < n; i++)
                places[i] = monitor_step(t, table, steps[i], i);
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Return the step function of tracers/monitor.h, built with a C compiler."""
    folder = tmp_path_factory.mktemp("monitor")
    (folder / "driver.c").write_text(DRIVER)
    library = folder / "driver.so"
    flags = ["-shared", "-fPIC", "-O2", "-Wall", "-Werror", f"-I{ROOT / 'tracers'}"]
    subprocess.run(["cc", *flags, "-o", library, folder / "driver.c"], check=True)
    return ctypes.CDLL(str(library))


def in_c(library: ctypes.CDLL, steps: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], bytes]:
    """Take steps with the C function; return the places in the table, and the trail."""
    assert library.trail_bytes() == TRAIL_BYTES
    trail, places = ctypes.create_string_buffer(TRAIL_BYTES), np.zeros(len(steps), np.uint32)
    steps = np.ascontiguousarray(steps, np.uint32)
    library.take(
        trail,
        TABLE.next_states,
        steps.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_uint64(len(steps)),
        places.ctypes.data_as(ctypes.c_void_p),
    )
    return places, trail.raw


def in_python(steps: NDArray[np.uint32]) -> list[int]:
    """Emulate the table; return what the C function returns."""
    state, places = 0, []
    for step in steps.tolist():
        place = state * N_STEPS + step
        following = TABLE.next_states[place]
        places.append(place | (FORBIDDEN << 16 if following == FORBIDDEN else 0))
        state = (TABLE.next_states[step] if following == FORBIDDEN else following) - 1
    return places


def by_the_checker(steps: NDArray[np.uint32]) -> list[int]:
    """Take steps as the checker does, with its own tables and loop."""
    automaton = compile_for(frozenset(step.name for step in TABLE.steps), frozenset({"entry_in_run", "exit_irqs_off"}))
    nowhere = np.zeros(len(steps), bool)
    known = Knowledge(steps.astype(np.uint8), nowhere, nowhere)
    _, before, verdict, _ = take_steps(known, automaton.next_state, automaton.verdict, UNKNOWN)
    forbidden = np.where(verdict == ILLEGAL, FORBIDDEN << 16, 0)
    return (before.astype(int) * N_STEPS + steps | forbidden).tolist()


def sequences(path: Path) -> list[NDArray[np.uint32]]:
    """Return the tracepoint steps of each vCPU thread of a recording."""
    table = open_recording(str(path)).events()
    classes = classify(table).astype(np.uint32)
    chosen = np.isin(classes, STEPS)
    return [classes[chosen & (table.tid == tid)] for tid in np.unique(table.tid[chosen])]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_python_c_and_the_checker_agree(path: Path, compiled: ctypes.CDLL) -> None:
    random = np.random.default_rng(len(path.stem))
    lost = LOST_EVENTS in open_recording(str(path)).events().kind_index
    for whole in sequences(path):
        holes = whole[random.random(len(whole)) > 0.1]  # a faulty KVM: a tenth of the steps is missing
        for steps in (whole[:20000], holes[:20000]):
            places, _ = in_c(compiled, steps)
            assert places.tolist() == in_python(steps) == by_the_checker(steps)
        assert (places >> 16).any() or len(steps) < 500, "holes are seen"
        if not lost and not path.stem.endswith(("two-vcpus", "three-vcpus", "two-vms")):
            places, _ = in_c(compiled, whole)
            assert not (places >> 16).any(), "a healthy recording has no forbidden step"


def test_the_last_steps_are_kept(compiled: ctypes.CDLL) -> None:
    entry, leave = (step.number for step in TABLE.steps if step.kind in ("kvm_entry", "kvm_exit"))
    steps = np.array([entry, leave] * 40 + [entry, entry], np.uint32)
    places, trail = in_c(compiled, steps)
    n_steps, n_forbidden, *_, state, _ = HEAD.unpack_from(trail)
    assert (n_steps, n_forbidden, TABLE.states[state]) == (82, 1, "guest")
    assert places[-1] >> 16 == FORBIDDEN
    kept = [PAST.unpack_from(trail, HEAD.size + i % N_LAST * PAST.size) for i in range(82 - N_LAST, 82)]
    assert [ts for ts, _, _ in kept] == list(range(82 - N_LAST, 82))
    assert [step for _, step, _ in kept] == steps[-N_LAST:].tolist()
    assert TABLE.states[kept[-1][2]] == "guest"


def test_old_kernels_have_a_table_of_their_own() -> None:
    exited, leave = TABLE.states.index("exited"), next(s.number for s in TABLE.steps if s.kind == "kvm_exit")
    place = exited * N_STEPS + leave
    assert TABLE.next_states[place] == FORBIDDEN
    assert monitor_table("5.10.0-28-amd64").next_states[place] == exited + 1
    assert monitor_table("6.1.0").next_states == TABLE.next_states


def test_the_steps_of_kvm_fpu_are_told_apart() -> None:
    load, unload = (step for step in TABLE.steps if step.kind == "kvm_fpu")
    assert step_expression("kvm_fpu", TABLE) == f"ARGUMENT(u32, 0) == 1 ? {load.number} : {unload.number}"
    assert step_expression("kvm_entry", TABLE).isdecimal()


def guest(count: int) -> None:
    command = [sys.executable, "-P", "-m", "kvmtrace.workload", "lifecycle", "--count", str(count)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.kvm
def test_the_command_counts_what_the_guest_does(tmp_path: Path) -> None:
    out = tmp_path / "monitor.json"
    command = [
        sys.executable,
        "-m",
        "kvmtrace",
        "record",
        "--monitor",
        "--guest",
        "lifecycle",
        "--count",
        "2",
        "-o",
        out,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no step that the model forbids" in done.stderr
    document = json.loads(out.read_text())
    assert document["schema"] == "kvmtrace.monitor/1"
    assert (document["n_forbidden"], document["forbidden"]) == (0, [])
    counted = dict.fromkeys(("FPU load", "FPU unload", "userspace exit"), 0)
    for row in document["transitions"]:
        assert row["allowed"]
        if row["event"] in counted:
            counted[row["event"]] += row["count"]
    exits = sum(document["meta"]["guest_run"]["observed"].values())
    assert set(counted.values()) == {exits}


def planted() -> MonitorTable:
    """Return the table with one step forbidden that every KVM takes: the FPU is unloaded after it was loaded."""
    table = bytearray(TABLE.next_states)
    (unload,) = (step.number for step in TABLE.steps if step.name == "FPU unload")
    for state in range(1, len(TABLE.states)):
        table[state * N_STEPS + unload] = FORBIDDEN
    return MonitorTable(TABLE.states, TABLE.steps, bytes(table))


@pytest.mark.kvm
def test_a_forbidden_step_is_told_with_those_before_it() -> None:
    monitor = Monitor(planted(), None)
    try:
        monitor.start()
        guest(2)
        monitor.stop()
        found = monitor.take_forbidden()
        assert found
        assert monitor.take_forbidden() == []
        assert all(one.step == "FPU unload" for one in found)
        assert monitor.n_forbidden() >= len(found)
        last = found[-1]
        assert last.last[-1].step == "FPU unload"
        assert last.last[-2].step != "FPU unload"
        assert [past.ts_ns for past in last.last] == sorted(past.ts_ns for past in last.last)
        assert last.n_forbidden <= last.n_steps
        before = monitor.transitions()
        guest(1)
        assert monitor.transitions() == before, "it is switched off"
    finally:
        monitor.close()


@pytest.mark.kvm
def test_only_the_target_is_watched() -> None:
    monitor = Monitor(TABLE, os.getpid())
    try:
        monitor.start([os.getpid()])
        other = subprocess.run(
            ["setsid", "-f", sys.executable, "-P", "-m", "kvmtrace.workload", "storm", "--count", "5"], check=True
        )
        assert other.returncode == 0
        guest(1)
        states = {state for state, _ in monitor.transitions()}
        assert "loaded" in states
    finally:
        monitor.close()


FILE: dict[str, object] = {
    "schema": "kvmtrace.monitor/1",
    "meta": {"schema": "kvmtrace.capture/1", "duration_ns": 2_000_000_000, "notes": ["a note"]},
    "states": ["unknown", "guest"],
    "threads": 1,
    "transitions": [
        {"from": "exited", "event": "VM-entry", "to": "guest", "count": 1000, "allowed": True},
        {"from": "guest", "event": "VM-entry", "to": "guest", "count": 1, "allowed": False},
    ],
    "n_forbidden": 1,
    "forbidden": [
        {
            "tid": 7,
            "pid": 6,
            "ts_ns": 5000,
            "state": "guest",
            "step": "VM-entry",
            "last": [
                {"ts_ns": 4000, "step": "VM-entry", "state": "exited"},
                {"ts_ns": 5000, "step": "VM-entry", "state": "guest"},
            ],
        }
    ],
}


def written(path: Path, **changed: object) -> Path:
    path.write_text(json.dumps(FILE | changed, separators=(",", ":")))
    return path


def test_the_file_is_reported(tmp_path: Path) -> None:
    path = written(tmp_path / "x.json")
    command = [sys.executable, "-m", "kvmtrace", "report", path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1 step that the model forbids; 1,001 steps in 2.0 s" in done.stdout
    assert "Forbidden: VM-entry in state guest: thread 7 of process 6" in done.stdout
    assert "  >       +0.000 us  guest          VM-entry" in done.stdout
    assert "FORBIDDEN" in done.stdout.splitlines()[-1]
    shown = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout) == FILE
    for words in (["--by", "vm"], ["--format", "html"], ["--explain", "3"]):
        assert subprocess.run([*command, *words], capture_output=True, check=False).returncode == 2
    assert subprocess.run([*command, "-o", path], capture_output=True, check=False).returncode == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"transitions": None},
        {"transitions": [{"from": 1}]},
        {"n_forbidden": -1},
        {"threads": "many"},
        {"forbidden": [{"tid": 1}]},
    ],
)
def test_a_damaged_file_is_one_line(changed: dict[str, object], tmp_path: Path) -> None:
    path = written(tmp_path / "x.json", **changed)
    done = subprocess.run(
        [sys.executable, "-m", "kvmtrace", "report", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_monitor_needs_bpf(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "kvmtrace",
        "record",
        "--monitor",
        "--backend",
        "ftrace",
        "-a",
        "-o",
        tmp_path / "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--monitor needs --backend bpf" in done.stderr
