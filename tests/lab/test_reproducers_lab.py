"""From a violation to a guest, in the SVM lab: what `report --explain N --as-guest` writes shows the same violation.

Three faulty builds of KVM, one after the other in a boot; on the healthy KVM beside them the same guests conform.
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

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.check.verdict import Comparison

pytestmark = [pytest.mark.lab, pytest.mark.slow]
NAMES = ("svm-in-skips-a-byte-more", "halt-reported-as-signal", "fpu-stays-loaded")
CHOSEN = [fault for fault in FAULTS if fault.name in NAMES]
# prints the number of the VM-exit to be explained, and its thread
FIRST = """\
import sys
from kvmtrace.formats import open_recording
from kvmtrace.report.build import check_report
first = check_report(open_recording(sys.argv[1])).model.first_divergence
print(first.vm_exit, first.tid)
"""
HEAD = """
swap() {
    for module in kvm_amd kvm; do ./busybox rmmod $module || exit 1; done
    ./busybox insmod $1/kvm.ko && ./busybox insmod $1/kvm-amd.ko || exit 1
}
again() {
    name=$1
    shift
    swap ./$name
    kvmtrace record --backend ftrace -o $name.dat "$@"
    set -- $($python first.py $name.dat)
    kvmtrace report $name.dat --explain $1 --tid $2 --as-guest -o $name.lst
    kvmtrace record --backend ftrace -o $name-again.dat --guest $name.lst
}
"""


def script(names: tuple[str, ...]) -> str:
    """Return what the lab's host runs."""
    lines = [f"python={sys.executable}", HEAD]
    lines += [f"again {fault.name} {' '.join(fault.target)}" for fault in CHOSEN]
    lines += [
        "swap ./healthy",
        *(f"kvmtrace record --backend ftrace -o {n}-healthy.dat --guest {n}.lst" for n in names),
    ]
    return "\n".join(lines) + "\ntrue\n"


def test_the_reproducers(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    (work / "first.py").write_text(FIRST)
    shutil.copy(find_busybox(), work / "busybox")
    edits = {fault.name: (Edit(fault.file, fault.function, fault.pattern, fault.replacement),) for fault in CHOSEN}
    built = build_variants([(), *edits.values()])
    for name, own in (("healthy", ()), *edits.items()):
        (work / name).mkdir()
        for module in ("kvm.ko", "kvm-amd.ko"):
            shutil.copy(built[own] / module, work / name)
    job = Job("svm", ("sh", "-c", script(NAMES)), cwd=work, out=out, memory_mib=3072, retries=1)
    result = run_lab(job)
    assert result.status == 0, (result.stdout + result.stderr).decode()[-2000:]
    for fault in CHOSEN:
        whole, again, healthy = (judged(out / f"{fault.name}{end}.dat") for end in ("", "-again", "-healthy"))
        assert whole.first_divergence is not None
        assert again.first_divergence is not None, fault.name
        assert whole.first_divergence.rule in fault.rules
        assert again.rules[whole.first_divergence.rule].violated, fault.name

        assert healthy.conforms, fault.name


def judged(path: Path) -> Comparison:
    """Return the model's verdict."""
    return check_recording(open_recording(path))


def test_the_script_is_shell() -> None:
    assert subprocess.run(["sh", "-n"], input=script(NAMES), text=True, capture_output=True, check=False).stderr == ""
