"""GuestRun as JSON, arguments, and the pieces of the VMM that need no /dev/kvm."""

from __future__ import annotations

import json
import struct

import pytest

from kvmtrace.errors import CapabilityError, UsageError
from kvmtrace.workload import GUESTS, GuestRun, KnownCounts, abi, run_guest, vmm
from kvmtrace.workload import __main__ as command
from kvmtrace.workload import guest_run as runner
from kvmtrace.workload.devices import EXIT_PORT, Devices

RUN = GuestRun(
    guest="smp",
    arguments={"count": 2},
    isa="svm",
    pid=7,
    vcpu_tids={0: 8, 1: 9},
    ended="exit-port",
    status=0,
    duration_ns=5,
    known=KnownCounts(tracepoints={"kvm_pio": 2}),
    observed={"KVM_EXIT_IO": 2},
    slowed={"io": 10},
)


def test_json_round_trip() -> None:
    assert GuestRun.from_dict(json.loads(RUN.to_json())) == RUN
    assert GuestRun.from_dict({**RUN.to_dict(), "later": 1}) == RUN


@pytest.mark.parametrize(
    ("ended", "status", "good"),
    [("exit-port", 0, True), ("exit-port", 1, False), ("shutdown", None, True), ("timeout", None, False)],
)
def test_succeeded(ended: str, status: int | None, good: bool) -> None:
    values = {**RUN.to_dict(), "ended": ended, "status": status}
    assert GuestRun.from_dict(values).succeeded is good


def test_arguments_are_completed() -> None:
    assert runner.complete_arguments(GUESTS["interrupt"], {"count": 5}) == {"count": 5, "period": 2_000_000}


@pytest.mark.parametrize(
    ("given", "words"),
    [({"count": 0}, "must be 1\\.\\.65535, not 0"), ({"count": 65536}, "not 65536"), ({"size": 1}, "no argument size")],
)
def test_arguments_are_checked(given: dict[str, int], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        runner.complete_arguments(GUESTS["lifecycle"], given)


@pytest.mark.parametrize("guest", GUESTS.values(), ids=lambda guest: guest.name)
def test_known_counts_scale_with_the_count(guest) -> None:
    """Every count is a + b * count; and the parts by key never exceed their total."""
    arguments = {argument.name: argument.default for argument in guest.arguments}
    one, two, three = (guest.known({**arguments, "count": n}) for n in (1, 2, 3))
    for table in ("tracepoints", "userspace_exits", "vmx", "svm", "ports", "gpas", "msrs"):
        first, second, third = (getattr(known, table) for known in (one, two, three))
        assert first.keys() == second.keys()
        assert all(third[key] - second[key] == second[key] - first[key] for key in first)
    if one.ports:
        assert sum(one.ports.values()) <= one.tracepoints["kvm_pio"]
    if one.msrs:
        assert sum(one.msrs.values()) == one.tracepoints["kvm_msr"]


def test_lifecycle_counts_are_distinct_primes() -> None:
    known = GUESTS["lifecycle"].known({"count": 1})
    reasons = ("CPUID", "MSR_READ", "MSR_WRITE", "HLT", "IO_INSTRUCTION")
    counts = [
        known.ports["0x3f8:POUT"],
        known.ports["0x3fd:PIN"],
        known.gpas["0x9000:W"],
        known.gpas["0x9000:R"],
        *(known.vmx[reason] for reason in reasons),
    ]
    assert len(set(counts)) == len(counts)
    assert all(n > 1 and all(n % k for k in range(2, n)) for n in counts)


def test_refused_isa_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    guest = GUESTS["lifecycle"]
    monkeypatch.setattr(runner, "guess_isa", lambda: "vax")
    monkeypatch.setitem(guest.refused, "vax", "it is too old")
    with pytest.raises(CapabilityError, match=r"cannot run on vax: it is too old; use `kvmtrace lab run`"):
        run_guest("lifecycle")


def test_unknown_guest_names_all() -> None:
    with pytest.raises(UsageError, match="lifecycle, storm"):
        run_guest("nothing")


def test_no_kvm_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(vmm, "KVM_DEVICE", "/dev/no-such-kvm")
    assert command.main(["lifecycle"]) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "there is no /dev/no-such-kvm; load kvm_intel" in error


@pytest.mark.parametrize(
    "argv",
    [
        ["nothing"],
        ["storm", "--count", "0"],
        ["storm", "--arg", "x"],
        ["storm", "--slow-reason", "io"],
        ["storm", "--slow-reason", "msr:5"],
    ],
)
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_devices_answer_one_stream() -> None:
    devices = Devices()
    assert devices.read(3) + devices.read(2) == bytes([1, 2, 3, 4, 5])
    devices.read(250)
    assert devices.read(2) == bytes([0, 1])
    devices.write_port(0x3F8, b"\x01")
    assert not devices.ended
    devices.write_port(EXIT_PORT, b"\x03\x00")
    assert devices.ended
    assert devices.status == 3


def test_kvm_run_layout() -> None:
    run = bytearray(4096)
    struct.pack_into("<BBHIQ", run, 32, 1, 2, 0x3F8, 7, 4096)
    assert abi.decode_io(memoryview(run)) == abi.IoExit(True, 2, 0x3F8, 7, 4096)
    struct.pack_into("<Q8sIB", run, 32, 0x9000, b"abcdefgh", 4, 1)
    assert abi.decode_mmio(memoryview(run)) == abi.MmioExit(True, 0x9000, b"abcd")


def test_structure_sizes_are_those_of_the_ioctls() -> None:
    """The size is bits 16..29 of an ioctl number."""
    assert abi.REGS.size == abi.KVM_SET_REGS >> 16 & 0x3FFF
    assert abi.SREGS_BYTES == abi.KVM_SET_SREGS >> 16 & 0x3FFF
    assert abi.MEMORY_REGION.size == abi.KVM_SET_USER_MEMORY_REGION >> 16 & 0x3FFF
    assert abi.CPUID_HEADER.size == abi.KVM_SET_CPUID2 >> 16 & 0x3FFF
    assert (abi.SEGMENT.size, abi.CPUID_ENTRY.size) == (24, 40)


def test_flat_real_mode() -> None:
    sregs = bytearray(abi.SREGS_BYTES)
    abi.SEGMENT.pack_into(sregs, 0, 0xFFFF0000, 0xFFFF, 0xF000, *range(10))  # cs after reset
    made = abi.real_mode_sregs(sregs)
    assert abi.SEGMENT.unpack_from(made)[:3] == (0, 0xFFFF, 0)
    assert abi.SEGMENT.unpack_from(made)[3:] == tuple(range(10))
    assert abi.SREGS_CR4.unpack_from(made, 8 * 24 + 2 * 16 + 3 * 8) == (abi.CR4_OSFXSR,)


def test_x2apic_is_offered() -> None:
    cpuid = bytearray(8 + 2 * 40)
    struct.pack_into("<II", cpuid, 0, 2, 0)
    struct.pack_into("<I", cpuid, 8, 0)
    struct.pack_into("<I", cpuid, 48, 1)
    abi.add_x2apic(cpuid)
    assert struct.unpack_from("<I", cpuid, 8 + 20) == (0,)
    assert struct.unpack_from("<I", cpuid, 48 + 20) == (1 << 21,)
