"""The ioctl table against the encoding rule of ioctl(2) and figures from real traces."""

from __future__ import annotations

import pytest

from kvmtrace.kvm import ioctls
from kvmtrace.kvm.ioctls import IOCTL_NUMBERS, IOCTLS, describe_ioctl, is_kvm_ioctl


def test_count_and_uniqueness() -> None:
    assert len(IOCTLS) == len(IOCTL_NUMBERS) == 118


@pytest.mark.parametrize(
    ("number", "name", "level", "direction", "size"),
    [
        (0xAE00, "KVM_GET_API_VERSION", "system", "none", 0),
        (0xAE01, "KVM_CREATE_VM", "system", "none", 0),
        (0xAE41, "KVM_CREATE_VCPU", "vm", "none", 0),
        (0x4020AE46, "KVM_SET_USER_MEMORY_REGION", "vm", "to_kernel", 32),
        (0x4040AE77, "KVM_CREATE_PIT2", "vm", "to_kernel", 64),
        (0xAE80, "KVM_RUN", "vcpu", "none", 0),
        (0x8138AE83, "KVM_GET_SREGS", "vcpu", "from_kernel", 312),
        (0x4090AE82, "KVM_SET_REGS", "vcpu", "to_kernel", 144),
        (0xC008AE67, "KVM_IRQ_LINE_STATUS", "vm", "both", 8),
        (0x4004AE99, "KVM_SET_MP_STATE", "vcpu", "to_kernel", 4),
        (0x4018AEE1, "KVM_SET_DEVICE_ATTR", "device", "to_kernel", 24),
    ],
)
def test_spot_values(number: int, name: str, level: str, direction: str, size: int) -> None:
    row = IOCTLS[number]
    assert (row.name, row.level, row.direction, row.size_bytes) == (name, level, direction, size)
    assert describe_ioctl(number) == name


def test_constants_agree_with_the_table() -> None:
    constants = {name: value for name, value in vars(ioctls).items() if name.startswith("KVM_")}
    assert len(constants) > 30
    assert all(IOCTL_NUMBERS[name] == value for name, value in constants.items())


def test_every_row_is_a_kvm_ioctl_with_known_levels() -> None:
    for row in IOCTLS.values():
        assert is_kvm_ioctl(row.number)
        assert row.levels
        assert set(row.levels) <= {"system", "vm", "vcpu", "device"}
        assert (row.direction == "none") == (row.size_bytes == 0)


def test_unknown_and_sign_extended_commands() -> None:
    assert describe_ioctl(0xAE7F) == "UNKNOWN(0xae7f)"
    assert not is_kvm_ioctl(0x5401)
    assert describe_ioctl(0xFFFFFFFF8090AE81) == "KVM_GET_REGS"
