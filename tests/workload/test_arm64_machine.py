"""arm64's guests and VMM, as far as a machine without KVM/arm64 can tell; the lab runs them (tests/lab)."""

from __future__ import annotations

import ctypes
import itertools
import struct
from typing import TYPE_CHECKING

import pytest
from capstone import CS_ARCH_ARM64, CS_MODE_ARM, Cs

from kvmtrace.errors import UsageError
from kvmtrace.workload import abi, arm64_vmm
from kvmtrace.workload.arm64_guests import ARM64_GUESTS
from kvmtrace.workload.arm64_vmm import Arm64Vcpu, Arm64Vm
from kvmtrace.workload.devices import EXIT_ADDRESS, Devices
from kvmtrace.workload.guests import GUESTS, RAM_BYTES
from kvmtrace.workload.machines import find_guest, machine_of

if TYPE_CHECKING:
    from kvmtrace.workload.listing import Line

LINES = [
    pytest.param(line, id=f"{guest.name}-{line.address:04x}")
    for guest in ARM64_GUESTS.values()
    for line in guest.listing.lines
]
ENDS = {"strb wzr, [x20]", "hvc #0", "eret", "ret"}  # nothing has to follow


@pytest.mark.parametrize("line", LINES)
def test_bytes_are_the_instruction_named(line: Line) -> None:
    made = next(Cs(CS_ARCH_ARM64, CS_MODE_ARM).disasm(line.code, line.address))
    assert f"{made.mnemonic} {made.op_str}".strip() == line.text
    assert made.size == len(line.code) == 4


@pytest.mark.parametrize("guest", ARM64_GUESTS.values(), ids=lambda guest: guest.name)
def test_listing_fits_the_machine(guest) -> None:
    lines = guest.listing.lines
    starts = {line.address for line in lines}
    assert all(line.address + 4 in starts or line.text in ENDS for line in lines)
    assert all(line.address % 4 == 0 and line.address + 4 <= RAM_BYTES for line in lines)
    given = {argument.name: argument.default for argument in guest.arguments}
    registers = guest.registers(given)
    assert registers["pc"] == guest.listing.labels["start"] == 0x1000
    assert registers.keys() <= arm64_vmm.CORE_OFFSETS.keys()


@pytest.mark.parametrize("guest", ARM64_GUESTS.values(), ids=lambda guest: guest.name)
def test_known_counts_are_linear(guest) -> None:
    given = {argument.name: argument.default for argument in guest.arguments}
    one, two, three = (guest.known({**given, "count": n}) for n in (1, 2, 3))
    for table in ("tracepoints", "userspace_exits", "arm64", "gpas"):
        first, second, third = (getattr(known, table) for known in (one, two, three))
        assert first.keys() == second.keys()
        assert all(third[key] - second[key] == second[key] - first[key] for key in first)
    assert not one.vmx
    assert not one.svm


def test_lifecycle_is_what_its_listing_counts() -> None:
    """The loop counters in the listing are the counts stated."""
    lines = ARM64_GUESTS["lifecycle"].listing.lines
    counters = [int(line.text.rpartition("#")[2], 0) for line in lines if line.text.startswith("mov w21, #")]
    known = ARM64_GUESTS["lifecycle"].known({"count": 1})
    stated = [known.gpas["0x9000:W"], known.gpas["0x9000:R"], known.arm64["HVC64"]]
    assert counters[:3] == stated
    assert sum(counters[3:]) == known.arm64["SYS64"]


def test_each_machine_has_its_guests() -> None:
    assert machine_of("arm64").guests is ARM64_GUESTS
    assert machine_of("svm").guests is machine_of("vmx").guests is machine_of(None).guests is GUESTS
    assert find_guest("smc", "arm64").name == "smc"
    assert find_guest("lifecycle", "arm64") is not find_guest("lifecycle", "svm")
    with pytest.raises(UsageError, match="there is no guest msr-gp; there are lifecycle"):
        find_guest("msr-gp", "arm64")
    assert machine_of("arm64").vmm() == (Arm64Vm, Arm64Vcpu)


def test_a_store_to_the_exit_address_ends() -> None:
    devices = Devices()
    devices.write_mmio(0x9000, b"\x01")
    assert not devices.ended
    devices.write_mmio(EXIT_ADDRESS, b"\x00")
    assert devices.ended
    assert devices.status == 0


