"""Text as people post it, of old kernels and other tools: what a line says is kept, what it does not say is never 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.errors import FormatError
from kvmtrace.formats import open_recording
from kvmtrace.isa.registry import describe_exit_reason
from kvmtrace.render.html.page import render_html
from kvmtrace.render.text.report_text import render_text
from kvmtrace.report.build import build_report
from kvmtrace.report.json_document import from_json, to_json

if TYPE_CHECKING:
    from pathlib import Path

FULL = "info1 0x0000000000000000 info2 0x0000000000000000 intr_info 0x00000000 error_code 0x00000000"


@pytest.fixture
def posted(tmp_path):
    """Open lines, each "event: text"; they get a task, a CPU and ascending times. Padded: as trace-cmd prints them."""

    def write(*lines: str, padded: bool = False):
        text = ""
        for i, line in enumerate(lines):
            name, body = line.split(":", 1)
            shown = f"{name + ':':22}{body.strip()}" if padded else line
            text += f"           vcpu3-1001  [000]   600.{i:06d}: {shown}\n"
        path = tmp_path / "posted.txt"
        path.write_text(text)
        return open_recording(path)

    return write


def fields(recording, name: str) -> dict:
    """Return what each event of a kind tells; None where it does not."""
    events = recording.events()
    out = {}
    for field in events.kinds[events.kind_index[name]].fields:
        values, told = events.field(name, field).tolist(), events.told(name, field)
        out[field] = [v if told is None or told[i] else None for i, v in enumerate(values)]
    return out


def reasons(recording) -> list[str]:
    events = recording.events()
    isa, number = events.field("kvm_exit", "isa").tolist(), events.field("kvm_exit", "exit_reason").tolist()
    return [describe_exit_reason(i, n) for i, n in zip(isa, number, strict=True)]


def test_the_vcpu_of_an_entry_without_rip(posted):
    recording = posted("kvm_entry: vcpu 3", "kvm_exit: reason CPUID rip 0x1000 info 0 0", "kvm_entry: vcpu 3")
    assert fields(recording, "kvm_entry") == {"vcpu_id": [3, 3]}
    assert [vcpu.vcpu_id for vcpu in build_report(recording).vcpus] == [3]


def test_names_that_no_table_has_are_rows_of_their_own(posted):
    recording = posted(*(f"kvm_exit: vcpu 0 reason {name} rip 0x10 {FULL}" for name in ("HC_WRMSR", "ERETS", "ERETS")))
    assert reasons(recording) == ["HC_WRMSR", "ERETS", "ERETS"]
    assert {(row.name, row.count) for row in build_report(recording).exits} == {("HC_WRMSR", 1), ("ERETS", 2)}


def test_lower_case_names_of_the_first_kernels(posted):
    """`cpuid` beside them is theirs, too: not another ISA's."""
    recording = posted("kvm_exit: reason cpuid rip 0x10", "kvm_exit: reason io_instruction rip 0xc0100000")
    assert reasons(recording) == ["cpuid", "io_instruction"]
    assert fields(recording, "kvm_exit")["isa"] == [0, 0]
    assert fields(recording, "kvm_exit")["guest_rip"] == [0x10, 0xC0100000]


def test_a_reason_alone(posted):
    recording = posted("kvm_entry: vcpu 0", "kvm_exit: vcpu 0 reason HLT", "kvm_entry: vcpu 0")
    assert reasons(recording) == ["HLT"]
    assert set(fields(recording, "kvm_exit")) == {"vcpu_id", "exit_reason", "isa"}


@pytest.mark.parametrize(
    ("printed", "name"),
    [
        ("EXTERNAL_INTERRUPT 0x4000000", "EXTERNAL_INTERRUPT 0x4000000"),
        ("EPT_VIOLATION FAILED_VMENTRY", "EPT_VIOLATION FAILED_VMENTRY"),
        ("UNKNOWN (77)", "UNKNOWN(0x4d)"),
        ("PF excp", "PF excp"),
        ("EXIT_EXCP_UD", "UD excp"),
        ("EXIT_NO_SUCH", "EXIT_NO_SUCH"),
    ],
)
def test_reasons_keep_their_names(posted, printed, name):
    assert reasons(posted(f"kvm_exit: vcpu 0 reason {printed} rip 0x10 {FULL}")) == [name]


