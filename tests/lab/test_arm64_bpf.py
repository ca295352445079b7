"""The BPF back end on real KVM/arm64 in the lab, with bcc there: a recording, the summary and top."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.formats.summary.summary_file import read_summary
from kvmtrace.isa.registry import BY_NAME
from kvmtrace.lab import Job, run_lab
from kvmtrace.workload.result import GuestRun

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
export KVMTRACE_BPF_CACHE=/run/bpf
kvmtrace record --backend bpf --guest lifecycle -o lifecycle.bpf || exit
kvmtrace record --summary --guest lifecycle -o lifecycle.summary || exit
kvmtrace top -n 1 >/dev/null || exit
PYTHONPATH=/usr/lib/kvmtrace python3 -m kvmtrace.workload storm --count 100000000 --timeout 3000 &
storm=$!
kvmtrace top -n 3 -i 5 >top.txt || exit
kvmtrace exporter --no-listen --textfile $PWD/metrics.prom --interval 2 -d 20 &
while sleep 1 && kill -0 $!; do cp metrics.prom kept.txt; done 2>/dev/null
kill $storm
true
"""


@pytest.mark.lab
@pytest.mark.slow
def test_recording_summary_top_and_exporter(tmp_path: Path) -> None:
    (tmp_path / "cwd").mkdir()
    job = Job("arm64", ("sh", "-c", SCRIPT), cwd=tmp_path / "cwd", out=tmp_path, with_bcc=True, timeout_s=1800)
    result = run_lab(job)
    assert result.status == 0, result.stderr.decode(errors="replace")[-800:]
    recording = open_recording(str(tmp_path / "lifecycle.bpf"))
    verdict = check_recording(recording)
    assert (verdict.n_violations, verdict.n_suspicions, verdict.unexplained) == (0, 0, {})
    known = GuestRun.from_dict(recording.capture.meta["guest_run"]).known.arm64
    summary = tmp_path / "lifecycle.summary"
    (vcpu,) = read_summary(summary.read_bytes(), summary.name).vcpus
    counts = {BY_NAME["arm64"].describe(code): cell.count for code, cell in vcpu.exits.items()}
    assert {name: counts[name] for name in known} == known
    assert "HVC64" in (tmp_path / "top.txt").read_text()
    assert 'reason="HVC64"' in (tmp_path / "kept.txt").read_text()
