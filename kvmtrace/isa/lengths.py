"""How long the guest's exiting instructions usually are: encodings without superfluous prefixes.

The processor tells KVM an instruction's length, but no event carries it on VMX. A guest that resumes further
on than the longest usual encoding is suspicious, not wrong: prefixes may be repeated at will.
Source: SDM volume 2, instruction reference (opcode column)
"""

from __future__ import annotations

from kvmtrace.isa.exit_reasons import ISA_SVM, ISA_VMX

# isa -> exit code -> longest usual length in bytes
# fmt: off
LONGEST_USUAL: dict[int, dict[int, int]] = {
    ISA_VMX: {
        10: 2,  # CPUID 0f a2
        12: 1,  # HLT f4
        13: 2,  # INVD 0f 08
        15: 2,  # RDPMC 0f 33
        18: 3,  # VMCALL 0f 01 c1
        28: 4,  # MOV CR 0f 20/22 /r, with REX for R8..R15 and CR8; LMSW m16 is longer and rare
        29: 4,  # MOV DR 0f 21/23 /r, with REX
        30: 3,  # IN, OUT: e4..e7 ib, ec..ef, with operand-size prefix
        31: 2,  # RDMSR 0f 32
        32: 2,  # WRMSR 0f 30
        36: 3,  # MWAIT 0f 01 c9
        39: 3,  # MONITOR 0f 01 c8
        40: 2,  # PAUSE f3 90
        54: 3,  # WBINVD 0f 09, WBNOINVD f3 0f 09
        55: 3,  # XSETBV 0f 01 d1
    },
    ISA_SVM: {
        0x6F: 2, 0x72: 2, 0x76: 2, 0x77: 2, 0x78: 1, 0x7B: 3, 0x7C: 2, 0x81: 3, 0x89: 3, 0x8A: 3, 0x8B: 3,
        0x8D: 3,
    },
}
# fmt: on
