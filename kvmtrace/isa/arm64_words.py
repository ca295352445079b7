"""arm64: the syndrome of an exception (ESR_EL2) in words.

Sources: Arm Architecture Reference Manual, "ISS encoding for an exception from a Data Abort", "... from MSR, MRS, or
System instruction execution"; arch/arm64/include/asm/esr.h.
"""

from __future__ import annotations

from typing import Any

from kvmtrace.isa.words import AbortAccess, RegisterAccess
from kvmtrace.lazy_dataclass import dataclass

TRAP_CODES = 2 << 6  # exit codes of traps: ARM_EXCEPTION_TRAP above an exception class
CLASS_SHIFT = 26
DESCRIBES = 0x3FF << 15 | 1 << 6  # ISV to SF, and WnR: zero in the syndrome of an instruction abort
VECTOR_ALIGNMENT = 0x200  # of a synchronous exception's vector: each group of four has 0x80 bytes a vector
_VECTORS_32 = (0x04, 0x0C, 0x10)  # AArch32: undefined instruction, prefetch abort, data abort
_FAULTS = {0x0: "address size fault", 0x4: "translation fault", 0x8: "access flag fault", 0xC: "permission fault"}
_SIZES = ("byte", "halfword", "word", "doubleword")


@dataclass(frozen=True)
class DataAbort:
    """The syndrome of a data abort.

    Parameters
    ----------
    valid : the fields below describe the access (ISV); without it only what follows `fault`
    size : bytes of the access
    register : number of the general register, 31 being the zero register
    sign_extended, sixty_four : how a read fills that register (SSE, SF)
    write : the access is a write, or a cache operation
    table_walk : the fault is of a stage-1 table walk (S1PTW)
    fault : in words
    """

    valid: bool
    size: int
    register: int
    sign_extended: bool
    sixty_four: bool
    write: bool
    table_walk: bool
    fault: str


def decode_data_abort(esr: int) -> DataAbort:
    """Decode ESR_EL2 of a data abort, as kvm_guest_fault traces it (hsr)."""
    status = esr & 0x3F
    name = _FAULTS.get(status & 0x3C, f"UNKNOWN({status:#x})")
    fault = f"{name}, level {status & 3}" if status & 0x3C in _FAULTS else name
    return DataAbort(
        valid=bool(esr >> 24 & 1),
        size=1 << (esr >> 22 & 3),
        register=esr >> 16 & 31,
        sign_extended=bool(esr >> 21 & 1),
        sixty_four=bool(esr >> 15 & 1),
        write=bool(esr >> 6 & 1),
        table_walk=bool(esr >> 7 & 1),
        fault=fault,
    )


def describe_guest_fault(esr: int) -> str:
    """Say what a stage-2 fault was: "write of a word from x3, translation fault, level 3"."""
    abort = decode_data_abort(esr)
    if not abort.valid:
        return ("table walk, " if abort.table_walk else "") + abort.fault
    register = "xzr" if abort.register == 31 else f"{'x' if abort.sixty_four else 'w'}{abort.register}"
    size = _SIZES[abort.size.bit_length() - 1]
    access = f"write of a {size} from" if abort.write else f"read of a {size} to"
    return f"{access} {register}, {abort.fault}"


def classify_guest_fault(esr: int) -> str:
    """Say whether the page was mapped: a translation fault is of one that was not."""
    return {0x4: "unmapped", 0xC: "refused"}.get(esr & 0x3C, "")


def never_told(code: Any) -> Any:
    """Say whether an exit code has a class although it is no trap, which the trace's own words rule out."""
    return (code & ~0x3F != TRAP_CODES) & (code & 0x3F != 0)


def syndrome_code(esr: Any) -> Any:
    """Return the code of the VM-exit that goes with a syndrome (ints or columns)."""
    return (esr >> CLASS_SHIFT & 0x3F) | TRAP_CODES


def decode_abort(esr: Any) -> AbortAccess:
    """Decode what MMIO is checked by (ints or columns); see decode_data_abort."""
    return AbortAccess(
        valid=esr >> 24 & 1,
        size=2 ** (esr >> 22 & 3),
        register=esr >> 16 & 31,
        write=esr >> 6 & 1,
        table_walk=esr >> 7 & 1,
        access_flag=(esr & 0x3C) == 0x8,
        described=esr & DESCRIBES,
    )


