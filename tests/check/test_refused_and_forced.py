"""Healthy traces that were once called wrong, or ended the check: found beside historic bugs that were put back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording

if TYPE_CHECKING:
    from pathlib import Path

# #UD of the prefix that forces emulation: the emulator begins behind its five bytes
FORCED = """\
 vmm-100  [000] ..... 1.000001: kvm_fpu: load=1
 vmm-100  [000] d..1. 1.000002: kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=0
 vmm-100  [000] d..1. 1.000003: kvm_exit: exit_reason=70 guest_rip=0x100a isa=2 vcpu_id=0
 vmm-100  [000] ..... 1.000004: kvm_emulate_insn: rip=100f csbase=0 len=4 insn=ARRAY[66, 0f, ae, 38] flags=5 failed=0
 vmm-100  [000] d..1. 1.000005: kvm_entry: vcpu_id=0 rip=0x1013 immediate_exit=0
 vmm-100  [000] d..1. 1.000006: kvm_exit: exit_reason=70 guest_rip=0x1020 isa=2 vcpu_id=0
 vmm-100  [000] ..... 1.000007: kvm_emulate_insn: rip=1025 csbase=0 len=4 insn=ARRAY[f3, 0f, c7, f8] flags=5 failed=0
 vmm-100  [000] ..... 1.000008: kvm_inj_exception: exception=6 has_error=0 error_code=0x0 reinjected=0
 vmm-100  [000] d..1. 1.000009: kvm_entry: vcpu_id=0 rip=0x1025 immediate_exit=0
"""
# kvm_exit is traced late, and KVM itself refuses what L1 wants L2 to be
REFUSED = """\
 vmm-100  [000] ..... 1.000001: kvm_fpu: load=1
 vmm-100  [000] d..1. 1.000003: kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=0
 vmm-100  [000] ..... 1.000005: kvm_exit: exit_reason=128 guest_rip=0x1000 isa=2 vcpu_id=0
 vmm-100  [000] ..... 1.000006: kvm_emulate_insn: rip=1000 csbase=0 len=3 insn=ARRAY[0f, 01, d8] flags=5 failed=0
 vmm-100  [000] ..... 1.000007: kvm_nested_vmenter_failed: msg=cr0 err=0
 vmm-100  [000] d..1. 1.000009: kvm_entry: vcpu_id=0 rip=0x1003 immediate_exit=0
"""


def conforms(text: str, path: Path) -> bool:
    path.write_text(text)
    verdict = check_recording(open_recording(path))
    return verdict.conforms and not verdict.n_suspicions


def test_emulation_that_a_prefix_forces(tmp_path: Path) -> None:
    assert conforms(FORCED, tmp_path / "forced.txt")
    assert not conforms(FORCED.replace("0x1013", "0x1015"), tmp_path / "elsewhere.txt")


def test_a_nested_entry_that_kvm_refuses(tmp_path: Path) -> None:
    assert conforms(REFUSED, tmp_path / "refused.txt")


# KVM injects what the processor cannot deliver: the entry fails without a VM-exit (VMfail)
ENTRY_FAILS = """\
 vmm-100  [000] ..... 1.000001: kvm_fpu: load=1
 vmm-100  [000] d..1. 1.000002: kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=0
 vmm-100  [000] d..1. 1.000003: kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 vcpu_id=0
 vmm-100  [000] ..... 1.000004: kvm_msr: write=1 ecx=10 data=0x0 exception=1
 vmm-100  [000] ..... 1.000005: kvm_inj_exception: exception=13 has_error=1 error_code=0x0 reinjected=0
 vmm-100  [000] d..1. 1.000006: kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=0
 vmm-100  [000] ..... 1.000007: kvm_fpu: load=0
 vmm-100  [000] ..... 1.000008: kvm_userspace_exit: reason=9 errno=0
"""
# the first VM-entry of a KVM_RUN: the VMM may have set what the processor refuses
SET_BY_THE_VMM = """\
 vmm-100  [000] ..... 1.000001: kvm_fpu: load=1
 vmm-100  [000] d..1. 1.000002: kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=0
 vmm-100  [000] ..... 1.000003: kvm_fpu: load=0
 vmm-100  [000] ..... 1.000004: kvm_userspace_exit: reason=9 errno=0
"""
# VMREAD whose operand is on a page that is not present
OPERAND_FAULTS = """\
 vmm-100  [000] ..... 1.000001: kvm_fpu: load=1
 vmm-100  [000] d..1. 1.000002: kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=0
 vmm-100  [000] d..1. 1.000003: kvm_exit: exit_reason=23 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 vcpu_id=0
 vmm-100  [000] ..... 1.000004: kvm_inj_exception: exception=14 has_error=1 error_code=0x2 reinjected=0
 vmm-100  [000] d..1. 1.000005: kvm_entry: vcpu_id=0 rip=0x1000 immediate_exit=0
"""


def test_an_entry_that_kvm_itself_made_fail(tmp_path: Path) -> None:
    assert not conforms(ENTRY_FAILS, tmp_path / "fails.txt")
    assert conforms(SET_BY_THE_VMM, tmp_path / "set.txt")


def test_an_instruction_that_faults_is_not_stepped_over(tmp_path: Path) -> None:
    assert conforms(OPERAND_FAULTS, tmp_path / "faults.txt")
    stepped = OPERAND_FAULTS.replace(
        "1.000005: kvm_entry: vcpu_id=0 rip=0x1000", "1.000005: kvm_entry: vcpu_id=0 rip=0x1003"
    )
    assert not conforms(stepped, tmp_path / "stepped.txt")
    told_of_a_page = stepped.replace("error_code=0x2", "error_code=0x0")
    assert conforms(told_of_a_page, tmp_path / "asynchronous.txt")
