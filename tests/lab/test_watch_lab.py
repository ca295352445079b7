"""`watch` on real kvm_amd: one exit in many is slow, or breaks a rule, and is caught 50 times of 50; nothing else is.

Each boot makes ten trials of each kind, so that none of them takes longer than a lab may.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from typing import TYPE_CHECKING

import pytest
from faults.catalogue import Edit
from history.build import build_variants

from kvmtrace.formats import open_recording
from kvmtrace.lab import Job, run_lab
from kvmtrace.lab.job import package_parent
from kvmtrace.report.build import build_report
from tests.watch import trials

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

pytestmark = [pytest.mark.lab, pytest.mark.slow]

PARAMETER = "static uint {0};\\nmodule_param({0}, uint, 0644);"
# each counts down from what is written to it, and is wrong once
FAULTS = (
    Edit(
        "arch/x86/kvm/cpuid.c",
        "",
        r'#include "cpuid\.h"',
        '#include "cpuid.h"\\n#include <linux/moduleparam.h>\\n' + PARAMETER.format("repeat_cpuid"),
    ),
    Edit(
        "arch/x86/kvm/cpuid.c",
        "int kvm_emulate_cpuid",
        r"return kvm_skip_emulated_instruction\(vcpu\);",
        "if (repeat_cpuid && !--repeat_cpuid)\\n\\t\\treturn 1;\\n\\treturn kvm_skip_emulated_instruction(vcpu);",
    ),
    Edit(
        "arch/x86/kvm/svm/svm.c",
        "",
        r'#include "svm_ops\.h"',
        '#include "svm_ops.h"\\n' + PARAMETER.format("hide_exit"),
    ),
    Edit(
        "arch/x86/kvm/svm/svm.c",
        "static int svm_handle_exit",
        r"trace_kvm_exit\(vcpu, KVM_ISA_SVM\);",
        "if (!hide_exit || --hide_exit)\\n\\t\\ttrace_kvm_exit(vcpu, KVM_ISA_SVM);",
    ),
)
COUNT = 5000  # exits of each guest
SLOW = ["--count", COUNT, "--slow-ms", 100, "--on", "slower-than 60ms:io"]
FORBIDDEN = ["--count", COUNT, "--fault", f"kvm_amd/parameters/hide_exit={COUNT // 2}", "--on", "monitor"]
WRONG = ["--count", COUNT, "--fault", f"kvm/parameters/repeat_cpuid={COUNT // 2}", "--on", "model", "--keep", 10]


def run(tmp_path: Path, *jobs: Sequence[object]) -> list[Path]:
    """Run trials.py with such options in one boot of the SVM lab; return their folders."""
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    shutil.copy(trials.__file__, work)
    lines = [f"export PYTHONPATH={shlex.quote(str(package_parent()))}"]
    for number, options in enumerate(jobs):
        lines.append(shlex.join([sys.executable, "trials.py", f"trials-{number}", *map(str, options)]))
    modules = build_variants([FAULTS])[FAULTS]
    job = Job("svm", ("sh", "-e", "-c", "\n".join(lines)), cwd=work, out=out, module_dir=modules, memory_mib=4096)
    result = run_lab(job)
    assert result.status == 0, (result.stdout + result.stderr).decode()[-2000:]
    return [out / f"trials-{number}" for number in range(len(jobs))]


@pytest.mark.parametrize("boot", range(5))
def test_each_is_caught_and_nothing_else(boot: int, tmp_path: Path) -> None:
    for folder in run(tmp_path, ["--trials", 10, *SLOW], ["--trials", 10, *FORBIDDEN]):
        found = trials.judge(folder)
        assert not found["wrong"], boot
        assert found["caught"] == 10
        assert found["least_before_s"] >= 1


def test_any_rule_that_is_broken_is_caught_with_the_part_before(tmp_path: Path) -> None:
    """CPUID is executed twice, once: V6, which the checker alone knows."""
    (folder,) = run(tmp_path, ["--trials", 1, *WRONG])
    named = {path.name for path in folder.glob("kvmtrace-*")}
    (name,) = (name for name in named if not name.endswith("-before.dat"))
    report = build_report(open_recording(folder / name))
    assert report.triggers[0].kind == "model"
    assert report.model is not None
    assert report.model.rules["V6"].violated
    assert not list(folder.glob(".*"))