def test_a_line_that_tells_less_than_the_others(posted):
    """Its other values are marked as not told; those of whole lines stay."""
    recording = posted(
        "kvm_exit: reason !",
        f"kvm_exit: vcpu 0 reason CPUID rip 0x1000 {FULL}",
        "kvm_exit: vcpu 0 reason HLT",
        "kvm_exit: garbage",
    )
    told = fields(recording, "kvm_exit")
    assert reasons(recording) == ["!", "CPUID", "HLT", "?"]
    assert told["guest_rip"] == [None, 0x1000, None, None]
    assert told["vcpu_id"] == [None, 0, 0, None]
    assert recording.loss.not_understood == {"kvm_exit": 1}
    assert recording.loss.events == 0


def test_each_line_has_its_own_pattern(posted):
    """The first line of the file decides nothing."""
    recording = posted("kvm_entry: vcpu 1", "kvm_entry: vcpu 2, rip 0xfff0", "kvm_pio: pio_read at 0x71 size 1 count 1",
                       "kvm_pio: pio_write at 0x70 size 1 count 1 val 0x8f")  # fmt: skip
    assert fields(recording, "kvm_entry") == {"vcpu_id": [1, 2], "rip": [None, 0xFFF0]}
    assert fields(recording, "kvm_pio")["val"] == [None, 0x8F]


def test_trace_cmd_does_not_tell_the_errno(posted):
    """With and without `cpus=N` before it; what the kernel prints does."""
    lines = ("kvm_userspace_exit: reason KVM_EXIT_UNKNOWN (0)", "kvm_userspace_exit: reason KVM_EXIT_IO (2)")
    assert set(fields(posted(*lines, padded=True), "kvm_userspace_exit")) == {"reason"}
    assert fields(posted(*lines), "kvm_userspace_exit")["errno"] == [None, 0]
    restart = posted("kvm_userspace_exit: reason restart (4)", "kvm_userspace_exit: reason error (14)")
    assert fields(restart, "kvm_userspace_exit")["errno"] == [-4, -14]


def test_an_exit_to_userspace_without_errno_is_no_violation(posted):
    recording = posted(
        "sys_enter_ioctl: fd: 0x00000008, cmd: 0x0000ae80, arg: 0x00000000",
        "kvm_fpu: load",
        "kvm_fpu: unload",
        "kvm_userspace_exit: reason KVM_EXIT_UNKNOWN (0)",
        "sys_exit_ioctl: 0xfffffffffffffffc",
        padded=True,
    )
    assert not check_recording(recording).violations


class TestEmulatedInstructions:
    def test_trace_cmd_prints_fail_and_no_mode(self, posted):
        told = fields(posted("kvm_emulate_insn: 0:133025: ec", "kvm_emulate_insn: 0:133025: ec FAIL", padded=True),
                      "kvm_emulate_insn")  # fmt: skip
        assert (told["failed"], told["len"], told["insn"][1][0]) == ([0, 1], [1, 1], 0xEC)
        assert "flags" not in told

    def test_what_could_not_be_fetched(self, posted):
        told = fields(posted("kvm_emulate_insn: 0:fc95a: (prot32)", "kvm_emulate_insn: 0:fc95a: (prot32) failed",
                             "kvm_emulate_insn: 0:fc95a: FAIL"), "kvm_emulate_insn")  # fmt: skip
        assert (told["failed"], told["len"], told["flags"]) == ([0, 1, 1], [0, 0, 0], [5, 5, None])

    def test_a_disassembler_in_trace_cmd(self, posted):
        told = fields(posted("kvm_emulate_insn: 0:1000:in al, dx", "kvm_emulate_insn: 0:1000:ec (real)"),
                      "kvm_emulate_insn")  # fmt: skip
        assert (told["rip"], told["len"]) == ([0x1000, 0x1000], [None, 1])


def test_the_report_says_what_is_not_told(posted):
    """No RIP, no errno, no mode: null and "-", never 0; a failed emulation is shown without bytes, too."""
    recording = posted(
        "kvm_exit: vcpu 0 reason HLT",
        "kvm_emulate_insn: 0:fc95a: FAIL",
        "kvm_emulate_insn: 0:133025: ec FAIL",
        "kvm_emulate_insn: 0:133025: f3 a5",
        "kvm_emulate_insn: 0:fffff802987d6169: f3 a5",
        "kvm_userspace_exit: reason KVM_EXIT_IO (2)",
        "kvm_pio: nonsense",
        padded=True,
    )
    report = build_report(recording)
    assert [row.rip for row in report.detail.rips] == [None]
    assert [(row.reason, row.errno) for row in report.userspace_exits] == [(2, None)]
    assert {(row.text, row.mode, row.failed) for row in report.detail.emulated} == {
        ("(not fetched)", "?", 1),
        ("in al,dx", "?", 1),
        ("?", "?", 0),
        ("rep movsd [rdi],[rsi]", "64", 0),
    }
    assert report.loss.not_understood == {"kvm_pio": 1}
    assert "lines not understood: 1 of kvm_pio" in render_text(report)


