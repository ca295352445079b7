"""Exit qualifications, EXITINFO and interruption information, against values of real traces and the manuals' tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvmtrace.isa.svm import SVM
from kvmtrace.isa.svm_words import (
    decode_svm_cr,
    decode_svm_dr,
    decode_svm_io,
    decode_svm_msr_write,
    encode_svm_fault,
    encode_svm_io,
)
from kvmtrace.isa.vmx import VMX
from kvmtrace.isa.vmx_words import (
    decode_apic_access,
    decode_vmx_cr,
    decode_vmx_dr,
    decode_vmx_io,
    decode_vmx_msr_write,
    describe_ept_violation,
    encode_vmx_fault,
    encode_vmx_io,
)
from kvmtrace.isa.words import (
    CR_ACCESS_KINDS,
    CrAccess,
    DrAccess,
    IoAccess,
    decode_intr_info,
    describe_bits,
    describe_intr_info,
    describe_io,
    describe_page_fault_error,
)

if TYPE_CHECKING:
    from kvmtrace.isa.base import Isa

VMX_IO = [
    (0x03F80000, IoAccess(0x3F8, 1, write=True, string=False, rep=False)),
    (0x03FD0008, IoAccess(0x3FD, 1, write=False, string=False, rep=False)),
    (0x0CFC0003, IoAccess(0xCFC, 4, write=True, string=False, rep=False)),
    (0x01F00039, IoAccess(0x1F0, 2, write=False, string=True, rep=True)),
]
SVM_IO = [
    (0x03F80210, IoAccess(0x3F8, 1, write=True, string=False, rep=False)),
    (0x03FD0211, IoAccess(0x3FD, 1, write=False, string=False, rep=False)),
    (0x0CFC0040, IoAccess(0xCFC, 4, write=True, string=False, rep=False)),
    (0x01F0002D, IoAccess(0x1F0, 2, write=False, string=True, rep=True)),
]


@pytest.mark.parametrize(("qualification", "access"), VMX_IO)
def test_vmx_io(qualification: int, access: IoAccess) -> None:
    assert decode_vmx_io(30, qualification) == access
    assert decode_vmx_io(30, qualification | 0x40) == access  # the operand may be encoded as an immediate
    value, known = encode_vmx_io(access)
    assert value == qualification & known


@pytest.mark.parametrize(("exitinfo1", "access"), SVM_IO)
def test_svm_io(exitinfo1: int, access: IoAccess) -> None:
    assert decode_svm_io(0x7B, exitinfo1) == access
    value, known = encode_svm_io(access)
    assert value == exitinfo1 & known


@pytest.mark.parametrize(("decode", "rows"), [(decode_vmx_io, VMX_IO), (decode_svm_io, SVM_IO)])
def test_columns_are_decoded_as_numbers_are(decode: object, rows: list[tuple[int, IoAccess]]) -> None:
    assert callable(decode)
    column = decode(np.zeros(len(rows), np.int64), np.array([word for word, _ in rows], np.uint64))
    for name in ("port", "size", "write", "string", "rep"):
        assert getattr(column, name).tolist() == [getattr(access, name) for _, access in rows]


def test_io_in_words() -> None:
    assert describe_io(decode_vmx_io(30, 0x01F00039)) == "REP INS 0x1f0 size 2"
    assert describe_io(decode_svm_io(0x7B, 0x03F80210)) == "OUT 0x3f8 size 1"


def test_control_registers_vmx() -> None:
    kind = {name: number for number, name in enumerate(CR_ACCESS_KINDS)}
    assert decode_vmx_cr(28, 0x300) == CrAccess(0, kind["write"], 3)
    assert decode_vmx_cr(28, 0x014) == CrAccess(4, kind["read"], 0)
    assert decode_vmx_cr(28, 0x00020) == CrAccess(0, kind["clts"], 0)
    lmsw = decode_vmx_cr(28, 0x00090030)
    assert lmsw == CrAccess(0, kind["lmsw"], 0, lmsw_source=9)
    assert (lmsw.register, lmsw.write) == (0, True)
    many = decode_vmx_cr(28, np.array([0x303, 0x014, 0x23], np.uint64))
    assert many.register.tolist() == [3, 4, 0]
    assert many.write.tolist() == [True, False, True]


def test_control_registers_svm() -> None:
    def read(code: int) -> tuple[int, bool]:
        access = decode_svm_cr(code, 0)
        return access.register, access.write

    assert (read(0x14), read(0x03), read(0x65)) == ((4, True), (3, False), (0, True))
    many = decode_svm_cr(np.array([0x14, 0x03, 0x65]), np.zeros(3, np.uint64))
    assert many.register.tolist() == [4, 3, 0]
    assert many.write.tolist() == [True, False, True]


def test_debug_registers() -> None:
    assert decode_vmx_dr(29, 0x017) == DrAccess(7, write=False, gpr=0)
    assert decode_vmx_dr(29, 0x107) == DrAccess(7, write=True, gpr=1)
    assert decode_svm_dr(0x037, 0) == DrAccess(7, write=True, gpr=0)
    assert decode_svm_dr(0x026, 0) == DrAccess(6, write=False, gpr=0)


def test_msr_direction() -> None:
    assert [bool(decode_vmx_msr_write(code, 0)) for code in (31, 32, 84, 85)] == [False, True, False, True]
    assert [bool(decode_svm_msr_write(0x7C, info)) for info in (0, 1)] == [False, True]


def test_faults_in_words() -> None:
    assert describe_ept_violation(0x182) == "write|gva-valid|translated-gva"
    assert describe_page_fault_error(0x100000006) == "write|user|guest-final"
    assert describe_page_fault_error(0xD) == "present|user|reserved"
    assert describe_page_fault_error(0) == "none"
    assert describe_bits(1 << 50 | 1, {0: "present"}) == f"present|{1 << 50:#x}"
    assert VMX.describe_fault is not None
    assert VMX.describe_fault(2) == "write"


def test_faults_of_predictions() -> None:
    assert [encode_vmx_fault(access) for access in ("read", "write", "fetch", "modify")] == [
        (1, 7), (2, 7), (4, 7), (0, 4),
    ]  # fmt: skip
    final = 1 << 32
    assert [encode_svm_fault(access) for access in ("read", "write", "fetch", "modify")] == [
        (4 | final, 0x16 | final), (6 | final, 0x16 | final), (0x14 | final, 0x16 | final), (4 | final, 0x14 | final),
    ]  # fmt: skip


def test_apic_access() -> None:
    assert decode_apic_access(0x10B0) == (0xB0, "linear write")
    assert decode_apic_access(0x0030) == (0x30, "linear read")
    assert decode_apic_access(0x7030) == (0x30, "UNKNOWN(0x7)")


@pytest.mark.parametrize(
    ("isa", "value", "words"),
    [
        (VMX, 0x80000B0E, "#PF hardware exception, error code"),
        (VMX, 0x80000031, "vector 0x31 external interrupt"),
        (VMX, 0x80000202, "NMI"),
        (VMX, 0x80000480, "vector 0x80 software interrupt"),
        (VMX, 0x80000501, "#DB privileged software exception"),
        (VMX, 0x80000603, "#BP software exception"),
        (SVM, 0x80000306, "#UD exception"),
        (SVM, 0x80000501, "#DB UNKNOWN(0x5)"),
        (VMX, 0x00000B0E, "none"),
        (SVM, 0, "none"),
    ],
)
def test_describe_intr_info(isa: Isa, value: int, words: str) -> None:
    assert describe_intr_info(isa.event_types, value) == words


def test_decode_intr_info() -> None:
    info = decode_intr_info(0x80000B0D)
    assert (info.valid, info.vector, info.type, info.has_error_code) == (True, 13, 3, True)
    # SVM: the error code stands in the upper half of EVENTINJ and does not disturb
    assert decode_intr_info(0xDEAD_8000_0030).vector == 0x30
