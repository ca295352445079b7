"""arm64: how its events look as text, as patterns whose groups are fields.

Sources: arch/arm64/kvm/trace_arm.h, trace_handle_exit.h; arch/arm64/include/asm/kvm_arm.h (kvm_arm_exception_type)
"""

from __future__ import annotations

_X = r"0x[0-9a-fA-F]+"
_H = r"[0-9a-fA-F]+"
_REGISTER = r"\S+ \((?P<Op0>\d+),(?P<Op1>\d+),(?P<CRn>\d+),(?P<CRm>\d+),(?P<Op2>\d+)\)"

# before Linux 5.1 the text calls every VM-exit IRQ, and shows the class of the last trap: neither tells the reason
# (71a7e47f39a2, KVM: arm/arm64: Fixup the kvm_exit tracepoint)
STALE = r"IRQ: HSR_EC: 0x0*[1-9a-fA-F]"

# fmt: off
ARM64_PATTERNS: dict[str, tuple[str, ...]] = {
    "kvm_entry": (rf"PC: (?P<vcpu_pc>{_X})",),
    "kvm_exit": (rf"(?!{STALE})(?P<ret>\w+): HSR_EC: (?P<esr_ec>{_X})(?: \([^)]{{0,40}}\))?, PC: (?P<vcpu_pc>{_X})",),
    "kvm_guest_fault": (
        rf"ipa (?P<ipa>{_X}|0), hsr (?P<hsr>{_X}|0+), hxfar (?P<hxfar>{_X}|0+), pc (?P<vcpu_pc>{_X}|0+)",),
    "kvm_access_fault": (rf"IPA: (?P<ipa_hex>{_H})",),
    "kvm_handle_sys_reg": (rf"HSR (?P<hsr>{_X})",),
    "kvm_sys_access": (rf"PC: (?P<vcpu_pc_hex>{_H}) {_REGISTER} (?P<is_write>read|write)",),
    "kvm_wfx_arm64": (rf"guest executed wf(?P<is_wfe>[ie]) at: (?P<vcpu_pc>{_X})",),
    "kvm_hvc_arm64": (rf"HVC at (?P<vcpu_pc>{_X}) \(r0: (?P<r0>{_X}), imm: (?P<imm>{_X})\)",),
}
ARM64_WORDS: dict[str, dict[str, int]] = {
    "ret": {"IRQ": 0, "SERROR": 1, "TRAP": 2, "HYP_GONE": 0xBADCA11 & 0x1F},
    "is_write": {"read": 0, "write": 1},
    "is_wfe": {"i": 0, "e": 1},
}
# fmt: on
