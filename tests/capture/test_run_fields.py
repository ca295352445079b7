"""Fields of the run function's probe that only the kernel's types locate."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmtrace.capture.bpf.event_programs import describe_probe, probe_source
from kvmtrace.capture.run_fields import located, member_offset, probes_here
from kvmtrace.isa.probes import PROBES

if TYPE_CHECKING:
    from pathlib import Path


def at_16(structure: str, name: str) -> int | None:
    return 16 if (structure, name) == ("vcpu_svm", "vmcb") else None


def unknown(_structure: str, _name: str) -> None:
    return None


def test_members_become_offsets() -> None:
    assert located("rflags=+0x570(+{vcpu_svm.vmcb}($arg1)):x64", at_16) == "rflags=+0x570(+16($arg1)):x64"
    assert located("rflags=+{vcpu_vmx.rflags}($arg1):x64", at_16) is None
    assert located("vcpu=$arg1:x64", unknown) == "vcpu=$arg1:x64"


def test_what_is_not_known_is_left_out() -> None:
    assert probes_here(unknown) == PROBES
    here = probes_here(at_16)
    assert here["svm_vcpu_run"][2] == ("vcpu=$arg1:x64", "rflags=+0x570(+16($arg1)):x64")
    assert here["vmx_vcpu_run"] == PROBES["vmx_vcpu_run"]
    assert here["svm_vcpu_run_return"] == PROBES["svm_vcpu_run_return"]


def test_a_program_reads_what_a_probe_event_would() -> None:
    event = describe_probe("svm_vcpu_run", probes_here(at_16)["svm_vcpu_run"])
    assert event.fields == {"vcpu": (8, 8), "rflags": (16, 8)}
    assert "VALUE(1, read_u64(read_u64(REGS_ARG1(ctx) + 16) + 0x570))" in probe_source(event, 9, traced=False)
    assert "VALUE(1, read_u64(read_u64(ARRAY_ARG(ctx, 0) + 16) + 0x570))" in probe_source(event, 9, traced=True)


def btf(types: bytes, names: bytes) -> bytes:
    header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(types), len(types), len(names))
    return header + types + names


def test_a_modules_types_stand_on_the_kernels_names(tmp_path: Path) -> None:
    kernel = b"\0vcpu\0vmcb\0"
    (tmp_path / "vmlinux").write_bytes(btf(b"", kernel))
    other = struct.pack("<III", len(kernel), 4 << 24, 4)  # a structure without members
    pointer = struct.pack("<III", 0, 2 << 24, 1)
    rows = struct.pack("<IIIIII", 1, 1, 0, 6, 2, 6784 * 8)  # vcpu, vmcb: names of the kernel's own
    wanted = struct.pack("<III", len(kernel) + 6, 4 << 24 | 2, 6800) + rows
    (tmp_path / "kvm_amd").write_bytes(btf(other + pointer + wanted, b"other\0vcpu_svm\0"))
    assert member_offset("vcpu_svm", "vmcb", tmp_path) == 6784
    assert member_offset("vcpu_svm", "asid", tmp_path) is None
    assert member_offset("vcpu_vmx", "rflags", tmp_path) is None


def test_without_types_nothing_is_known(tmp_path: Path) -> None:
    assert member_offset("vcpu_svm", "vmcb", tmp_path) is None
    (tmp_path / "vmlinux").write_bytes(btf(b"", b"\0"))
    (tmp_path / "kvm_amd").write_bytes(b"cut")
    assert member_offset("vcpu_svm", "vmcb", tmp_path) is None
