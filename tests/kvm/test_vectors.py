"""Vectors and interruption information."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmtrace.isa.exit_reasons import ISA_SVM, ISA_VMX
from kvmtrace.kvm.vectors import (
    EXCEPTION_MEANINGS,
    EXCEPTION_NAMES,
    EXCEPTIONS_WITH_ERROR_CODE,
    decode_intr_info,
    describe_exception,
    describe_intr_info,
    describe_vector,
)

FORMAT = Path("/sys/kernel/tracing/events/kvm/kvm_inj_exception/format")


def test_tables_agree_with_each_other() -> None:
    assert set(EXCEPTION_NAMES) == set(EXCEPTION_MEANINGS)
    assert set(EXCEPTION_NAMES) >= EXCEPTIONS_WITH_ERROR_CODE
    assert len(set(EXCEPTION_NAMES.values())) == len(EXCEPTION_NAMES)


@pytest.mark.parametrize(
    ("isa", "value", "words"),
    [
        (ISA_VMX, 0x80000B0E, "#PF hardware exception, error code"),
        (ISA_VMX, 0x80000031, "vector 0x31 external interrupt"),
        (ISA_VMX, 0x80000202, "NMI"),
        (ISA_VMX, 0x80000480, "vector 0x80 software interrupt"),
        (ISA_VMX, 0x80000501, "#DB privileged software exception"),
        (ISA_VMX, 0x80000603, "#BP software exception"),
        (ISA_SVM, 0x80000306, "#UD exception"),
        (ISA_SVM, 0x80000501, "#DB UNKNOWN(0x5)"),
        (ISA_VMX, 0x00000B0E, "none"),
        (ISA_SVM, 0, "none"),
    ],
)
def test_describe_intr_info(isa: int, value: int, words: str) -> None:
    assert describe_intr_info(isa, value) == words


def test_decode_intr_info() -> None:
    info = decode_intr_info(0x80000B0D)
    assert (info.valid, info.vector, info.type, info.has_error_code) == (True, 13, 3, True)
    # SVM: the error code stands in the upper half of EVENTINJ and does not disturb
    assert decode_intr_info(0xDEAD_8000_0030).vector == 0x30


def test_describe_vector() -> None:
    assert describe_vector(13) == "#GP"
    assert describe_vector(0xEC) == "IRQ 0xec"
    assert describe_exception(9) == "UNKNOWN(0x9)"


@pytest.mark.skipif(not FORMAT.exists(), reason="KVM's tracepoints are not visible here")
def test_agrees_with_this_kernels_format_text() -> None:
    rows = re.findall(r'\{ (\d+), "#" "(\w+)" \}', FORMAT.read_text())
    assert len(rows) > 15
    assert all(EXCEPTION_NAMES[int(number)] == f"#{name}" for number, name in rows)
