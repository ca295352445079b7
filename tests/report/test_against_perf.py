"""Recordings that perf made: its own tables digit for digit, and its view of where the thread's time went."""

from __future__ import annotations

import lzma
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from writers.arm64_perf import write_perf_data

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.render.text.perf_text import TITLES, render_perf_table
from kvmtrace.report.build import ReportOptions, build_report
from kvmtrace.report.selection import Selection

if TYPE_CHECKING:
    from kvmtrace.table.recording import Recording

FIXTURES = Path(__file__).parents[2] / "fixtures"
RECORDED = Path(__file__).parent / "recorded"
NAMES = sorted(path.name.removesuffix(".xz") for path in RECORDED.glob("*.perf.data.xz"))
SCHED_LINE = re.compile(r"\s*(\d+)\.(\d{6}) \[\d+\]\s+.*\]\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+(\w+)")


@pytest.fixture(params=NAMES)
def recording(request: pytest.FixtureRequest, tmp_path: Path) -> Recording:
    path = tmp_path / request.param
    path.write_bytes(lzma.decompress((RECORDED / f"{request.param}.xz").read_bytes()))
    return open_recording(str(path))


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip() and not line.startswith("Analyze")]


@pytest.mark.parametrize("perf_only", [False, True])
def test_tables_equal_perf_kvm_stat_to_the_digit(recording: Recording, perf_only: bool) -> None:
    tables = build_report(recording, ReportOptions(model=False, perf_only=perf_only)).perf_compatible
    ours = "".join(render_perf_table(title, getattr(tables, name), "") for name, title in TITLES.items())
    theirs = (RECORDED / f"{Path(recording.capture.path).name}.kvmstat.txt").read_text()
    assert lines(ours) == lines(theirs)
    assert "Total Samples:0" not in theirs.splitlines()[-3]


OF_ARM64 = sorted((Path(__file__).parent / "arm64").glob("*.kvmstat.txt"))


@pytest.mark.parametrize("printed", OF_ARM64, ids=lambda path: path.name.removesuffix(".kvmstat.txt"))
def test_arm64s_table_equals_arm64s_perf_to_the_digit(printed: Path, tmp_path: Path) -> None:
    """There perf measures guest mode, from entry to exit."""
    fixture = open_recording(str(FIXTURES / printed.name.replace(".kvmstat.txt", ".dat")))
    path = tmp_path / "arm64.perf.data"
    write_perf_data(fixture.events(), path)
    for recording in (open_recording(str(path)), fixture):
        tables = build_report(recording, ReportOptions(model=False)).perf_compatible
        assert lines(render_perf_table(TITLES["vmexit"], tables.vmexit, "")) == lines(printed.read_text())
        assert (tables.mmio, tables.ioport, tables.msr) == ((), (), ())


ARM64_RECORDED = sorted((Path(__file__).parent / "arm64" / "recorded").glob("*.perf.data.xz"))
SAMPLE = re.compile(r"^(\d+) (\d+) \S+ \[\S+\]: PERF_RECORD_SAMPLE\([^)]*\): (\d+)/(\d+):", re.MULTILINE)


@pytest.mark.parametrize("packed", ARM64_RECORDED, ids=lambda path: path.name.removesuffix(".perf.data.xz"))
def test_what_arm64s_perf_recorded_of_real_kvm(packed: Path, tmp_path: Path) -> None:
    """Its table to the digit, every sample's CPU, time and thread as perf dumps them, and the model holds."""
    path = tmp_path / packed.name.removesuffix(".xz")
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    printed = packed.with_name(f"{path.name}.kvmstat.txt").read_text()
    for perf_only in (False, True):
        tables = build_report(open_recording(str(path)), ReportOptions(model=False, perf_only=perf_only))
        assert lines(render_perf_table(TITLES["vmexit"], tables.perf_compatible.vmexit, "")) == lines(printed)
    events = open_recording(str(path)).events()
    dump = subprocess.run(["perf", "script", "-D", "-i", str(path)], check=True, capture_output=True).stdout.decode()
    want = sorted((int(ts), int(cpu), int(tid)) for cpu, ts, _, tid in SAMPLE.findall(dump))
    assert sorted(zip(events.ts_ns.tolist(), events.cpu.tolist(), events.tid.tolist(), strict=True)) == want
    verdict = check_recording(open_recording(str(path)))
    assert (verdict.n_violations, verdict.n_suspicions, verdict.unexplained) == (0, 0, {})


def sched_lines(name: str) -> list[tuple[int, float, float, str]]:
    """Return perf sched's (time of leaving the CPU, us; ms off the CPU before; ms on it; state it left in)."""
    matches = filter(None, map(SCHED_LINE.match, (RECORDED / f"{name}.sched.txt").read_text().splitlines()))
    return [(int(m[1]) * 1_000_000 + int(m[2]), float(m[3]) + float(m[4]), float(m[5]), m[6]) for m in matches]


def off_cpu_ms(name: str, start_us: int) -> dict[str, float]:
    """Return perf sched's time off the CPU since `start_us`, by why the thread left: asleep or runnable."""
    spent = {"asleep": 0.0, "runnable": 0.0}
    left_in = ""
    for now_us, away_ms, ran_ms, state in sched_lines(name):
        if left_in and now_us - ran_ms * 1000 > start_us:
            spent["asleep" if left_in in {"S", "D"} else "runnable"] += away_ms
        left_in = state
    return spent


def test_time_off_the_cpu_agrees_with_perf_sched_within_one_percent(recording: Recording) -> None:
    name = Path(recording.capture.path).name
    last_us = sched_lines(name)[-1][0]  # perf tells of a stretch when the thread leaves the CPU again
    selection = Selection(end=(last_us + 1) * 1000, relative=False)
    (vcpu,) = build_report(recording, ReportOptions(selection, model=False)).vcpus
    events = recording.events()
    rows = np.concatenate([events.rows(kind) for kind in ("kvm_entry", "kvm_exit", "kvm_fpu")])
    start_us = int(events.ts_ns[rows[events.tid[rows] == vcpu.tid].min()]) // 1000
    perf = off_cpu_ms(name, start_us)
    budget = vcpu.budget
    assert budget.total_ns() == vcpu.wall_ns
    # perf prints microseconds: a hundredth, and the rounding of each of its lines
    assert (budget.blocked_ns or 0) / 1e6 == pytest.approx(perf["asleep"], rel=0.01, abs=0.005)
    assert (budget.preempted_ns or 0) / 1e6 == pytest.approx(perf["runnable"], rel=0.01, abs=0.005)
    ran_ms = (last_us - start_us) / 1000 - perf["asleep"] - perf["runnable"]
    on_cpu_ns = vcpu.wall_ns - (budget.blocked_ns or 0) - (budget.preempted_ns or 0)
    assert on_cpu_ns / 1e6 == pytest.approx(ran_ms, rel=0.01)