class TestOtherKernels:
    INTERRUPT = "kvm_exit: reason EXTERNAL_INTERRUPT rip 0x1000 info 0 800000ec"

    @pytest.mark.parametrize("others", [("kvm_entry: vcpu 0",), ("kvm_entry: vcpu 0, rip 0x1000",)])
    def test_info2_before_5_10_is_no_vectoring(self, posted, others):
        recording = posted(*others, self.INTERRUPT, *others, self.INTERRUPT, *others)
        told = fields(recording, "kvm_exit")
        assert "info2" not in told
        assert told["intr_info"] == [0x800000EC] * 2
        assert not check_recording(recording).violations

    def test_info2_of_a_kernel_that_shows_its_age_is_vectoring(self, posted):
        recording = posted("kvm_exit: reason EPT_VIOLATION rip 0x1000 info 683 800000d1", "kvm_inj_virq: IRQ 0xd1")
        assert fields(recording, "kvm_exit")["info2"] == [0x800000D1]

    def test_info2_of_which_nothing_tells_the_age_is_not_told(self, posted):
        told = fields(posted("kvm_exit: reason EPT_VIOLATION rip 0x1000 info 683 800000d1"), "kvm_exit")
        assert not {"info2", "intr_info"} & set(told)
        assert told["info1"] == [0x683]

    def test_info2_of_the_other_isa_always_meant_the_same(self, posted):
        recording = posted("kvm_entry: vcpu 0", "kvm_exit: reason npf rip 0xfff0 info 14 fffffff0")
        assert fields(recording, "kvm_exit")["info2"] == [0xFFFFFFF0]

    def test_an_error_code_that_is_printed_where_there_is_none(self, posted):
        recording = posted(*(f"kvm_inj_exception: {e} (0x{c})" for e, c in (("#UD", 0), ("#PF", 2), ("#GP", 0))))
        assert fields(recording, "kvm_inj_exception")["has_error"] == [0, 1, None]
        newer = posted("kvm_inj_exception: #UD", "kvm_inj_exception: #GP (0x0)")
        assert fields(newer, "kvm_inj_exception")["has_error"] == [0, 1]

    def test_an_error_code_of_32_bits_says_so(self, posted):
        recording = posted("kvm_page_fault: address fee00000 error_code 14")
        assert recording.events().field("kvm_page_fault", "error_code").dtype.itemsize == 4

    def test_a_plug_in_that_knows_other_fields(self, posted):
        line = "kvm_nested_vmexit: <CANT FIND FIELD rip>vcpu 0 reason EXIT_HLT rip 0x40 info 0 0"
        recording = posted(line, padded=True)
        told = fields(recording, "kvm_nested_vmexit")
        assert (told["exit_reason"], told["guest_rip"], told["isa"]) == ([0x78], [0x40], [2])


PERF = """\
       vcpu0  1001 [001]   990.000001:      kvm:kvm_entry: vcpu 0, rip 0x1000
       vcpu0  1001/1002 [001]   990.000005:       kvm:kvm_exit: vcpu 0 reason CPUID rip 0x1000 {FULL}
 CPU 0/KVM  1002 [001]   990.000009:      1 kvm:kvm_entry: vcpu 0, rip 0x1002
 CPU 0/KVM  1002 [001]   990.000010: syscalls:sys_enter_ioctl: fd: 0x00000008, cmd: 0x0000ae80, arg: 0x00000000
"""


def test_perf_script(tmp_path):
    path = tmp_path / "perf.txt"
    path.write_text(PERF.replace("{FULL}", FULL))
    recording = open_recording(path)
    events = recording.events()
    assert [events.kinds[k].name for k in events.kind] == ["kvm_entry", "kvm_exit", "kvm_entry", "sys_enter_ioctl"]
    assert events.tid.tolist() == [1001, 1002, 1002, 1002]
    assert events.cpu.tolist() == [1] * 4
    assert (recording.comms[1002], recording.processes) == ("CPU 0/KVM", {1002: 1001})
    assert fields(recording, "kvm_exit")["guest_rip"] == [0x1000]