class Kernel:
    """Stands for KVM: notes every call, hands out a GIC, and holds the program counter."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, str]] = []
        self.values: list[tuple[int, int]] = []
        self.pc = 0x1040

    def __call__(self, fd: int, request: int, argument: int | bytes | bytearray, name: str) -> int:
        self.calls.append((fd, name))
        if request == arm64_vmm.KVM_CREATE_DEVICE:
            struct.pack_into("<I", argument, 4, 77)
        elif request == arm64_vmm.KVM_SET_DEVICE_ATTR:
            _, group, attribute, address = arm64_vmm.DEVICE_ATTR.unpack(argument)
            self.values.append((group << 8 | attribute, ctypes.c_uint64.from_address(address).value))
        elif request in {arm64_vmm.KVM_GET_ONE_REG, arm64_vmm.KVM_SET_ONE_REG}:
            register, address = arm64_vmm.ONE_REG.unpack(argument)
            held = ctypes.c_uint64.from_address(address)
            if request == arm64_vmm.KVM_GET_ONE_REG:
                held.value = self.pc
            elif register == arm64_vmm.CORE_REGISTER + arm64_vmm.CORE_OFFSETS["pc"]:
                self.pc = held.value
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(arm64_vmm, "ioctl", made)
    return made


def test_the_gic_is_placed_before_and_started_behind_the_vcpus(kernel: Kernel) -> None:
    vm = Arm64Vm.__new__(Arm64Vm)
    vm.fd = 5
    vm._prepare()
    vm._create_irqchip()
    vm.finish()
    assert [fd for fd, _ in kernel.calls] == [5, 5, 77, 77, 77]
    assert kernel.values == [(2, 0x10000), (3, 0x20000), (0x400, 0)]


def test_without_a_gic_nothing_is_left_to_do(kernel: Kernel) -> None:
    vm = Arm64Vm.__new__(Arm64Vm)
    vm.fd = 5
    vm._prepare()
    vm.finish()
    assert len(kernel.calls) == 1


def vcpu_with(reason: int, union: bytes) -> Arm64Vcpu:
    vcpu = Arm64Vcpu.__new__(Arm64Vcpu)
    vcpu.fd, vcpu.vcpu_id, vcpu.slow_ns, vcpu.devices = 6, 0, {}, Devices()
    run = bytearray(4096)
    struct.pack_into("<I", run, abi.RUN_EXIT_REASON_OFFSET, reason)
    run[abi.RUN_UNION_OFFSET : abi.RUN_UNION_OFFSET + len(union)] = union
    vcpu.run = memoryview(run)
    return vcpu


@pytest.mark.parametrize(
    ("reason", "union", "ended"),
    [
        (abi.EXIT_SYSTEM_EVENT, struct.pack("<II", 1, 0), "shutdown"),
        (abi.EXIT_SYSTEM_EVENT, struct.pack("<II", 2, 0), "system-event 2"),
        (abi.EXIT_MMIO, struct.pack("<Q8sIB", 0xF000, bytes(8), 1, 1), "exit-port"),
        (abi.EXIT_MMIO, struct.pack("<Q8sIB", 0x9000, bytes(8), 4, 1), ""),
        (abi.EXIT_FAIL_ENTRY, struct.pack("<QI", 7, 0), "fail-entry 0x7"),
    ],
)
def test_userspace_exits(kernel: Kernel, reason: int, union: bytes, ended: str) -> None:
    assert vcpu_with(reason, union).serve(reason) == ended


def test_a_read_gets_the_next_bytes(kernel: Kernel) -> None:
    vcpu = vcpu_with(abi.EXIT_MMIO, struct.pack("<Q8sIB", 0x9000, bytes(8), 4, 0))
    assert vcpu.serve(abi.EXIT_MMIO) == ""
    at = abi.RUN_MMIO_DATA_OFFSET
    assert bytes(vcpu.run[at : at + 5]) == b"\x01\x02\x03\x04\x00"


def test_what_no_syndrome_describes_is_stepped_over(kernel: Kernel) -> None:
    assert vcpu_with(abi.EXIT_ARM_NISV, b"").serve(abi.EXIT_ARM_NISV) == ""
    assert kernel.pc == 0x1044


def test_registers_have_the_numbers_of_the_kernels_structure() -> None:
    """struct user_pt_regs: 31 general registers, sp, pc, each counted in 32-bit words."""
    offsets = [arm64_vmm.CORE_OFFSETS[name] for name in (*(f"x{n}" for n in range(31)), "sp", "pc")]
    assert offsets == list(itertools.islice(itertools.count(0, 2), 33))
    assert arm64_vmm.CORE_REGISTER + offsets[-1] == 0x6030000000100040