def decode_trap(esr: Any) -> RegisterAccess:
    """Decode a trapped system register (ints or columns); see decode_system_register."""
    return RegisterAccess(
        op0=esr >> 20 & 3,
        op1=esr >> 14 & 7,
        crn=esr >> 10 & 15,
        crm=esr >> 1 & 15,
        op2=esr >> 17 & 7,
        write=esr & 1 ^ 1,
    )


def describe_register(number: int) -> str:
    """Name a system register by its number, as sys_reg() of arch/arm64/include/asm/sysreg.h makes it."""
    return SystemRegister(number >> 19 & 3, number >> 16 & 7, number >> 12 & 15, number >> 8 & 15, number >> 5 & 7).name


def describe_syndrome(esr: int) -> str:
    """Say what a syndrome is that KVM traces: of an abort, or of a trapped system register."""
    if esr >> CLASS_SHIFT & 0x3F != SYS_CLASS:
        return describe_guest_fault(esr)
    told = decode_system_register(esr)
    register = "xzr" if told.register == 31 else f"x{told.register}"
    return f"write of {told.name} from {register}" if told.write else f"read of {told.name} to {register}"


def is_vector(pc: Any) -> Any:
    """Say whether a guest may be at an address because KVM gave it a synchronous exception (ints or columns).

    Source: enter_exception64, enter_exception32 (hyp/exception.c)
    """
    found = pc % VECTOR_ALIGNMENT == 0
    for offset in _VECTORS_32:
        found = found | (pc % 0x20 == offset)
    return found


@dataclass(frozen=True)
class SystemRegister:
    """A trapped MSR, MRS or system instruction."""

    op0: int
    op1: int
    crn: int
    crm: int
    op2: int
    register: int = 31
    write: bool = False

    @property
    def name(self) -> str:
        """The register's name; of one that is not known the generic one that assemblers take: S3_0_C1_C0_1."""
        from kvmtrace.isa.arm64_registers import SYSTEM_REGISTERS

        named = SYSTEM_REGISTERS.get((self.op0, self.op1, self.crn, self.crm, self.op2))
        return named or f"S{self.op0}_{self.op1}_C{self.crn}_C{self.crm}_{self.op2}"


def decode_system_register(esr: int) -> SystemRegister:
    """Decode ESR_EL2 of a trapped system register, as kvm_handle_sys_reg traces it (hsr)."""
    return SystemRegister(
        op0=esr >> 20 & 3,
        op1=esr >> 14 & 7,
        crn=esr >> 10 & 15,
        crm=esr >> 1 & 15,
        op2=esr >> 17 & 7,
        register=esr >> 5 & 31,
        write=not esr & 1,
    )


# what a syndrome always tells of an abort: the class, validity, direction, and whether it is a translation fault
CLASS_MASK = 0x3F << CLASS_SHIFT
ABORT_MASK = CLASS_MASK | 1 << 24 | 1 << 6 | 0x3C
IABT_CLASS, DABT_CLASS, SYS_CLASS = 0x20, 0x24, 0x18


def encode_abort(abort: DataAbort) -> tuple[int, int]:
    """Return the syndrome of a translation fault, and which bits of it are known: not the table's level."""
    esr = DABT_CLASS << CLASS_SHIFT | abort.write << 6 | 0x4
    if not abort.valid:
        return esr, ABORT_MASK
    esr |= 1 << 24 | (abort.size.bit_length() - 1) << 22 | abort.sign_extended << 21 | abort.register << 16
    return esr | abort.sixty_four << 15, ABORT_MASK | 0x1FF << 15


def encode_system_register(name: str, register: int, *, write: bool) -> int:
    """Return the syndrome of a trapped access to a system register, 32-bit instructions being the only ones."""
    from kvmtrace.isa.arm64_registers import ENCODINGS

    op0, op1, crn, crm, op2 = ENCODINGS[name.upper()]
    esr = SYS_CLASS << CLASS_SHIFT | 1 << 25 | op0 << 20 | op2 << 17 | op1 << 14
    return esr | crn << 10 | register << 5 | crm << 1 | (not write)