LATENCY = """\
# tracer: nop
#
# nop latency trace v1.1.5 on 6.1.0
   vcpu0-1001    0d..1.   12us+: kvm_entry: vcpu 0, rip 0x1000
  <...>-1001    0.....   15us : kvm_fpu: unload
"""


def test_latency_formats(tmp_path):
    path = tmp_path / "latency.txt"
    path.write_text(LATENCY)
    events = open_recording(path).events()
    assert (events.ts_ns.tolist(), events.irq_flags.tolist(), events.cpu.tolist()) == ([12_000, 15_000], [1, 0], [0, 0])


@pytest.mark.parametrize(
    ("lines", "name"),
    [
        (["kvm_entry: PC: 0x802c1f24", "kvm_exit: PC: 0x802c21c8"], "arm, or arm64 before Linux 5.1"),
        (["kvm_exit: HSR_EC: 0x0024, PC: 0x00401008"], "arm, or arm64 before Linux 5.1"),
        (
            ["kvm_entry: PC: 0x401008", "kvm_exit: IRQ: HSR_EC: 0x0024 (DABT_LOW), PC: 0x00401008"],
            "arm, or arm64 before Linux 5.1",
        ),
        (["kvm_exit: SEPC:0x80200000, SCAUSE:0x16, STVAL:0x0, HTVAL:0x0, HTINST:0x0"], "riscv"),
        (["kvm_entry: PC: 0x01680200000", "kvm_exit: SCAUSE:0x8, SEPC:0x80200000, STVAL:0x0"], "riscv"),
        (["kvm_s390_sie_enter: 00[0704c00180000000-000000000010a000]: entering sie cpuflags 00000000"], "s390"),
        (["kvm_exit: exit=EXTERNAL | pc=0xc000 | msr=0x8000 | dar=0x0 | last_inst=0x0"], "powerpc"),
    ],
)
def test_other_architectures_are_named(posted, lines, name):
    with pytest.raises(FormatError, match=rf"those of {name}; kvmtrace export writes them") as caught:
        posted(*lines)
    assert "\n" not in str(caught.value)


def test_an_arm64_exit_that_is_not_understood_has_no_address_and_no_reason(posted):
    """It was taken for IRQ at 0, and V6 and V5 accused KVM."""
    recording = posted(
        "kvm_entry: PC: 0x0000000000401008", "kvm_exit: TRAP: HSR_EC: 0x0001 (WFx), PC: 0x0000000000401008",
        "kvm_wfx_arm64: guest executed wfi at: 0x401008", "kvm_entry: PC: 0x0000000000401008", "kvm_exit: TRAP, cut o",
        "kvm_entry: PC: 0x0000000000401008",
    )  # fmt: skip
    events = recording.events()
    for name in ("exit_reason", "guest_rip"):
        assert events.told("kvm_exit", name).tolist() == [True, False]
    assert events.told("kvm_exit", "isa") is None
    verdict = check_recording(recording)
    assert (verdict.n_violations, verdict.n_suspicions) == (0, 0)


def test_names_travel_with_an_export(posted, tmp_path):
    from kvmtrace.formats.arrow import arrow_writing
    from kvmtrace.isa import registry

    recording = posted(f"kvm_exit: vcpu 0 reason SPLIT_LOCK_X rip 0x10 {FULL}", "kvm_exit: vcpu 1 reason HLT")
    path = tmp_path / "file.parquet"
    with path.open("wb") as out:
        arrow_writing.write_parquet(recording, out)
    registry.PRINTED.clear()
    again = open_recording(path)
    assert reasons(again) == ["SPLIT_LOCK_X", "HLT"]
    assert fields(again, "kvm_exit")["guest_rip"] == [0x10, None]


CALL = ("kvm_fpu: load", "kvm_entry: vcpu 0", "kvm_exit: reason IO_INSTRUCTION rip 0x1000 info 3f80000 0",
        "kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x34")  # fmt: skip
LEAVE, UNLOAD = "kvm_userspace_exit: reason KVM_EXIT_IO (2)", "kvm_fpu: unload"


