"""arm64's own perf, recording real KVM in the lab and reading what it recorded: our tables are its, digit for digit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmtrace.formats import open_recording
from kvmtrace.lab import Job, run_lab
from kvmtrace.render.text.perf_text import render_perf_report
from kvmtrace.report.build import ReportOptions, build_report

if TYPE_CHECKING:
    from pathlib import Path

GUESTS = ("lifecycle", "smp", "interrupt")
# perf prints its table to standard error
SCRIPT = """
export PYTHONPATH=/usr/lib/kvmtrace
for guest in {guests}; do
    perf record -q -e 'kvm:*' -a -o $guest.perf.data -- python3 -m kvmtrace.workload $guest || exit
    perf kvm -i $guest.perf.data stat report >$guest.txt 2>&1 || exit
done
perf kvm stat record -o stat.perf.data python3 -m kvmtrace.workload lifecycle || exit
perf kvm -i stat.perf.data stat report >stat.txt 2>&1
"""


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


@pytest.mark.lab
@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
@pytest.mark.parametrize("mode", ["vhe", "nvhe"])
def test_perf_kvm_stat(mode: str, kernel: str, tmp_path: Path) -> None:
    script = SCRIPT.format(guests=" ".join(GUESTS))
    (tmp_path / "cwd").mkdir()
    job = Job("arm64", ("sh", "-c", script), kernel, cwd=tmp_path / "cwd", out=tmp_path, mode=mode, timeout_s=1800)
    result = run_lab(job)
    assert result.status == 0, result.stderr.decode(errors="replace")[-800:]
    for name in (*GUESTS, "stat"):
        said = (tmp_path / f"{name}.txt").read_text()
        recording = open_recording(str(tmp_path / f"{name}.perf.data"))
        report = build_report(recording, ReportOptions(model=False))
        assert report.perf_compatible.vmexit
        # before its table, perf tells which format it cannot parse
        assert lines(render_perf_report(report)) == lines(said[said.index("Analyze events") :])
