"""`record --monitor` on real kvm_amd: it agrees with the model, on healthy KVM and on a faulty one."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from faults.catalogue import FAULTS, Edit
from history.build import build_variants

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.lab import Job, run_lab

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.check.verdict import Comparison

pytestmark = [pytest.mark.lab, pytest.mark.slow]
# the monitor steps a thread's automaton: a fault that this alone shows
FAULT = next(fault for fault in FAULTS if fault.name == "fpu-stays-loaded")
BOTH = """
kvmtrace record --monitor -o monitor.json --guest lifecycle --count 3; echo $? >monitor.status
kvmtrace record --backend ftrace -o run.dat --guest lifecycle --count 3
"""


def run(tmp_path: Path, script: str, modules: Path | None = None) -> Path:
    """Run a script in the SVM lab; return where its files are."""
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    result = run_lab(
        Job("svm", ("sh", "-c", script), cwd=work, out=out, module_dir=modules, memory_mib=3072, retries=1)
    )
    assert result.status == 0, (result.stdout + result.stderr).decode()[-2000:]
    return out


def both(out: Path) -> tuple[dict[str, Any], Comparison]:
    """Return what the monitor wrote, and what the model says of a recording of the same guest."""
    return json.loads((out / "monitor.json").read_text()), check_recording(open_recording(out / "run.dat"))


def counts(transitions: Any) -> dict[str, int]:
    """Return how often each step was taken that a guest takes as often in every run."""
    told = dict.fromkeys(("FPU load", "FPU unload", "userspace exit"), 0)
    for event, count in transitions:
        if event in told:
            told[event] += count
    return told


def test_healthy(tmp_path: Path) -> None:
    out = run(tmp_path, BOTH)
    monitor, verdict = both(out)
    assert (out / "monitor.status").read_text() == "0\n"
    assert monitor["n_forbidden"] == verdict.n_violations == 0
    watched = counts((row["event"], row["count"]) for row in monitor["transitions"])
    assert watched == counts((row.event, row.count) for row in verdict.transitions)
    assert watched["userspace exit"] > 100


def test_a_fault_is_forbidden_and_a_violation(tmp_path: Path) -> None:
    edits = (Edit(FAULT.file, FAULT.function, FAULT.pattern, FAULT.replacement),)
    out = run(tmp_path, BOTH, build_variants([edits])[edits])
    monitor, verdict = both(out)
    assert (out / "monitor.status").read_text() == "1\n"
    assert verdict.rules["V1"].violated
    assert monitor["n_forbidden"] > 0
    first = monitor["forbidden"][0]
    assert first["last"][-1]["step"] == first["step"]
    assert first["step"] in ("userspace exit", "FPU load"), first


def test_the_scripts_are_shell() -> None:
    assert subprocess.run(["sh", "-n"], input=BOTH, text=True, capture_output=True, check=False).stderr == ""