def test_an_fpu_that_is_loaded_on_demand_is_not_judged(posted):
    """Until 4.14 it was put away after kvm_userspace_exit."""
    found = check_recording(posted(*CALL, LEAVE, UNLOAD, *CALL[1:], LEAVE))
    assert not found.violations
    assert any("kvm_fpu is not judged" in line for line in found.cannot_see)


def test_an_fpu_that_is_put_away_late_once_is_a_violation(posted):
    found = check_recording(posted(*CALL, UNLOAD, LEAVE, *CALL, LEAVE, UNLOAD, *CALL, UNLOAD, LEAVE))
    assert {v.rule for v in found.violations} >= {"V1"}


def test_what_some_lines_do_not_tell_is_judged_of_none(posted):
    full = f"kvm_exit: vcpu 0 reason CPUID rip 0x1000 {FULL}"
    entry = "kvm_entry: vcpu 0, rip 0x1002"
    cpuid, leave = (
        "kvm_cpuid: func 0 idx 0 rax 0 rbx 0 rcx 0 rdx 0, cpuid entry found",
        "kvm_userspace_exit: reason restart (4)",
    )
    whole = check_recording(posted(entry, full, cpuid, entry, full, leave))
    part = check_recording(posted(entry, full, cpuid, entry, "kvm_exit: vcpu 0 reason HLT", leave))
    assert whole.rules["V6"].checked > 0
    assert (part.rules["V6"].checked, part.violations) == (0, ())
    assert part.rules["V2"].checked == whole.rules["V2"].checked > 0


ARM64 = (
    "kvm_entry: PC: 0x0000000000401000",
    "kvm_exit: TRAP: HSR_EC: 0x0024 (DABT_LOW), PC: 0x0000000000401004",
    "kvm_guest_fault: ipa 0x9000000, hsr 0x93800046, hxfar 0xffff800010005000, pc 0x00000000401004",
    "kvm_mmio: mmio write len 4 gpa 0x9000000 val 0x41",
    "kvm_userspace_exit: reason KVM_EXIT_MMIO (6)",
    "kvm_entry: PC: 0x0000000000401004",
    "kvm_exit: TRAP: HSR_EC: 0x0018 (SYS64), PC: 0x0000000000401008",
    "kvm_handle_sys_reg: HSR 0x6230006d",
    "kvm_sys_access: PC: 401008 ID_AA64ISAR0_EL1 (3,0,0,6,0) read",
    "kvm_entry: PC: 0x0000000000401008",
    "kvm_exit: IRQ: HSR_EC: 0x0000 (UNKNOWN), PC: 0x000000000040100c",
    "kvm_entry: PC: 0x000000000040100c",
    "kvm_exit: TRAP: HSR_EC: 0x0001 (WFx), PC: 0x0000000000401010",
    "kvm_wfx_arm64: guest executed wfi at: 0x0000000000401010",
    "kvm_entry: PC: 0x0000000000401010",
    "kvm_exit: TRAP: HSR_EC: 0x0016 (HVC64), PC: 0x0000000000401018",
    "kvm_hvc_arm64: HVC at 0x0000000000401018 (r0: 0x0000000084000000, imm: 0x0)",
    "kvm_entry: PC: 0x0000000000401018",
)


class TestArm64:
    def test_its_text_is_read(self, posted):
        recording = posted(*ARM64)
        report = build_report(recording)
        assert report.capture.isa == "arm64"
        assert {(row.name, row.count) for row in report.exits} == {
            (name, 1) for name in ("DABT_LOW", "SYS64", "IRQ", "WFx", "HVC64")
        }
        assert not report.loss.not_understood
        assert report.model.verdict == "conforms"
        assert report.model.rules["V4"].checked >= 4
        assert report.model.rules["V6"].checked >= 3
        assert fields(recording, "kvm_sys_access")["is_write"] == [0]

    def test_a_fault_in_it_is_found(self, posted):
        untraced = [line for line in ARM64 if "kvm_handle_sys_reg" not in line]
        assert {v.rule for v in check_recording(posted(*ARM64, *untraced[1:])).violations} == {"V4"}


FULL_CPUID = f"kvm_exit: vcpu 0 reason CPUID rip 0x1000 {FULL}"


