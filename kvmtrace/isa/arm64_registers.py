"""arm64: names of the system registers that KVM may trap, by (Op0, Op1, CRn, CRm, Op2).

Sources: arch/arm64/kvm/sys_regs.c (sys_reg_descs), arch/arm64/include/asm/sysreg.h; Arm Architecture Reference Manual,
"System register encoding".
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

Encoding = tuple[int, int, int, int, int]


def _numbered(name: str, count: int, first: Encoding) -> dict[Encoding, str]:
    """Return registers that differ in CRm: DBGBVR0_EL1, DBGBVR1_EL1, ..."""
    op0, op1, crn, crm, op2 = first
    return {(op0, op1, crn, crm + number, op2): name.format(number) for number in range(count)}


def _in_groups_of_8(name: str, count: int, first: Encoding) -> dict[Encoding, str]:
    """Return registers that differ in Op2 first, then in CRm: PMEVCNTR0_EL0, ..."""
    op0, op1, crn, crm, _ = first
    return {(op0, op1, crn, crm + number // 8, number % 8): name.format(number) for number in range(count)}


# fmt: off
SYSTEM_REGISTERS: Mapping[Encoding, str] = MappingProxyType({
    **_numbered("DBGBVR{}_EL1", 16, (2, 0, 0, 0, 4)), **_numbered("DBGBCR{}_EL1", 16, (2, 0, 0, 0, 5)),
    **_numbered("DBGWVR{}_EL1", 16, (2, 0, 0, 0, 6)), **_numbered("DBGWCR{}_EL1", 16, (2, 0, 0, 0, 7)),
    (2, 0, 0, 2, 0): "MDCCINT_EL1", (2, 0, 0, 2, 2): "MDSCR_EL1", (2, 0, 1, 0, 0): "MDRAR_EL1",
    (2, 0, 1, 0, 4): "OSLAR_EL1", (2, 0, 1, 1, 4): "OSLSR_EL1", (2, 0, 1, 3, 4): "OSDLR_EL1",
    (2, 0, 1, 4, 4): "DBGPRCR_EL1", (2, 0, 7, 8, 6): "DBGCLAIMSET_EL1", (2, 0, 7, 9, 6): "DBGCLAIMCLR_EL1",
    (2, 0, 7, 14, 6): "DBGAUTHSTATUS_EL1", (2, 3, 0, 1, 0): "MDCCSR_EL0", (2, 3, 0, 4, 0): "DBGDTR_EL0",
    (2, 3, 0, 5, 0): "DBGDTRRX_EL0",
    (1, 0, 7, 6, 2): "DC ISW", (1, 0, 7, 10, 2): "DC CSW", (1, 0, 7, 14, 2): "DC CISW",
    (3, 0, 0, 0, 0): "MIDR_EL1", (3, 0, 0, 0, 5): "MPIDR_EL1", (3, 0, 0, 0, 6): "REVIDR_EL1",
    (3, 0, 0, 1, 0): "ID_PFR0_EL1", (3, 0, 0, 1, 1): "ID_PFR1_EL1", (3, 0, 0, 1, 2): "ID_DFR0_EL1",
    (3, 0, 0, 1, 3): "ID_AFR0_EL1", (3, 0, 0, 1, 4): "ID_MMFR0_EL1", (3, 0, 0, 1, 5): "ID_MMFR1_EL1",
    (3, 0, 0, 1, 6): "ID_MMFR2_EL1", (3, 0, 0, 1, 7): "ID_MMFR3_EL1",
    **_in_groups_of_8("ID_ISAR{}_EL1", 6, (3, 0, 0, 2, 0)),
    (3, 0, 0, 2, 6): "ID_MMFR4_EL1", (3, 0, 0, 2, 7): "ID_ISAR6_EL1",
    (3, 0, 0, 3, 0): "MVFR0_EL1", (3, 0, 0, 3, 1): "MVFR1_EL1", (3, 0, 0, 3, 2): "MVFR2_EL1",
    (3, 0, 0, 3, 4): "ID_PFR2_EL1", (3, 0, 0, 3, 5): "ID_DFR1_EL1", (3, 0, 0, 3, 6): "ID_MMFR5_EL1",
    (3, 0, 0, 4, 0): "ID_AA64PFR0_EL1", (3, 0, 0, 4, 1): "ID_AA64PFR1_EL1", (3, 0, 0, 4, 2): "ID_AA64PFR2_EL1",
    (3, 0, 0, 4, 4): "ID_AA64ZFR0_EL1", (3, 0, 0, 4, 5): "ID_AA64SMFR0_EL1",
    (3, 0, 0, 5, 0): "ID_AA64DFR0_EL1", (3, 0, 0, 5, 1): "ID_AA64DFR1_EL1", (3, 0, 0, 5, 4): "ID_AA64AFR0_EL1",
    (3, 0, 0, 5, 5): "ID_AA64AFR1_EL1", (3, 0, 0, 6, 0): "ID_AA64ISAR0_EL1", (3, 0, 0, 6, 1): "ID_AA64ISAR1_EL1",
    (3, 0, 0, 6, 2): "ID_AA64ISAR2_EL1", (3, 0, 0, 7, 0): "ID_AA64MMFR0_EL1", (3, 0, 0, 7, 1): "ID_AA64MMFR1_EL1",
    (3, 0, 0, 7, 2): "ID_AA64MMFR2_EL1", (3, 0, 0, 7, 3): "ID_AA64MMFR3_EL1", (3, 0, 0, 7, 4): "ID_AA64MMFR4_EL1",
    (3, 0, 1, 0, 0): "SCTLR_EL1", (3, 0, 1, 0, 1): "ACTLR_EL1", (3, 0, 1, 0, 2): "CPACR_EL1",
    (3, 0, 2, 0, 0): "TTBR0_EL1", (3, 0, 2, 0, 1): "TTBR1_EL1", (3, 0, 2, 0, 2): "TCR_EL1",
    (3, 0, 5, 1, 0): "AFSR0_EL1", (3, 0, 5, 1, 1): "AFSR1_EL1", (3, 0, 5, 2, 0): "ESR_EL1",
    (3, 0, 5, 3, 0): "ERRIDR_EL1", (3, 0, 5, 3, 1): "ERRSELR_EL1", (3, 0, 6, 0, 0): "FAR_EL1",
    (3, 0, 9, 14, 1): "PMINTENSET_EL1", (3, 0, 9, 14, 2): "PMINTENCLR_EL1", (3, 0, 9, 14, 6): "PMMIR_EL1",
    (3, 0, 10, 2, 0): "MAIR_EL1", (3, 0, 10, 3, 0): "AMAIR_EL1", (3, 0, 10, 4, 0): "LORSA_EL1",
    (3, 0, 10, 4, 3): "LORC_EL1", (3, 0, 10, 4, 7): "LORID_EL1", (3, 0, 12, 0, 0): "VBAR_EL1",
    (3, 0, 12, 1, 1): "DISR_EL1", (3, 0, 12, 8, 0): "ICC_IAR0_EL1", (3, 0, 12, 8, 1): "ICC_EOIR0_EL1",
    (3, 0, 12, 8, 2): "ICC_HPPIR0_EL1", (3, 0, 12, 11, 1): "ICC_DIR_EL1", (3, 0, 12, 11, 3): "ICC_RPR_EL1",
    (3, 0, 12, 11, 5): "ICC_SGI1R_EL1", (3, 0, 12, 11, 6): "ICC_ASGI1R_EL1", (3, 0, 12, 11, 7): "ICC_SGI0R_EL1",
    (3, 0, 12, 12, 0): "ICC_IAR1_EL1", (3, 0, 12, 12, 1): "ICC_EOIR1_EL1", (3, 0, 12, 12, 4): "ICC_CTLR_EL1",
    (3, 0, 12, 12, 5): "ICC_SRE_EL1", (3, 0, 12, 12, 7): "ICC_IGRPEN1_EL1", (3, 0, 13, 0, 1): "CONTEXTIDR_EL1",
    (3, 0, 14, 1, 0): "CNTKCTL_EL1", (3, 1, 0, 0, 0): "CCSIDR_EL1", (3, 1, 0, 0, 1): "CLIDR_EL1",
    (3, 1, 0, 0, 7): "AIDR_EL1", (3, 2, 0, 0, 0): "CSSELR_EL1", (3, 3, 0, 0, 1): "CTR_EL0",
    (3, 3, 9, 12, 0): "PMCR_EL0", (3, 3, 9, 12, 1): "PMCNTENSET_EL0", (3, 3, 9, 12, 2): "PMCNTENCLR_EL0",
    (3, 3, 9, 12, 3): "PMOVSCLR_EL0", (3, 3, 9, 12, 4): "PMSWINC_EL0", (3, 3, 9, 12, 5): "PMSELR_EL0",
    (3, 3, 9, 12, 6): "PMCEID0_EL0", (3, 3, 9, 12, 7): "PMCEID1_EL0", (3, 3, 9, 13, 0): "PMCCNTR_EL0",
    (3, 3, 9, 13, 1): "PMXEVTYPER_EL0", (3, 3, 9, 13, 2): "PMXEVCNTR_EL0", (3, 3, 9, 14, 0): "PMUSERENR_EL0",
    (3, 3, 9, 14, 3): "PMOVSSET_EL0", (3, 3, 14, 0, 1): "CNTPCT_EL0", (3, 3, 14, 2, 0): "CNTP_TVAL_EL0",
    (3, 3, 14, 2, 1): "CNTP_CTL_EL0", (3, 3, 14, 2, 2): "CNTP_CVAL_EL0", (3, 3, 14, 15, 7): "PMCCFILTR_EL0",
    **_in_groups_of_8("PMEVCNTR{}_EL0", 31, (3, 3, 14, 8, 0)),
    **_in_groups_of_8("PMEVTYPER{}_EL0", 31, (3, 3, 14, 12, 0)),
})
# fmt: on
ENCODINGS: Mapping[str, Encoding] = MappingProxyType({name: code for code, name in SYSTEM_REGISTERS.items()})
