"""Ftrace text: the kernel's, trace-cmd's plain and raw, and texts that are cut or strange."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmtrace.errors import FormatError
from kvmtrace.formats import open_recording
from kvmtrace.formats.ftrace_text.text_lines import decode_lines
from kvmtrace.isa.printed import exit_reason_number
from kvmtrace.table.event_table import EventTable

if TYPE_CHECKING:
    from pathlib import Path

HEAD = "# tracer: nop\n#\n# entries-in-buffer/entries-written: 5/5   #P:2\n#\n"


@pytest.fixture
def open_text(tmp_path):
    def write(text: str, end: str = "\n"):
        path = tmp_path / "text"
        path.write_bytes(text.encode() + end.encode())
        return open_recording(path)

    return write


def line(body: str, *, tid: int = 9, flags: str = "d..1.", ts: str = "12.000345", cpu: int = 0, tgid: str = "") -> str:
    return f"       CPU 0/KVM-{tid}    {tgid}[{cpu:03d}] {flags} {ts}: {body}"


def fields(recording, name: str) -> dict:
    events = recording.events()
    kind = events.kinds[events.kind_index[name]]
    return {f: events.field(name, f)[0] for f in kind.fields}


def test_columns_of_a_line(open_text):
    text = line("kvm_fpu: load", tid=123, flags="dNh2.", ts="7.000000123", cpu=3, tgid="(  100) ")
    recording = open_text(HEAD + text)
    events = recording.events()
    assert (events.ts_ns[0], events.cpu[0], events.tid[0], events.irq_flags[0], events.preempt_count[0]) == (
        7_000_000_123,
        3,
        123,
        0x01 | 0x24 | 0x08,
        2,
    )
    assert (recording.comms, recording.processes) == ({123: "CPU 0/KVM"}, {123: 100})
    assert recording.capture.format == "ftrace-text"


@pytest.mark.parametrize(
    ("flags", "bits", "count"),
    [
        (".....", 0, 0),
        ("d..1.", 1, 1),
        ("D.s..", 0x91, 0),
        ("bnH3.", 0x80 | 4 | 0x18, 3),
        ("Xpz..", 2 | 0x20 | 0x40, 0),
        ("d.Z1", 1 | 0x48, 1),
    ],
)
def test_flag_letters(flags, bits, count):
    lines = decode_lines(line("kvm_fpu: load", flags=flags) + "\n")
    assert (lines.irq_flags[0], lines.preempt_count[0]) == (bits, count)


def test_text_without_flags_says_so(open_text):
    events = open_text("cpus=2\n qemu-system-x86-313   [001]     6.974498: kvm_fpu:              load").events()
    assert events.irq_flags.tolist() == [2]


def test_times_in_ns_that_leave_no_room_for_a_space(open_text):
    """`trace-cmd report -N` of a host that has been up for more than 100 s."""
    texts = [f"  CPU 0/KVM-9     [000]{ts}: kvm_entry: vcpu 0, rip 0x10" for ts in (307539487648, 1307539487648)]
    assert open_text("\n".join(texts)).events().ts_ns.tolist() == [307539487648, 1307539487648]


def test_counting_clocks(open_text):
    events = open_text(line("kvm_fpu: load", ts="123456789012")).events()
    assert events.ts_ns.tolist() == [123456789012]


# (event, text, fields) of print formats from 2.6.32 to 6.18 and of trace-cmd
# fmt: off
BODIES = [
    ("kvm_entry", "vcpu 1, rip 0xfff0", {"vcpu_id": 1, "rip": 0xFFF0}),
    ("kvm_entry", " vcpu 0 rip 0xfff0", {"vcpu_id": 0, "rip": 0xFFF0}),
    (
        "kvm_entry",
        "vcpu 0, rip 0x1 intr_info 0x800000ec error_code 0x0[immediate exit]",
        {"vcpu_id": 0, "rip": 1, "intr_info": 0x800000EC, "error_code": 0, "immediate_exit": 1},
    ),
    (
        "kvm_exit",
        (
            "vcpu 0 reason EPT_VIOLATION FAILED_VMENTRY rip 0x8 info1 0x0000000000000081 "
            "info2 0x0000000080000b0e intr_info 0x80000b0e error_code 0x00000002"
        ),
        {
            "exit_reason": 0x80000030,
            "isa": 1,
            "guest_rip": 8,
            "info1": 0x81,
            "info2": 0x80000B0E,
            "intr_info": 0x80000B0E,
            "error_code": 2,
            "vcpu_id": 0,
        },
    ),
    (
        "kvm_exit",
        (
            "vcpu 2 reason npf rip 0x8 info1 0x0000000100000014 info2 0x00000000fffffff0 "
            "intr_info 0x00000000 error_code 0x00000000 requests 0x0000000000000010"
        ),
        {
            "exit_reason": 0x400,
            "isa": 2,
            "guest_rip": 8,
            "info1": 0x100000014,
            "info2": 0xFFFFFFF0,
            "intr_info": 0,
            "error_code": 0,
            "vcpu_id": 2,
            "requests": 16,
        },
    ),
    (
        "kvm_exit",
        "reason EXIT_NPF rip 0xfff0 info 100000014 fffffff0",
        {"exit_reason": 0x400, "isa": 2, "guest_rip": 0xFFF0, "info1": 0x100000014, "info2": 0xFFFFFFF0},
    ),
    (
        "kvm_exit",
        (
            "exit_reason=1 guest_rip=0xfff0 isa=2 info1=0x0000000000000010 info2=0x0 intr_info=0x0 "
            "error_code=0x0 vcpu_id=3"
        ),
        {
            "exit_reason": 1,
            "isa": 2,
            "guest_rip": 0xFFF0,
            "info1": 16,
            "info2": 0,
            "intr_info": 0,
            "error_code": 0,
            "vcpu_id": 3,
        },
    ),
    ("kvm_userspace_exit", "reason KVM_EXIT_IO (2)", {"reason": 2, "errno": 0}),
    ("kvm_userspace_exit", "reason restart (4)", {"reason": 0, "errno": -4}),
    ("kvm_userspace_exit", "reason=0 errno=-4", {"reason": 0, "errno": -4}),
    (
        "kvm_pio",
        "pio_write at 0x3f8 size 1 count 2 val 0x1f (...)",
        {"rw": 1, "port": 0x3F8, "size": 1, "count": 2, "val": 31},
    ),
    (
        "kvm_mmio",
        "mmio unsatisfied-read len 4 gpa 0xfee00000 val 0x0",
        {"type": 0, "len": 4, "gpa": 0xFEE00000, "val": 0},
    ),
    (
        "kvm_msr",
        "msr_write 277 = 0x7040600070406 (#GP)",
        {"write": 1, "ecx": 0x277, "data": 0x7040600070406, "exception": 1},
    ),
    ("kvm_msr", "write=0 ecx=fe data=0x508 exception=0", {"write": 0, "ecx": 0xFE, "data": 0x508, "exception": 0}),
    ("kvm_cr", "cr_read 8 = 0x5", {"rw": 0, "cr": 8, "val": 5}),
    (
        "kvm_cpuid",
        "func d idx 1 rax f rbx 0 rcx 0 rdx ffffffff, cpuid entry not found, used max basic",
        {"function": 13, "index": 1, "rax": 15, "rbx": 0, "rcx": 0, "rdx": 0xFFFFFFFF, "found": 0, "used_max_basic": 1},
    ),
    ("kvm_inj_virq", "IRQ 0xec [reinjected]", {"soft": 0, "vector": 0xEC, "reinjected": 1}),
    ("kvm_inj_virq", "irq 236", {"vector": 236}),
    (
        "kvm_inj_exception",
        "#GP (0x8) [reinjected]",
        {"exception": 13, "error_code": 8, "reinjected": 1, "has_error": 1},
    ),
    ("kvm_inj_exception", "#UD", {"exception": 6, "reinjected": 0, "has_error": 0}),
    (
        "kvm_inj_exception",
        "[FAILED TO PARSE] exception=13 has_error=1 error_code=0 reinjected=0",
        {"exception": 13, "has_error": 1, "error_code": 0, "reinjected": 0},
    ),
    (
        "kvm_page_fault",
        "vcpu 0 rip 0x1 address 0x00000000fffffff0 error_code 0x100000014",
        {"vcpu_id": 0, "guest_rip": 1, "fault_address": 0xFFFFFFF0, "error_code": 0x100000014},
    ),
    ("kvm_page_fault", "address fee00000 error_code 14", {"fault_address": 0xFEE00000, "error_code": 0x14}),
    ("kvm_apic", "apic_write APIC_TMICT = 0x10", {"rw": 1, "reg": 0x380, "val": 16}),
    ("kvm_apic_accept_irq", "apicid 1 vec 243 (INIT|edge)", {"apicid": 1, "vec": 243, "dm": 0x500, "tm": 0}),
    ("kvm_eoi", "apicid a vector 48", {"apicid": 10, "vector": 48}),
    ("kvm_vcpu_wakeup", "poll time 2000 ns, polling invalid", {"waited": 0, "ns": 2000, "valid": 0}),
    ("kvm_halt_poll_ns", "vcpu 0: halt_poll_ns 10000 (grow 0)", {"vcpu_id": 0, "new": 10000, "grow": 1, "old": 0}),
    (
        "sched_switch",
        "prev_comm=a b=c prev_pid=1 prev_prio=120 prev_state=R+ ==> next_comm=x next_pid=2 next_prio=9",
        {
            "prev_comm": b"a b=c",
            "prev_pid": 1,
            "prev_prio": 120,
            "prev_state": 256,
            "next_comm": b"x",
            "next_pid": 2,
            "next_prio": 9,
        },
    ),
    (
        "sched_switch",
        "swapper/1:0 [120] R ==> trace-cmd:309 [120]",
        {
            "prev_comm": b"swapper/1",
            "prev_pid": 0,
            "prev_prio": 120,
            "next_comm": b"trace-cmd",
            "next_pid": 309,
            "next_prio": 120,
        },
    ),
    (
        "sched_migrate_task",
        "comm=my task pid=2 prio=120 orig_cpu=0 dest_cpu=1",
        {"comm": b"my task", "pid": 2, "prio": 120, "orig_cpu": 0, "dest_cpu": 1},
    ),
    (
        "kvm_vcpu_ioctl",
        "(kvm_vcpu_ioctl+0x0/0x960 [kvm]) filp=0xffff888100 cmd=0xae80 arg=0x0",
        {"filp": 0xFFFF888100, "cmd": 0xAE80, "arg": 0},
    ),
    ("kvm_something_new", "free text 5", {"text": b"free text 5"}),
    # older kernels
    ("kvm_entry", "vcpu 0, rip 0x1[immediate exit]", {"vcpu_id": 0, "rip": 1, "immediate_exit": 1}),
    ("kvm_hypercall", "nr 0x5 a0 0x1 a1 0x2 a2 0x3  a3 0x4", {"nr": 5, "a0": 1, "a1": 2, "a2": 3, "a3": 4}),
    ("kvm_cpuid", "func 1 rax 663 rbx 800 rcx 8 rdx 78",
     {"function": 1, "rax": 0x663, "rbx": 0x800, "rcx": 8, "rdx": 0x78}),
    ("kvm_cpuid", "func 1 rax 663 rbx 800 rcx 8 rdx 78, cpuid entry not found",
     {"function": 1, "rax": 0x663, "rbx": 0x800, "rcx": 8, "rdx": 0x78, "found": 0}),
    ("kvm_vcpu_wakeup", "wait time 2345 ns", {"waited": 1, "ns": 2345}),
    ("kvm_eoi", "apicid 0 vector -1", {"apicid": 0, "vector": -1}),
    ("kvm_nested_vmexit",
     ("rip: 0x0000000000001000 reason: npf ext_inf1: 0x0000000100000014 ext_inf2: 0x00000000000f0000 "
      "ext_int: 0x00000000 ext_int_err: 0x00000000"),
     {"guest_rip": 0x1000, "exit_reason": 0x400, "isa": 2, "info1": 0x100000014, "info2": 0xF0000, "intr_info": 0,
      "error_code": 0}),
]
# fmt: on


@pytest.mark.parametrize(("name", "body", "want"), BODIES, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BODIES)])
def test_fields_of_a_text(open_text, name, body, want):
    assert fields(open_text(line(f"{name}: {body}")), name) == want


def test_instruction_bytes(open_text):
    got = fields(open_text(line("kvm_emulate_insn: f0000:ec2f:0f 20 c1 (prot32) failed")), "kvm_emulate_insn")
    assert bytes(got.pop("insn")) == b"\x0f\x20\xc1".ljust(15, b"\0")
    assert got == {"csbase": 0xF0000, "rip": 0xEC2F, "len": 3, "flags": 5, "failed": 1}


def test_system_calls_as_the_kernel_prints_them(open_text):
    enter, leave = line("sys_ioctl(fd: c, cmd: 0xae80, arg: 0)"), line("sys_ioctl -> 0xfffffffffffffffc")
    recording = open_text(enter + "\n" + leave)
    assert fields(recording, "sys_enter_ioctl") == {"fd": 12, "cmd": 0xAE80, "arg": 0}
    assert fields(recording, "sys_exit_ioctl") == {"ret": -4}


def test_probes_and_tracepoints_have_their_systems(open_text):
    names = ("kvm_vcpu_ioctl", "kvm_exit", "sched_wakeup", "odd")
    events = open_text("\n".join(line(f"{n}: x") for n in names)).events()
    assert [k.system for k in events.kinds[:4]] == ["kvmtrace", "kvm", "sched", ""]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("CPU:1 [LOST 4500 EVENTS]", 4500),
        ("CPU:1 [LOST EVENTS]", -1),
        ("CPU:1 [12 EVENTS DROPPED]", 12),
        ("CPU:1 [EVENTS DROPPED]", -1),
    ],
)
def test_lost_events(open_text, text, count):
    recording = open_text("\n".join([line("kvm_fpu: load"), text, line("kvm_fpu: unload", ts="13.5", cpu=1)]))
    events = recording.events()
    assert events.field("lost_events", "count").tolist() == [count]
    assert (events.ts_ns[1], events.cpu[1], events.tid[1]) == (13_500_000_000, 1, -1)
    assert recording.loss.events == (None if count < 0 else count)


def test_a_cut_last_line_is_left_out_and_stated(open_text):
    recording = open_text(line("kvm_fpu: load") + "\n" + line("kvm_pio: pio_write at 0x3f"), end="")
    assert len(recording.events()) == 1
    assert recording.loss.truncated


def test_strange_lines_are_stated(open_text):
    recording = open_text(line("kvm_fpu: load") + "\n!! what is this\n" + line("kvm_fpu: unload"))
    assert recording.events().field("lost_events", "count").tolist() == [-2]  # it may have been an event
    assert len(recording.events()) == 3
    assert [d.found for d in recording.loss.damage] == ["'!! what is this'"]


def test_an_empty_trace_is_a_trace(open_text):
    assert len(open_text(HEAD).events()) == 0


@pytest.mark.parametrize("text", ["hello", "a-1 b: c", "cpus=2", "[000] 1.0: kvm_fpu: load"])
def test_other_texts_are_none(open_text, text):
    with pytest.raises(FormatError):
        open_text(text)


def test_streaming_gives_the_same_rows(open_text):
    text = "\n".join(line("kvm_fpu: load", ts=f"{i}.5") for i in range(100))
    whole, recording = open_text(text).events(), open_text(text)
    tables = list(recording.iter_events(10))
    assert len(tables) > 3
    assert EventTable.concat(tables).ts_ns.tolist() == whole.ts_ns.tolist()


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("CPUID", (1, 10)),
        ("cpuid", (2, 0x72)),
        ("PF excp", (2, 0x4E)),
        ("EXIT_EXCP_UD", (2, 0x46)),
        ("EXIT_IOIO", (2, 0x7B)),
        ("EXIT_INTR", (2, 0x60)),
        ("PENDING_INTERRUPT", (1, 7)),
        ("EPT_VIOLATION FAILED_VMENTRY", (1, 0x80000030)),
        ("UNKNOWN (77)", (0, 77)),
        ("0x4d", (0, 77)),
    ],
)
def test_exit_reasons_by_name(text, want):
    assert exit_reason_number(text) == want


def test_text_that_trace_cmd_failed_to_parse(tmp_path: Path) -> None:
    """Lines with more fields than the first of their kind lose none; a number's ISA is told by other lines."""
    path = tmp_path / "posted.txt"
    path.write_text(
        "cpus=1\n"
        "  qemu-1  [000] 1.000001: kvm_exit: [FAILED TO PARSE] exit_reason=44 guest_rip=0xc01185ed\n"
        "  qemu-1  [000] 1.000002: kvm_exit: [FAILED TO PARSE] exit_reason=30 guest_rip=0xc01185ee isa=1 info1=0x10\n"
        "  qemu-1  [000] 1.000003: kvm_exit: [FAILED TO PARSE] exit_reason=12 guest_rip=0xc01185ef\n"
    )
    table = open_recording(path).events()
    assert table.field("kvm_exit", "guest_rip").tolist() == [0xC01185ED, 0xC01185EE, 0xC01185EF]
    assert table.field("kvm_exit", "exit_reason").tolist() == [44, 30, 12]
    assert table.field("kvm_exit", "isa").tolist() == [1, 1, 1]
    told = table.told("kvm_exit", "info1")
    assert told is not None
    assert told.tolist() == [False, True, False]
