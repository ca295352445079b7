"""Raw and BTF tracepoints: found by the kernel's type information, and the same results as with plain ones."""

from __future__ import annotations

import json
import struct
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from kvmtrace.capture.bpf import arguments as bpf_arguments
from kvmtrace.capture.bpf import attach as bpf_attach
from kvmtrace.capture.bpf import bpf_recorder
from kvmtrace.capture.bpf import btf_ids as bpf_btf
from kvmtrace.capture.bpf import event_programs as bpf_events
from kvmtrace.capture.bpf.btf_types import Argument, KernelTypes, TypeInfo
from kvmtrace.capture.bpf.summary_maps import SummaryPrograms
from kvmtrace.capture.settings import RecordSettings, TargetSpec
from kvmtrace.errors import CapabilityError
from kvmtrace.formats import open_recording
from tests.capture.summarise_twice import summarise_twice

if TYPE_CHECKING:
    from pathlib import Path

NUMBER, POINTER = Argument(0, 4, is_number=True), Argument(0, 8, is_number=False)


class Btf:
    """A small BTF, type by type."""

    def __init__(self, base: Btf | None = None) -> None:
        self.types, self.names = b"", b"" if base else b"\0"
        self.first_name = len(base.names) if base else 0
        self.next_id = base.next_id if base else 1

    def name(self, text: str) -> int:
        at = self.first_name + len(self.names)
        self.names += text.encode() + b"\0"
        return at

    def add(self, name: str, kind: int, n_members: int, size: int, extra: bytes = b"", *, flag: bool = False) -> int:
        offset = self.name(name) if name else 0
        self.types += struct.pack("<III", offset, kind << 24 | n_members | flag << 31, size) + extra
        self.next_id += 1
        return self.next_id - 1

    def structure(self, name: str, size: int, members: list[tuple[str, int, int]], *, flag: bool = False) -> int:
        rows = [struct.pack("<III", self.name(n) if n else 0, of, bits) for n, of, bits in members]
        return self.add(name, 4, len(members), size, b"".join(rows), flag=flag)

    def function(self, name: str, parameters: list[tuple[str, int]]) -> int:
        rows = [struct.pack("<II", self.name(n), of) for n, of in parameters]
        return self.add(name, 12, 1, self.add("", 13, len(parameters), 0, b"".join(rows)))

    def data(self) -> bytes:
        head = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.names))
        return head + self.types + self.names


def kernel(folder: Path) -> Btf:
    """Write the BTF of a kernel with kvm_exit and, as a module, struct vcpu_svm."""
    base = Btf()
    u32 = base.add("u32", 1, 0, 4, bytes(4))
    pointer = base.add("", 2, 0, 0)
    union = base.structure("", 8, [("inner", u32, 32)])
    members = [("flag", u32, 1 << 24 | 3), ("vcpu_id", u32, 32), ("", union, 64)]
    vcpu = base.structure("kvm_vcpu", 16, members, flag=True)
    of_vcpu = base.add("", 2, 0, vcpu)
    base.function("__traceiter_kvm_exit", [("__data", pointer), ("vcpu", of_vcpu), ("isa", u32)])
    (folder / "vmlinux").write_bytes(base.data())
    module = Btf(base)
    control = module.structure("vmcb_control_area", 80, [("exit_code", u32, 8 * 0x70)])
    vmcb = module.structure("vmcb", 4096, [("control", control, 0)])
    module.structure("vcpu_svm", 64, [("vcpu", vcpu, 0), ("vmcb", module.add("", 2, 0, vmcb), 8 * 24)])
    (folder / "kvm_amd").write_bytes(module.data())
    return base


def test_arguments_and_members_are_found_by_name(tmp_path: Path) -> None:
    kernel(tmp_path)
    types = KernelTypes(tmp_path)
    assert types.arguments("kvm_exit") == {"vcpu": POINTER, "isa": Argument(1, 4, is_number=True)}
    assert types.arguments("kvm_entry") is None
    assert types.offset("kvm_vcpu", "vcpu_id") == (4, 4)
    assert types.offset("kvm_vcpu", "flag") is None  # a bit field
    assert types.offset("kvm_vcpu", "inner") == (12, 4)  # in a nameless member
    assert types.offset("vmcb", "control", "exit_code") == (0x70, 4)
    assert bpf_arguments.summary_macros(types) == {
        "RAW_EXIT": "1",
        "EXIT_VCPU_ARG": "0",
        "EXIT_ISA_ARG": "1",
        "VCPU_ID_AT": "4",
        "VMCB_POINTER_AT": "24",
        "VMCB_EXIT_CODE_AT": "112",
    }


def test_without_btf_or_with_half_of_it_plain_tracepoints_remain(tmp_path: Path) -> None:
    assert bpf_arguments.summary_macros(KernelTypes(tmp_path)) == {}
    kernel(tmp_path)
    (tmp_path / "kvm_amd").unlink()  # no vendor's structure: the reason is nowhere to be had
    assert bpf_arguments.summary_macros(KernelTypes(tmp_path)) == {}
    whole = (tmp_path / "vmlinux").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "vmlinux").write_bytes(whole[:length])
        assert "RAW_EXIT" not in bpf_arguments.summary_macros(KernelTypes(tmp_path))


