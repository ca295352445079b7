"""Buffers that are too small, on real kvm_amd: recorded + lost is the truth, and no time spans a loss."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.render.text.report_text import render_text
from kvmtrace.report.build import build_report

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.lab, pytest.mark.slow]

STORM = 60_000
GUESTS_EXITS = STORM + 2  # and one nested page fault, and the end; the host's interrupts come on top
COMMANDS = f"""
for backend in ftrace bpf; do
  kvmtrace record --backend $backend --events minimal --strict --buffer-size 8k -o $backend.dat \\
    --guest storm --count {STORM}
  [ $? = 5 ] || exit 1
done
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here, back = tmp_path_factory.mktemp("job"), tmp_path_factory.mktemp("results")
    lab = [sys.executable, "-m", "kvmtrace", "lab", "run", "--isa", "svm", "-o", str(back), "--"]
    done = subprocess.run([*lab, "bash", "-c", COMMANDS], cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return back


@pytest.mark.parametrize("backend", ["ftrace", "bpf"])
def test_recorded_and_lost_are_the_truth(results: Path, backend: str) -> None:
    recording = open_recording(results / f"{backend}.dat")
    table, meta = recording.events(), recording.capture.meta
    lost = meta["loss"]["events"]
    assert recording.loss.events == lost > 100
    exits, entries = table.count("kvm_exit"), table.count("kvm_entry")
    total = exits + entries + table.count("kvm_userspace_exit") + lost
    interrupts, odd = divmod(total - 1 - 2 * GUESTS_EXITS, 2)  # each VM-exit has its VM-entry
    assert odd == 0
    reasons = table.field("kvm_exit", "exit_reason")
    assert (reasons == 0x60).sum() <= interrupts <= (reasons == 0x60).sum() + lost
    if backend == "bpf":
        kinds = meta["loss"]["by_cpu_and_event"]["0"]
        assert exits + kinds["kvm_exit"] == entries + kinds["kvm_entry"] == GUESTS_EXITS + interrupts
    assert not check_recording(recording).n_violations


@pytest.mark.parametrize("backend", ["ftrace", "bpf"])
def test_the_report_says_so_first_and_leaves_intervals_out(results: Path, backend: str) -> None:
    recording = open_recording(results / f"{backend}.dat")
    report = build_report(recording)
    text = render_text(report).splitlines()
    assert any(line.startswith("  Loss:") and f"{recording.loss.events:,} events lost" in line for line in text[:6])
    spanned = 0  # VM-exits followed by a loss before their thread's next VM-entry
    names = [report_kind.name for report_kind in recording.events().kinds]
    waiting = False
    for kind in recording.events().kind.tolist():
        spanned += waiting and names[kind] == "lost_events"
        waiting = names[kind] == "kvm_exit" or (waiting and names[kind] not in ("kvm_entry", "lost_events"))
    assert report.loss.discarded_intervals == spanned
    assert sum(row.count - row.samples for row in report.exits) >= spanned