class TestPartsOfAnExit:
    def test_fields_that_people_left_out(self, posted):
        told = fields(
            posted(
                "kvm_exit: vcpu 0 reason EXTERNAL_INTERRUPT intr_info 0x800000ec",
                "kvm_exit: vcpu 23 reason DR_ACCESS info1 0x0000000000000216",
                "kvm_exit: reason PREEMPTION_TIMER rip 0x40274d info 0 0 intr 0",
                "kvm_exit: vcpu 0 reason EXCEPTION_NMI rip 0x10 info1 0x28 intr_info 0x80000b0e error_code 0x2",
            ),
            "kvm_exit",
        )
        assert told["exit_reason"] == [1, 29, 52, 0]
        assert told["guest_rip"] == [None, None, 0x40274D, 0x10]
        assert told["info1"] == [None, 0x216, 0, 0x28]
        assert told["intr_info"] == [0x800000EC, None, None, 0x80000B0E]
        assert told["error_code"] == [None, None, None, 2]

    def test_an_exit_of_a_nested_guest_as_trace_cmd_printed_it(self, posted):
        line = "kvm_nested_vmexit: rip 7fa9ee reason IO_INSTRUCTION info1 5658000b info2 0 int_info 0 int_info_err 0"
        told = fields(posted(line, padded=True), "kvm_nested_vmexit")
        assert (told["exit_reason"], told["guest_rip"], told["info1"]) == ([30], [0x7FA9EE], [0x5658000B])

    def test_what_the_plug_in_complains_of(self, posted):
        line = 'kvm_nested_vmexit: CAN\'T FIND FIELD "rip"<CANT FIND FIELD exit_code>vcpu 0 reason npf rip 0x400433'
        assert fields(posted(line, padded=True), "kvm_nested_vmexit")["guest_rip"] == [0x400433]

    def test_the_report_of_exits_without_rip(self, posted):
        """The headline names no instruction that nobody told, and the slowest VM-exits have none."""
        lines = ("kvm_entry: vcpu 0", "kvm_exit: vcpu 0 reason DR_ACCESS info1 0x0000000000000216") * 3
        report = build_report(posted(*lines))
        text = render_text(report)
        assert "rip" not in text.split("VM-exits by reason")[0]
        assert {row.guest_rip for row in report.slowest} == {None}
        assert "0xffffffffffffffff" not in text + render_html(report)
        assert from_json(to_json(report)) == report

    def test_exits_of_which_no_reason_is_told(self, posted):
        report = build_report(posted("kvm_entry: vcpu 0, rip 0x1", "kvm_exit: nonsense", "kvm_entry: vcpu 0, rip 0x1"))
        assert [row.name for row in report.exits] == ["?"]
        assert report.loss.not_understood == {"kvm_exit": 1}

    def test_a_port_access_without_count(self, posted):
        told = fields(posted("kvm_pio: pio_read  at 0x3fd size 1 val 0x60"), "kvm_pio")
        assert (told["port"], told["size"], told["val"]) == ([0x3FD], [1], [0x60])


CUT = """\
  CPU 0/KVM-9 [000] d..1.  600.000001: kvm_entry: vcpu 0, rip 0xfff0
  CPU 0/KVM-9 [000] d..1.  600.000002: kvm_exit: vcpu 0 reason CPUID rip 0xfff0 {FULL}
  CPU 0/KVM-9 [000] .....  600.000003: kvm_cpuid: func 0 idx 0 rax d rbx 0 rcx 0 rdx 0, cpuid entry found
{between}
  CPU 0/KVM-9 [000] d..1.  600.000012: kvm_exit: vcpu 0 reason CPUID rip 0xfff4 {FULL}
  CPU 0/KVM-9 [000] .....  600.000013: kvm_cpuid: func 0 idx 0 rax d rbx 0 rcx 0 rdx 0, cpuid entry found
  CPU 0/KVM-9 [000] d..1.  600.000014: kvm_entry: vcpu 0, rip 0xfff6
"""
ENTRY = "  CPU 0/KVM-9 [000] d..1.  600.000004: kvm_entry: vcpu 0, rip 0xfff2"


