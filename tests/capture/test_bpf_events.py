"""From the kernel's format texts to C, and compiled without any kernel header."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from kvmtrace.capture.bpf import btf_ids as bpf_btf
from kvmtrace.capture.bpf import compiler as bpf_compile
from kvmtrace.capture.bpf import event_programs as bpf_events
from kvmtrace.capture.bpf import mechanisms
from kvmtrace.capture.bpf.ring import round_ring_size
from kvmtrace.errors import CapabilityError
from kvmtrace.isa.probes import PROBES
from tests.writers.bpf_capture import FORMAT_ENTRY

if TYPE_CHECKING:
    from pathlib import Path

ENTRY = bpf_events.TracedEvent("kvm_entry", "kvm", FORMAT_ENTRY, None, bpf_events.parse_fields(FORMAT_ENTRY))
EXIT = bpf_events.TracedEvent(
    "kvm_exit", "kvm", "", None, {"exit_reason": (8, 4), "guest_rip": (16, 8), "isa": (24, 4), "vcpu_id": (56, 4)}
)


def test_fields_come_from_the_format_text() -> None:
    assert ENTRY.fields == {"vcpu_id": (8, 4), "rip": (16, 8), "immediate_exit": (24, 1)}
    assert (ENTRY.end, ENTRY.data_bytes, ENTRY.tracepoint_id) == (25, 17, 115)


def test_the_copy_covers_every_byte_once_and_never_reads_beyond_the_last_field() -> None:
    line = bpf_events.tracepoint_source(ENTRY, 4)
    assert line == "KVM_ENTRY(kvm_entry, 4, 17, COPY8(8) COPY8(16) COPY1(24))"


def test_probes_describe_themselves_like_tracepoints() -> None:
    event = bpf_events.describe_probe("kvm_vcpu_ioctl", PROBES["kvm_vcpu_ioctl"])
    assert event.fields == {"filp": (8, 8), "cmd": (16, 4), "arg": (24, 8)}
    assert bpf_events.probe_source(event, 9, traced=False) == (
        "FUNCTION(1, kvm_vcpu_ioctl, 9, 24, VALUE(0, REGS_ARG1(ctx)) VALUE(1, REGS_ARG2(ctx)) VALUE(2, REGS_ARG3(ctx)))"
    )
    result = bpf_events.describe_probe("svm_vcpu_run_return", PROBES["svm_vcpu_run_return"])
    assert "ARRAY_ARG(ctx, 1)" in bpf_events.probe_source(result, 9, traced=True)


def test_filters_become_conditions_and_are_stated() -> None:
    filters = {"vcpu": 2, "exit_reason": (48, 0x400), "sample": 7, "slower_than_ns": 50_000}
    defines = bpf_events.filter_defines(filters, [ENTRY, EXIT])
    assert defines["EXIT_REASON(ctx)"] == "(*(volatile u32 *)((ctx) + 8))"
    assert defines["EXIT_ISA(ctx)"] == "(*(volatile u32 *)((ctx) + 24))"
    assert defines["EXIT_VCPU_OFFSET"] == "56"
    assert defines["ENTRY_VCPU_OFFSET"] == "8"
    assert defines["FILTER_REASONS(r)"] == "(((r) & 0xffff) == 48U || ((r) & 0xffff) == 1024U)"
    assert (defines["FILTER_VCPU"], defines["FILTER_SAMPLE"], defines["FILTER_SLOWER_NS"]) == ("2", "7", "50000ULL")
    assert set(bpf_events.describe_filters(filters)) == set(filters)


# of another ISA: the reason is made of two fields, and nothing tells the vCPU
ARM64_ENTRY = bpf_events.TracedEvent("kvm_entry", "kvm", "", None, {"vcpu_pc": (8, 8)})
ARM64_EXIT = bpf_events.TracedEvent("kvm_exit", "kvm", "", None, {"ret": (8, 4), "esr_ec": (12, 4), "vcpu_pc": (16, 8)})


def test_an_exit_reason_in_two_fields() -> None:
    defines = bpf_events.filter_defines({"exit_reason": (0x96,)}, [ARM64_ENTRY, ARM64_EXIT])
    ret, exception_class = ("(*(volatile u32 *)((ctx) + 8))", "(*(volatile u32 *)((ctx) + 12))")
    assert defines["EXIT_REASON(ctx)"] == f"(({ret} & 0x1fU) << 6 | ({exception_class} & 0x3fU) << 0)"
    assert defines["EXIT_ISA(ctx)"] == "128U"
    assert defines["FILTER_REASONS(r)"] == "(((r) & 0xffff) == 150U)"
    with pytest.raises(CapabilityError, match="do not tell the vCPU"):
        bpf_events.filter_defines({"vcpu": 0}, [ARM64_ENTRY, ARM64_EXIT])


def test_registers_are_those_of_the_machine() -> None:
    """Without this the probe on kvm_vcpu_ioctl told arm64's third argument as its second."""
    x86, arm64 = (bpf_events.register_macros(machine) for machine in ("x86_64", "aarch64"))
    assert x86["REGS_ARG2(ctx)"] == "(*(volatile u64 *)(ctx + 104))"
    assert arm64["REGS_ARG2(ctx)"] == "(*(volatile u64 *)(ctx + 8))"
    assert arm64["REGS_RESULT(ctx)"] == arm64["REGS_ARG1(ctx)"]
    with pytest.raises(CapabilityError, match="registers of riscv64"):
        bpf_events.register_macros("riscv64")


