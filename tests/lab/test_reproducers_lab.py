"""From a violation to a guest, in the SVM lab: what `report --explain N --as-guest` writes shows the same violation.

Faulty builds of KVM, one after the other in a boot; on the healthy KVM beside them the same guests conform.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from faults.catalogue import FAULTS, Edit
from history.build import build_variants

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from kvmtrace.lab import Job, run_lab
from kvmtrace.lab.initramfs import find_busybox
from kvmtrace.report.build import check_report

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.check.verdict import Comparison

pytestmark = [pytest.mark.lab, pytest.mark.slow]
NAMES = ("svm-in-skips-a-byte-more", "halt-reported-as-signal", "fpu-stays-loaded", "run-returns-something-else")
CHOSEN = [fault for fault in FAULTS if fault.name in NAMES]
HEAD = """
swap() {
    for module in kvm_amd kvm; do ./busybox rmmod $module || exit 1; done
    ./busybox insmod $1/kvm.ko && ./busybox insmod $1/kvm-amd.ko || exit 1
}
record() {
    name=$1
    shift
    kvmtrace record --backend ftrace -o $name.dat "$@"
}
"""
FOUND = "\n".join(f"swap ./{fault.name}; record {fault.name} {' '.join(fault.target)}" for fault in CHOSEN)
AGAIN = "\n".join(f"swap ./{name}; record {name}-again --guest {name}.lst" for name in NAMES)
HEALTHY = "swap ./healthy\n" + "\n".join(f"record {name}-healthy --guest {name}.lst" for name in NAMES)


def run(lines: str, work: Path, out: Path) -> None:
    """Run lines in the lab; what they record comes into `out`."""
    job = Job("svm", ("sh", "-c", f"{HEAD}{lines}\ntrue\n"), cwd=work, out=out, memory_mib=3072, retries=1)
    result = run_lab(job)
    assert result.status == 0, (result.stdout + result.stderr).decode()[-2000:]


def fill(work: Path) -> None:
    """Put kvm's modules into the lab's directory: the faulty ones, and the source as it is."""
    shutil.copy(find_busybox(), work / "busybox")
    edits = {fault.name: (Edit(fault.file, fault.function, fault.pattern, fault.replacement),) for fault in CHOSEN}
    built = build_variants([(), *edits.values()])
    for name, own in (("healthy", ()), *edits.items()):
        (work / name).mkdir()
        for module in ("kvm.ko", "kvm-amd.ko"):
            shutil.copy(built[own] / module, work / name)


def test_the_reproducers(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    fill(work)
    run(FOUND, work, out)
    rules = {}
    for fault in CHOSEN:
        path = out / f"{fault.name}.dat"
        model = check_report(open_recording(path)).model
        assert model is not None
        first = model.first_divergence
        assert first is not None
        assert first.rule in fault.rules
        rules[fault.name] = first.rule
        listing = work / f"{fault.name}.lst"
        words = ["report", path, "--explain", str(first.vm_exit), "--tid", str(first.tid), "--as-guest", "-o", listing]
        subprocess.run([sys.executable, "-m", "kvmtrace", *words], check=True)
    run(f"{AGAIN}\n{HEALTHY}", work, out)
    for name, rule in rules.items():
        assert judged(out / f"{name}-again.dat").rules[rule].violated, name
        assert judged(out / f"{name}-healthy.dat").conforms, name


def judged(path: Path) -> Comparison:
    """Return the model's verdict."""
    return check_recording(open_recording(path))


def test_the_scripts_are_shell() -> None:
    done = subprocess.run(
        ["sh", "-n"], input=f"{HEAD}{FOUND}\n{AGAIN}\n{HEALTHY}", text=True, capture_output=True, check=False
    )
    assert done.stderr == ""