class TestExcerpts:
    """Where lines were left out or are no events, events may be missing: no violation, and not plain "conforms"."""

    @pytest.fixture
    def cut(self, tmp_path):
        def write(between: str):
            path = tmp_path / "cut.txt"
            path.write_text(CUT.format(FULL=FULL, between=between))
            return open_recording(path)

        return write

    def test_the_whole_text_conforms(self, cut):
        found = check_recording(cut(ENTRY))
        assert (found.verdict, found.not_understood) == ("conforms", 0)

    @pytest.mark.parametrize(
        "between", ["...", "[snip]", "--", " ---8<---", "…", "    ...snip...", "<snip>", "(12 lines removed)", "*cut*"]
    )
    def test_a_mark_of_what_was_left_out(self, cut, between):
        recording = cut(between)
        found = check_recording(recording)
        assert (found.violations, found.not_understood) == ((), 0)
        assert recording.loss.events is None

    @pytest.mark.parametrize("between", ["and then, some time later:", ENTRY[:40], "\n\nhere it hangs\n\n"])
    def test_other_text_between_events(self, cut, between):
        recording = cut(between)
        found = check_recording(recording)
        assert found.violations == ()
        assert (found.not_understood, found.verdict) == (1, "conforms as far as judged")
        assert recording.loss.not_understood == {"no event": 1}
        assert found.judged_share < 1

    def test_zeros_of_a_file_system_that_lost_something(self, tmp_path):
        path = tmp_path / "zeros.txt"
        path.write_text(CUT.format(FULL=FULL, between="\0" * 40))
        found = check_recording(open_recording(path))
        assert (found.violations, found.not_understood) == ((), 1)

    def test_text_around_the_trace_hides_nothing(self, tmp_path):
        path = tmp_path / "mail.txt"
        path.write_text("Hello,\n\n" + CUT.format(FULL=FULL, between=ENTRY) + "\n-- \nJoe\n")
        found = check_recording(open_recording(path))
        assert (found.verdict, found.judged_share) == ("conforms", 1.0)

    def test_an_event_that_is_not_understood(self, cut):
        found = check_recording(cut(ENTRY.replace("kvm_entry: vcpu 0, rip 0xfff2", "kvm_eoi: what?") + "\n" + ENTRY))
        assert found.verdict == "conforms as far as judged"

    def test_pieces_of_a_text(self):
        """A gap at the end of a piece stands at the beginning of the next."""
        from kvmtrace.formats.ftrace_text.text_gaps import TextGaps
        from kvmtrace.formats.ftrace_text.text_lines import decode_lines

        pieces = ("Hello\n", f"{ENTRY}\n...\n", "what\n", f"{ENTRY}\n", f"{ENTRY}\nbye\n")
        gaps = TextGaps()
        lost = [gaps.mark(decode_lines(piece)).lost.tolist() for piece in pieces]
        assert lost == [[], [0], [], [-2, 0], [0]]
        assert gaps.not_understood == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("    [001]   770.850287:           kvm:kvm_entry: vcpu 0, rip 0x100146", "lines of events without task"),
        (
            "preempt_test  20677.199579:   kvm:kvm_exit: reason HLT rip 0x40274d info 0 0",
            "perf script without thread",
        ),
        ("   0.012 CPU 0/KVM/1234 kvm:kvm_exit(exit_reason: 10, guest_rip: 0xfff0, isa: 1)", "output of perf trace"),
        ("  CPU 0: kvm_entry: vcpu 0, rip 0xffffffff81000aa0", "events without time stamps"),
        ("CPU 0/KVM-82557 [002] ... kvm_entry: vcpu 0, rip 0xffffffffae1b603b", "events without time stamps"),
        ("microkvm-30942 kvm_emulate_insn: 0:ffffffff8134be37:44 8b 60 60 (prot64)", "events without time stamps"),
        ("  kvm_exit:             reason EXIT_RSM rip 0x7ffbb280 info 0 0", "events alone"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, line, words):
    path = tmp_path / "posted.txt"
    path.write_text(f"{line}\n{line}\n")
    with pytest.raises(FormatError, match=words):
        open_recording(path)


def test_perf_script_without_tasks_names(tmp_path):
    """perf script -F tid,cpu,time,event,trace."""
    path = tmp_path / "perf.txt"
    lines = PERF.replace("{FULL}", FULL).splitlines()
    path.write_text("".join(line[line.index(" [") - 4 :] + "\n" for line in lines))
    recording = open_recording(path)
    assert (len(recording.events()), recording.loss.not_understood) == (len(lines), {})
    assert recording.events().tid.tolist() == [1001, 1002, 1002, 1002]


def test_quoted_printable_of_short_lines(tmp_path):
    path = tmp_path / "mail.txt"
    plain = CUT.format(FULL=FULL, between=ENTRY) + "  CPU 0/KVM-9 [000] .....  600.000015: kvm_fpu: load=1\n" * 3
    path.write_text(plain.replace("=", "=3D"))
    table = open_recording(path).events()
    assert table.field("kvm_fpu", "load").tolist() == [1, 1, 1]