def test_an_unknown_kvm_exit_has_no_reason() -> None:
    strange = bpf_events.TracedEvent("kvm_exit", "kvm", "", None, {"vcpu_pc": (8, 8)})
    assert bpf_events.exit_macros(strange) == {}


def test_the_summary_compiles_for_an_exit_reason_in_two_fields() -> None:
    """KVM_RUN's begin is told by no event there: a stay in the VMM ends at the VM-entry."""
    names = ("THREADS", "SLOTS", "FREE", "HERE", "OTHERS", "TIDS")
    offsets = {"USERSPACE_REASON": 8, "USERSPACE_ERRNO": 12, "NEXT_PID": 16, "PREV_STATE": 24, "FPU_LOAD": 8}
    defines = {f"MAP_{name}": str(0x7E570000 + i) for i, name in enumerate(names)}
    defines |= {f"{name}_OFFSET": str(offset) for name, offset in offsets.items()}
    defines |= bpf_events.exit_macros(ARM64_EXIT) | {"KVM_RUN_UNSEEN": "1", "CHECK_TID": "1"}
    source = bpf_events.build_source(defines, ["target.h", "summary.h", "summary.c"], [])
    code = bpf_compile.compile_source(source)
    assert {"on_kvm_exit", "on_kvm_entry", "raw_kvm_entry", "on_kvm_userspace_exit"} <= code.keys()


def test_without_kvm_exit_there_is_nothing_to_filter_by() -> None:
    assert bpf_events.filter_defines({"sample": 7}, [ENTRY]) == {}


def test_ring_sizes_are_powers_of_two_of_at_least_a_page() -> None:
    assert [round_ring_size(n) for n in (1, 4096, 4097, 16 << 20)] == [4096, 4096, 8192, 16 << 20]


def test_compiles_with_our_stand_in_for_kernel_headers() -> None:
    code = bpf_compile.compile_source("int zero(void *ctx) { return 0; }")
    # r0 = 0; exit
    assert code == {"zero": struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)}


def test_an_error_of_the_compiler_is_one_line() -> None:
    with pytest.raises(CapabilityError, match=r"bcc cannot compile the tracers: .*error") as caught:
        bpf_compile.compile_source("int zero(void *ctx) { return nothing; }")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_without_bcc_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bcc", None)
    with pytest.raises(CapabilityError, match="python3-bpfcc"):
        bpf_compile.load_bcc()


def test_every_tracer_is_found_and_has_its_example() -> None:
    folder = bpf_compile.find_tracers()
    sources = sorted(path.stem for path in folder.glob("*.c"))
    assert {"tracepoint", "kvm_exit", "kvm_vcpu_ioctl", "vcpu_run", "summary"} <= set(sources)
    assert [name for name in sources if not (folder / f"{name}_example.txt").is_file()] == []


def write_btf(types: list[tuple[int, int, int, int]], names: bytes) -> bytes:
    """Return a BTF of (name offset, kind, members, extra bytes) types."""
    body = b"".join(
        struct.pack("<III", name, kind << 24 | members, 0) + bytes(extra) for name, kind, members, extra in types
    )
    return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(body), len(body), len(names)) + body + names


def test_btf_ids_of_kernel_and_module() -> None:
    names = b"\0int\0counter\0run\0"
    kernel = write_btf([(1, 1, 0, 4), (0, 4, 2, 24), (5, 14, 0, 4), (13, 12, 0, 0)], names)
    base = bpf_btf.scan_btf(kernel, {("counter", bpf_btf.KIND_VAR), ("run", bpf_btf.KIND_FUNC), ("int", 12)})
    assert base.found == {("counter", bpf_btf.KIND_VAR): 3, ("run", bpf_btf.KIND_FUNC): 4}
    assert base.n_types == 4
    own = b"\0svm_run\0"
    module = write_btf([(0, 13, 1, 8), (len(names) + 1, 12, 0, 0)], own)
    found = bpf_btf.scan_btf(module, {("svm_run", bpf_btf.KIND_FUNC), ("absent", 12)}, base).found
    assert found == {("svm_run", bpf_btf.KIND_FUNC): 6}


def test_the_kernels_own_btf_has_what_it_must_have() -> None:
    if not (bpf_btf.BTF_FOLDER / "vmlinux").exists():
        pytest.skip("this kernel has no BTF")
    assert set(bpf_btf.find_functions({"schedule", "no_such_function"})) == {"schedule"}


def test_mechanisms_are_described_newest_first() -> None:
    rows = mechanisms.describe_mechanisms()
    assert [name for name, _, _ in rows][:5] == [
        "fentry/fexit",
        "BTF tracepoint",
        "raw tracepoint",
        "kprobe/kretprobe",
        "tracepoint",
    ]
    assert [row for row in rows if bool(row[1]) == bool(row[2])] == []


@pytest.mark.parametrize("place", [None, "empty"])
def test_without_tracefs_each_mechanism_says_what_is_wrong(
    place: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mechanisms, "mounted", lambda: None if place is None else tmp_path)
    rows = {name: (usable, remark) for name, usable, remark in mechanisms.describe_mechanisms()}
    for name in ("tracepoint", "syscall tracepoint"):
        usable, remark = rows[name]
        assert not usable
        assert ("not mounted" if place is None else str(tmp_path)) in remark
