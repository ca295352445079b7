"""Exception vectors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmtrace.kvm.vectors import (
    EXCEPTION_MEANINGS,
    EXCEPTION_NAMES,
    EXCEPTIONS_WITH_ERROR_CODE,
    describe_exception,
    describe_vector,
)

FORMAT = Path("/sys/kernel/tracing/events/kvm/kvm_inj_exception/format")


def test_tables_agree_with_each_other() -> None:
    assert set(EXCEPTION_NAMES) == set(EXCEPTION_MEANINGS)
    assert set(EXCEPTION_NAMES) >= EXCEPTIONS_WITH_ERROR_CODE
    assert len(set(EXCEPTION_NAMES.values())) == len(EXCEPTION_NAMES)


def test_describe_vector() -> None:
    assert describe_vector(13) == "#GP"
    assert describe_vector(0xEC) == "IRQ 0xec"
    assert describe_exception(9) == "UNKNOWN(0x9)"


@pytest.mark.skipif(not FORMAT.exists(), reason="KVM's tracepoints are not visible here")
def test_agrees_with_this_kernels_format_text() -> None:
    rows = re.findall(r'\{ (\d+), "#" "(\w+)" \}', FORMAT.read_text())
    assert len(rows) > 15
    assert all(EXCEPTION_NAMES[int(number)] == f"#{name}" for number, name in rows)