def test_perf_prof_and_its_dates(tmp_path):
    path = tmp_path / "prof.txt"
    path.write_text(
        "2021-12-12 16:11:10.214139     <...> 206966 .N.. [017] 15504452.408994: kvm:kvm_exit: reason HLT rip 0x10\n"
        "2021-12-12 16:11:10.214203     <...> 206966 d... [017] 15504452.412981: kvm:kvm_entry: vcpu 20\n"
    )
    events = open_recording(path).events()
    assert (events.tid.tolist(), events.cpu.tolist()) == ([206966] * 2, [17] * 2)
    assert events.irq_flags.tolist() == [0x24, 1]


def test_a_name_that_would_steer_a_terminal_is_spelt_out(posted):
    recording = posted("kvm_entry: vcpu 0", "kvm_exit: reason FOO\x07 rip 0x10 info 0 0", "kvm_entry: vcpu 0")
    assert "\x07" not in render_text(build_report(recording))
    assert reasons(recording) == ["FOO\\x07"]


def test_raw_text_of_trace_cmd_3_3(tmp_path):
    """It puts the flags behind the CPU, as a number."""
    path = tmp_path / "raw.txt"
    path.write_text(
        "cpus=1\n"
        " python3-174   [000]-0x1    27.494304537: kvm_entry: vcpu_id=0 rip=0xfff0\n"
        " python3-174     0-0x24    27.494304599: kvm_entry: vcpu_id=0 rip=0xfff2\n"
    )
    events = open_recording(path).events()
    assert (events.irq_flags.tolist(), events.cpu.tolist()) == ([0x01, 0x24], [0, 0])
    assert events.field("kvm_entry", "rip").tolist() == [0xFFF0, 0xFFF2]


@pytest.mark.parametrize(("unwrapped", "fields_told"), [("", {"reason"}), ("kvm_fpu: unload", {"reason", "errno"})])
def test_wrapped_text_is_taken_for_the_kernels_only_if_it_looks_so(tmp_path, unwrapped, fields_told):
    """trace-cmd does not show the errno of a userspace exit, and its padding is lost where lines were wrapped."""
    head = "       CPU 0/KVM-199   [000] .....    18.4939"
    path = tmp_path / "wrapped.txt"
    lines = [f"{head}{i}: kvm_userspace_exit:\nreason KVM_EXIT_IO (2)\n" for i in range(10, 14)]
    path.write_text("".join(lines) + (f"{head}20: {unwrapped}\n" if unwrapped else ""))
    events = open_recording(path).events()
    assert events.count("kvm_userspace_exit") == 4
    assert set(events.kinds[events.kind_index["kvm_userspace_exit"]].fields) == fields_told


def test_a_line_wrapped_before_its_events_name_stays_an_event(tmp_path):
    """Its first part, time and no more, is not taken for the rest of the event before."""
    lines = [
        "python-198   [000] d..1.    18.471483: kvm_update_master_clock: masterclock 0 hostclock 0x1\noffsetmatched 0",
        "python-198   [000] .....    18.471510:\nkvm_apicv_inhibit_changed: set reason=0, inhibits=0x1 DISABLED",
        "python-198   [000] d..1.    18.471600: kvm_entry:            vcpu 0, rip 0xfff0",
    ]
    path = tmp_path / "wrapped.txt"
    path.write_text("cpus=1\n" + "".join(f"          {line}\n" for line in lines))
    events = open_recording(path).events()
    names = [events.kinds[kind].name for kind in events.kind]
    assert names == ["kvm_update_master_clock", "kvm_apicv_inhibit_changed", "kvm_entry"]


def test_more_forms_than_are_told_apart_are_named(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    names = ["x" * i for i in range(1, 51)] + ["y" * i for i in range(1, 51)]
    lines = [f" vmm-100 [000] d..1. 1.{i:06d}: kvm_exit: exit_reason=10 {x}=1 isa=1" for i, x in enumerate(names, 2)]
    path.write_text("\n".join([" vmm-100 [000] d..1. 1.000001: kvm_entry: vcpu 0, rip 0x1000", *lines]) + "\n")
    recording = open_recording(path)
    assert len(recording.events()) == 101
    (name,) = recording.loss.not_understood
    assert name == "kvm_exit (whose text has more than 64 forms)"