def test_a_record_is_made_from_arguments_of_the_same_names() -> None:
    fields = {"reason": (8, 4), "errno": (12, 4)}
    event = bpf_events.TracedEvent("kvm_userspace_exit", "kvm", "", None, fields)
    second = Argument(1, 4, is_number=True)
    assert bpf_events.argument_copies(event, {"reason": NUMBER, "errno": second}) == "SET4(8, 0) SET4(12, 1)"
    assert not bpf_events.argument_copies(event, {"reason": NUMBER})
    assert not bpf_events.argument_copies(event, {"reason": NUMBER, "errno": POINTER})
    gap = bpf_events.TracedEvent("kvm_cr", "kvm", "", None, {"rw": (8, 4), "val": (16, 8)})
    assert bpf_events.argument_copies(gap, {"rw": NUMBER, "val": Argument(1, 8, is_number=True)}) == (
        "CLEAR8(8) CLEAR8(16) SET4(8, 0) SET8(16, 1)"
    )
    unchecked = bpf_events.TracedEvent("kvm_pio", "kvm", "", None, {"rw": (8, 4)})
    assert not bpf_events.argument_copies(unchecked, {"rw": NUMBER})


def test_the_running_kernels_types_agree_with_its_format_files() -> None:
    if not (bpf_btf.BTF_FOLDER / "vmlinux").exists():
        pytest.skip("this kernel has no BTF")
    data, wanted = (bpf_btf.BTF_FOLDER / "vmlinux").read_bytes(), ("btf_trace_sched_switch", 8)
    base = TypeInfo(data)
    pid = base.member("task_struct", "pid")
    assert pid is not None
    assert pid.size == 4
    assert set(base.arguments("sched_switch") or ()) >= {"preempt", "prev", "next"}
    assert base.find(*wanted) == bpf_btf.scan_btf(data, {wanted}).found[wanted]


def assert_same_summary(folder: Path) -> dict[str, list[str]]:
    """Compare what summarise_twice wrote; return how the raw one's programs hang."""
    raw, plain = (json.loads((folder / f"{name}.json").read_text()) for name in ("raw", "plain"))
    assert set(plain["attached"]) == {"tracepoint"}
    for row in (*raw["rows"], *plain["rows"]):
        assert sum(row["time_ns"].values()) == row["wall_ns"]
    assert [counted(row) for row in raw["rows"]] == [counted(row) for row in plain["rows"]]
    for a, b in zip(raw["rows"], plain["rows"], strict=True):
        assert abs(a["wall_ns"] - b["wall_ns"]) < 0.2 * b["wall_ns"]
    attached: dict[str, list[str]] = raw["attached"]
    return attached


def counted(row: dict[str, Any]) -> dict[str, Any]:
    """Return everything of a row that is counted, not timed."""
    cells = Counter(
        {
            f"{kind} {cell.get('exit_reason', cell.get('reason'))} {what}": cell[what]
            for kind in ("exits", "userspace_exits")
            for cell in row[kind]
            for what in ("count", "samples")
        }
    )
    guest = row["guest"] and (row["guest"]["count"], row["guest"]["samples"])
    names = ("tid", "pid", "comm", "vcpu_id", "isa", "n_switches")
    return {**{name: row[name] for name in names}, "guest": guest, **cells}


@pytest.mark.kvm
@pytest.mark.parametrize("guest", ["lifecycle", "smp"])
def test_raw_and_plain_tracepoints_count_the_same(tmp_path: Path, guest: str) -> None:
    summarise_twice(tmp_path, guest, [])
    attached = assert_same_summary(tmp_path)
    if (bpf_btf.BTF_FOLDER / "vmlinux").exists():
        assert attached["BTF tracepoint"] == ["sched_switch"]
        assert {"kvm_fpu", "kvm_userspace_exit"} <= set(attached["raw tracepoint"])


@pytest.mark.kvm
def test_where_raw_programs_are_refused_plain_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a locked-down kernel."""
    real = bpf_attach.load_program

    def refuse(name: str, kind: int, *arguments: Any, **keywords: Any) -> int:
        if kind in (bpf_attach.PROG_TYPE_RAW_TRACEPOINT, bpf_attach.PROG_TYPE_TRACING):
            raise CapabilityError(f"the kernel refused the BPF program {name}")
        return real(name, kind, *arguments, **keywords)

    monkeypatch.setattr(bpf_attach, "load_program", refuse)
    programs = SummaryPrograms(None)
    programs.attach()
    assert set(programs.attached.by_mechanism()) == {"tracepoint"}
    programs.close()
    result = bpf_recorder.record(RecordSettings(tmp_path / "l.bpf", TargetSpec("guest", guest="lifecycle")))
    assert {"raw tracepoint", "BTF tracepoint", "fentry"}.isdisjoint(result.meta["attached"])
    known = result.meta["guest_run"]["known"]["tracepoints"]
    table = open_recording(tmp_path / "l.bpf").events()
    assert {name: table.count(name) for name in known} == known
