"""KVM_EXIT_* names and error numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmtrace.kvm import userspace_exits
from kvmtrace.kvm.userspace_exits import (
    USERSPACE_EXIT_REASONS,
    describe_errno,
    describe_userspace_exit,
    describe_userspace_exit_reason,
)

FORMAT = Path("/sys/kernel/tracing/events/kvm/kvm_userspace_exit/format")


def test_table_is_dense_unique_and_complete() -> None:
    assert list(USERSPACE_EXIT_REASONS) == list(range(41))
    assert len(set(USERSPACE_EXIT_REASONS.values())) == 41
    assert all(name.startswith("KVM_EXIT_") for name in USERSPACE_EXIT_REASONS.values())


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        (2, "KVM_EXIT_IO"),
        (5, "KVM_EXIT_HLT"),
        (6, "KVM_EXIT_MMIO"),
        (8, "KVM_EXIT_SHUTDOWN"),
        (10, "KVM_EXIT_INTR"),
        (17, "KVM_EXIT_INTERNAL_ERROR"),
        (30, "KVM_EXIT_X86_WRMSR"),
        (33, "KVM_EXIT_X86_BUS_LOCK"),
        (39, "KVM_EXIT_MEMORY_FAULT"),
        (40, "KVM_EXIT_TDX"),
        (99, "UNKNOWN(0x63)"),
    ],
)
def test_spot_values(reason: int, name: str) -> None:
    assert describe_userspace_exit_reason(reason) == name


def test_constants_agree_with_the_table() -> None:
    constants = {
        name: value
        for name, value in vars(userspace_exits).items()
        if name.startswith("KVM_EXIT_") and isinstance(value, int)
    }
    assert len(constants) > 20
    assert all(USERSPACE_EXIT_REASONS[value] == name for name, value in constants.items())


def test_error_paths_leave_a_stale_reason_that_is_not_shown() -> None:
    assert describe_userspace_exit(2, 0) == "KVM_EXIT_IO"
    assert describe_userspace_exit(2, -4) == "-EINTR"
    assert describe_userspace_exit(2, -14) == "-EFAULT"
    assert describe_errno(-11) == describe_errno(11) == "EAGAIN"
    assert describe_errno(0) == ""
    assert describe_errno(9999) == "UNKNOWN(0x270f)"


@pytest.mark.skipif(not FORMAT.exists(), reason="KVM tracepoints are not visible here")
def test_agrees_with_this_kernels_format_text() -> None:
    rows = re.findall(r'\{ (\d+), "(KVM_EXIT_)" "(\w+)" \}', FORMAT.read_text())
    assert len(rows) >= 29
    assert all(USERSPACE_EXIT_REASONS[int(n)] == prefix + name for n, prefix, name in rows)
