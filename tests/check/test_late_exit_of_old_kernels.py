"""VMX before 5.8 traced kvm_exit with interrupts on, after the run function: that is no violation; later it is."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.formats.known_formats import open_recording

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.check.verdict import Comparison

OLD = """\
 vmm-100 [000] .... 1.000001: kvm_fpu: load
 vmm-100 [000] d... 1.000002: kvm_entry: vcpu 0
 vmm-100 [000] .... 1.000010: kvm_exit: reason EXTERNAL_INTERRUPT rip 0x1000 info 0 800000ec
 vmm-100 [000] d... 1.000030: kvm_entry: vcpu 0
 vmm-100 [000] .... 1.000034: kvm_exit: reason EXTERNAL_INTERRUPT rip 0x1000 info 0 800000ec
 vmm-100 [000] d... 1.000050: kvm_entry: vcpu 0
"""
FULL = "vcpu 0 reason EXTERNAL_INTERRUPT rip 0x1000 info1 0x0 info2 0x0 intr_info 0x800000ec error_code 0x0"
NEW = re.sub(r"kvm_exit: .*", f"kvm_exit: {FULL}", OLD).replace("vcpu 0\n", "vcpu 0, rip 0x1000\n")


def checked(text: str, tmp_path: Path) -> Comparison:
    path = tmp_path / "trace.txt"
    path.write_text(text)
    return check_recording(open_recording(path))


def test_an_old_kernel_is_not_accused(tmp_path: Path) -> None:
    verdict = checked(OLD, tmp_path)
    assert verdict.n_violations == 0
    assert verdict.rules["V3"].checked == 3  # interrupts at kvm_entry are judged all the same


@pytest.mark.parametrize("exits", [1, 2])
def test_a_newer_one_is(exits: int, tmp_path: Path) -> None:
    whole = NEW.replace(".... 1.000010", "d... 1.000010").replace(".... 1.000034", "d... 1.000034")
    assert checked(whole, tmp_path).n_violations == 0
    wrong = NEW if exits == 2 else NEW.replace(".... 1.000010", "d... 1.000010")
    verdict = checked(wrong, tmp_path)
    assert [violation.rule for violation in verdict.violations] == ["V3"] * exits


def test_an_old_kernels_entry_with_interrupts_on_is_wrong(tmp_path: Path) -> None:
    verdict = checked(OLD.replace("d... 1.000030", ".... 1.000030"), tmp_path)
    assert [violation.rule for violation in verdict.violations] == ["V3"]
