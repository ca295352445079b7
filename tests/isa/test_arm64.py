"""arm64: the rows, the syndrome, and a recording in arm64's own words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from kvmtrace.api import load
from kvmtrace.check.engine import check_recording
from kvmtrace.check.examples import text_trace
from kvmtrace.check.rule_registry import all_rules
from kvmtrace.cli.main import cli
from kvmtrace.formats import open_recording
from kvmtrace.isa.arm64 import ARM64, SYSTEM_REGISTER
from kvmtrace.isa.arm64_words import (
    DataAbort,
    decode_data_abort,
    decode_system_register,
    describe_guest_fault,
    describe_register,
)
from kvmtrace.isa.registry import ISAS, describe_exit_reason, has_never
from kvmtrace.render.text.model_text import cannot_show, unchecked_rules
from kvmtrace.report.build import build_report
from kvmtrace.table.derived import Derived

# ret << 6 | esr_ec
WFX, HVC, SYS, DABT = 0x81, 0x96, 0x98, 0xA4


def test_numbers_and_names() -> None:
    names = {0: "IRQ", 0x40: "SERROR", WFX: "WFx", HVC: "HVC64", SYS: "SYS64", 0xA0: "IABT_LOW", DABT: "DABT_LOW"}
    assert {code: ARM64.names[code] for code in names} == names
    assert describe_exit_reason(128, DABT) == "DABT_LOW"
    assert describe_exit_reason(128, 0x9A) == "ERET"
    assert describe_exit_reason(128, 0x9B) == "UNKNOWN(0x9b)"


def test_data_abort() -> None:
    # str w0, [x1] to an address without memory: ISV, word, w0, write, translation fault at level 1
    abort = decode_data_abort(0x93800045)
    assert abort == DataAbort(
        valid=True, size=4, register=0, sign_extended=False, sixty_four=False, write=True, table_walk=False,
        fault="translation fault, level 1",
    )  # fmt: skip
    assert describe_guest_fault(0x93800045) == "write of a word from w0, translation fault, level 1"
    assert describe_guest_fault(0x92000007) == "translation fault, level 3"


def test_system_register() -> None:
    # mrs x3, id_aa64isar0_el1
    found = decode_system_register(0x62300061 | 6 << 10 & 0)
    assert (found.register, found.write) == (3, False)
    assert found.name == "MIDR_EL1"
    assert decode_system_register(0x623E0061).name == "S3_0_C0_C0_7"


def trace(*texts: str) -> str:
    return "".join(f" vmm-100  [000] ....1 1.{number:06}000: {text}\n" for number, text in enumerate(texts, 1))


ENTRY = "kvm_entry: vcpu_pc={:#x}"
EXIT = "kvm_exit: ret={} esr_ec={:#x} vcpu_pc={:#x}"
FAULT = "kvm_guest_fault: vcpu_pc={:#x} hsr=0x93800045 hxfar=0x9000000 ipa=0x9000000"
HEALTHY = (
    ENTRY.format(0x8), EXIT.format(2, 0x24, 0x8), FAULT.format(0x8), "kvm_mmio: type=2 len=4 gpa=0x9000000 val=42",
    "kvm_userspace_exit: reason=6 errno=0",
    ENTRY.format(0x8), EXIT.format(2, 0x18, 0x10), "kvm_handle_sys_reg: hsr=0x62300061",
    "kvm_sys_access: vcpu_pc=0x10 is_write=0",
    ENTRY.format(0x10), EXIT.format(0, 0, 0x14), ENTRY.format(0x14), EXIT.format(2, 0x1, 0x14),
    "kvm_wfx_arm64: vcpu_pc=0x14 is_wfe=0", ENTRY.format(0x14), EXIT.format(2, 0x16, 0x1C),
    "kvm_hvc_arm64: vcpu_pc=0x1c r0=0x84000000 imm=0", ENTRY.format(0x1C),
)  # fmt: skip


def test_a_recording_is_reported_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "arm64.txt"
    path.write_text(trace(*HEALTHY))
    report = build_report(open_recording(str(path)))
    assert report.capture.isa == "arm64"
    assert {(row.name, row.exit_reason, row.count) for row in report.exits} == {
        ("DABT_LOW", DABT, 1), ("SYS64", SYS, 1), ("IRQ", 0, 1), ("WFx", WFX, 1), ("HVC64", HVC, 1),
    }  # fmt: skip
    assert report.model is not None
    assert report.model.violations == ()
    assert report.model.rules["V4"].checked >= 4
    assert report.model.rules["V6"].checked >= 4


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("kvm_wfx_arm64: vcpu_pc=0x14 is_wfe=0", "sched_switch: prev_pid=100", "V4"),
        ("kvm_handle_sys_reg: hsr=0x62300061", "kvm_hvc_arm64: vcpu_pc=0x10 r0=0 imm=0", "V13"),
        ("kvm_entry: vcpu_pc=0x14\n", "kvm_entry: vcpu_pc=0x18\n", "V6"),
        ("kvm_userspace_exit: reason=6", "kvm_userspace_exit: reason=5", "V7"),
    ],
)
def test_faults_are_found(tmp_path: Path, old: str, new: str, rule: str) -> None:
    path = tmp_path / "faulty.txt"
    text = trace(*HEALTHY, *HEALTHY)
    at = text.rindex(old)
    path.write_text(text[:at] + new + text[at + len(old) :])
    assert rule in {violation.rule for violation in check_recording(open_recording(str(path))).violations}


FAULT_AT = "kvm_guest_fault: vcpu_pc={:#x} hsr={:#x} hxfar={:#x} ipa={:#x}"
ACCESS = "kvm_sys_access: vcpu_pc={:#x} is_write={} name=0 Op0={} Op1={} CRn={} CRm={} Op2={}"
# str w21, [x20]; ldrb w1, [x20]; stp, which the syndrome does not describe; access flag not set; mrs x0, S3_0_C0_C4_0
WRITE, READ, NOT_DESCRIBED, FLAG, MRS = 0x93950047, 0x93010007, 0x92000047, 0x9200000B, 0x62300009
MMIO_WRITE = (
    ENTRY.format(0x8), EXIT.format(2, 0x24, 0x8), FAULT_AT.format(0x8, WRITE, 0x9004, 0x9000),
    "kvm_mmio: type=2 len=4 gpa=0x9004 val=0x13", "kvm_userspace_exit: reason=6 errno=0",
)  # fmt: skip
IN_KERNEL = (
    ENTRY.format(0x8), EXIT.format(2, 0x24, 0x10), FAULT_AT.format(0x10, READ, 0x10000, 0x10000),
    "kvm_mmio: type=0 len=1 gpa=0x10000 val=0x0", "kvm_mmio: type=1 len=1 gpa=0x10000 val=0x7",
)  # fmt: skip
OTHERS = (
    ENTRY.format(0x10), EXIT.format(2, 0x24, 0x14), FAULT_AT.format(0x14, NOT_DESCRIBED, 0x9010, 0x9000),
    "kvm_userspace_exit: reason=28 errno=0",
    ENTRY.format(0x18), EXIT.format(2, 0x24, 0x1C), FAULT_AT.format(0x1C, FLAG, 0x5008, 0x5000),
    "kvm_access_fault: ipa=0x5000",
    ENTRY.format(0x1C), EXIT.format(2, 0x18, 0x20), f"kvm_handle_sys_reg: hsr={MRS:#x}",
    ACCESS.format(0x20, 0, 3, 0, 0, 4, 0),
    ENTRY.format(0x20), EXIT.format(2, 0x1, 0x24), "kvm_wfx_arm64: vcpu_pc=0x24 is_wfe=0",
    ENTRY.format(0x24), EXIT.format(2, 0x16, 0x28), "kvm_hvc_arm64: vcpu_pc=0x28 r0=0x84000000 imm=0",
    ENTRY.format(0x28), EXIT.format(0, 0, 0x2C),
)  # fmt: skip
END = (ENTRY.format(0x8), EXIT.format(0, 0, 0x8))
PAYLOADS = (*MMIO_WRITE, *IN_KERNEL, *OTHERS)


def violated(tmp_path: Path, *texts: str) -> dict[str, str]:
    path = tmp_path / "trace.txt"
    path.write_text(trace(*texts))
    return {one.rule: one.expected for one in check_recording(open_recording(str(path))).violations}


def test_follow_ups_say_what_the_syndrome_says(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(trace(*PAYLOADS))
    verdict = check_recording(open_recording(str(path)))
    assert [(one.rule, one.expected, one.observed) for one in verdict.violations] == []
    assert verdict.rules["V5"].checked >= 20


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("vcpu_pc=0x8 hsr", "vcpu_pc=0xc hsr"),
        (f"hsr={WRITE:#x}", f"hsr={0x82000007:#x}"),  # of an instruction abort
        (f"hsr={WRITE:#x}", f"hsr={WRITE ^ 1 << 6:#x}"),  # a read
        (f"hsr={WRITE:#x}", f"hsr={WRITE ^ 1 << 22:#x}"),  # a doubleword
        (f"hsr={WRITE:#x}", f"hsr={WRITE ^ 1 << 24:#x}"),  # not described
        ("hxfar=0x9004", "hxfar=0x9008"),
        ("len=4 gpa=0x9004", "len=4 gpa=0x8004"),
        ("type=2 len=4", "type=2 len=2"),
        ("reason=28", "reason=6"),
        ("kvm_access_fault: ipa=0x5000", "kvm_access_fault: ipa=0x6000"),
        ("kvm_access_fault: ipa=0x5000", "sched_switch: prev_pid=100"),
        (f"hsr={FLAG:#x}", f"hsr={FLAG ^ 0xC:#x}"),  # a translation fault
        (f"hsr={MRS:#x}", f"hsr={MRS ^ 1 << 30:#x}"),  # of another class
        ("CRm=4 Op2=0", "CRm=4 Op2=1"),
        ("is_write=0 name", "is_write=1 name"),
        ("kvm_sys_access: vcpu_pc=0x20", "kvm_sys_access: vcpu_pc=0x24"),
        ("kvm_wfx_arm64: vcpu_pc=0x24", "kvm_wfx_arm64: vcpu_pc=0x28"),
        ("kvm_hvc_arm64: vcpu_pc=0x28", "kvm_hvc_arm64: vcpu_pc=0x24"),
    ],
)
def test_payloads_that_disagree_are_found(tmp_path: Path, old: str, new: str) -> None:
    texts = [text.replace(old, new, 1) for text in PAYLOADS]
    assert sum(before != after for before, after in zip(PAYLOADS, texts, strict=True)) == 1
    assert "V5" in violated(tmp_path, *PAYLOADS, *texts)


IN_KERNEL_WRITE = (*MMIO_WRITE[:-1],)
BEHIND_IT = (ENTRY.format(0x10), EXIT.format(0, 0, 0x10))
LEFT_FOR_A_READ = (
    *IN_KERNEL[:-1], "kvm_userspace_exit: reason=6 errno=0", "kvm_mmio: type=1 len=1 gpa=0x10000 val=0x7",
)  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ((*IN_KERNEL_WRITE, *END), set()),
        ((*IN_KERNEL_WRITE, IN_KERNEL_WRITE[-1], *END), {"V5"}),
        ((*IN_KERNEL, *END), set()),
        ((*IN_KERNEL, IN_KERNEL[-1], *END), {"V5"}),
        ((*LEFT_FOR_A_READ, *BEHIND_IT), set()),
        ((*LEFT_FOR_A_READ, LEFT_FOR_A_READ[-1], *BEHIND_IT), {"V8"}),
    ],
    ids=["write", "write twice", "read", "read twice", "left", "completed twice"],
)
def test_an_access_is_one(tmp_path: Path, texts: tuple[str, ...], found: set[str]) -> None:
    assert set(violated(tmp_path, *END, *texts)) == found


def behind_healthy(*texts: str) -> tuple[str, ...]:
    """Put what begins with an entry behind the healthy trace, whose guest has come to the same place."""
    return (*HEALTHY, f"kvm_exit: ret=0 esr_ec=0 {texts[0].partition(' ')[2]}", *texts)


def goes_on(pc: int) -> tuple[str, ...]:
    return ENTRY.format(pc), EXIT.format(0, 0, pc), ENTRY.format(pc)


SIGNAL = "kvm_userspace_exit: reason=10 errno=-4"
WAITS = (ENTRY.format(0x20), EXIT.format(2, 0x1, 0x24), "kvm_wfx_arm64: vcpu_pc=0x24 is_wfe=0")
TRAPS = (ENTRY.format(0x20), EXIT.format(2, 0x18, 0x24), f"kvm_handle_sys_reg: hsr={MRS:#x}")


@pytest.mark.parametrize(
    ("texts", "pc", "rule"),
    [
        (WAITS, 0x24, ""),
        (WAITS, 0x28, "V6"),  # the step is carried out after kvm_entry was traced
        ((*WAITS, SIGNAL), 0x28, ""),  # or as KVM_RUN ends
        ((*WAITS, SIGNAL), 0x24, "H5"),
        ((*TRAPS, SIGNAL), 0x28, ""),
        ((*TRAPS, SIGNAL), 0x4200, ""),  # an undefined instruction
        ((*TRAPS, SIGNAL), 0x40, "H5"),
        (MMIO_WRITE, 0x8, ""),
        (MMIO_WRITE, 0xC, "H5"),
        ((*MMIO_WRITE, SIGNAL), 0xC, ""),  # the KVM_RUN that stepped over it was interrupted
        ((*MMIO_WRITE, SIGNAL), 0x8, ""),
    ],
)
def test_where_the_guest_goes_on(tmp_path: Path, texts: tuple[str, ...], pc: int, rule: str) -> None:
    # ioctls were recorded: the VMM set no registers
    called = ["sys_enter_ioctl: fd=0x5 cmd=0xae80 arg=0x0"] if texts[-1].startswith("kvm_userspace_exit") else []
    assert set(violated(tmp_path, *behind_healthy(*texts), *called, *goes_on(pc))) == ({rule} if rule else set())


def test_behind_a_signal_the_vmm_may_have_reset_the_vcpu(tmp_path: Path) -> None:
    """Unless its ioctls were recorded, a reboot of the guest looks like this."""
    assert violated(tmp_path, *behind_healthy(*WAITS, SIGNAL), *goes_on(0x40080000)) == {}


@pytest.mark.parametrize(("function", "rules"), [(0x84000002, set()), (0x84000003, {"V6"})])
def test_a_vcpu_that_was_off_begins_where_it_is_told(tmp_path: Path, function: int, rules: set[str]) -> None:
    call = (ENTRY.format(0x28), EXIT.format(2, 0x16, 0x2C), f"kvm_hvc_arm64: vcpu_pc=0x2c r0={function:#x} imm=0")
    assert set(violated(tmp_path, *behind_healthy(*call), *goes_on(0x8000))) == rules


def test_rules_that_cannot_apply_are_not_called_unchecked(tmp_path: Path) -> None:
    """KVM/arm64 traces no injection: rules about one do not apply, which is said once, and cost no "unknown"."""
    path = tmp_path / "arm64.txt"
    path.write_text(trace(*HEALTHY))
    model = build_report(open_recording(str(path))).model
    assert model is not None
    foreign = {one.rule: one for one in model.not_checked if not one.applies and not one.part}
    assert {"V9", "V10", "J2"} <= foreign.keys()
    assert not {"V4", "V6", "V13"} & foreign.keys()
    assert foreign["J2"].sentence.startswith("J2 does not apply: this architecture has no kvm_inj_virq")
    assert model.rules["J1"].unknown == 0
    assert unchecked_rules(model) == [one.sentence for one in model.not_checked if one.applies and not one.part]
    assert [words for words in cannot_show(model) if "do not apply" in words]


def test_a_rule_that_cannot_apply_cannot_be_required(tmp_path: Path) -> None:
    path = tmp_path / "arm64.txt"
    path.write_text(trace(*HEALTHY))
    done = CliRunner().invoke(cli, ["check", "--require", "V10", str(path)])
    assert done.exit_code == 4
    assert "V10 does not apply: this architecture has no" in done.stderr


def test_what_only_this_isa_lacks_is_not_excused_elsewhere() -> None:
    numbers = {isa.name: isa.number for isa in ISAS}
    assert has_never([numbers["arm64"]], "kvm_exit.info1")
    assert has_never([numbers["arm64"]], "kvm_inj_virq.vector")
    assert not has_never([numbers["arm64"], numbers["svm"]], "kvm_inj_virq")
    assert not has_never([numbers["vmx"]], "kvm_inj_virq")
    assert not has_never([], "kvm_inj_virq")


def test_a_vm_exit_is_explained() -> None:
    fixture = Path(__file__).parents[2] / "fixtures" / "arm64-6.1-lifecycle.dat"
    done = CliRunner().invoke(cli, ["report", str(fixture), "--explain", "5"])
    assert done.exit_code == 0, done.exception
    assert "DABT_LOW" in done.stdout
    assert "kvm_guest_fault" in done.stdout


IRQ_AT = (ENTRY.format(0x8), EXIT.format(0, 0, 0x8))
REFAULT = (ENTRY.format(0x8), EXIT.format(2, 0x24, 0x8), FAULT_AT.format(0x8, 0x92000047, 0x5008, 0x5000))
ANOTHER = (ENTRY.format(0x8), EXIT.format(2, 0x24, 0x8), FAULT_AT.format(0x8, 0x92000047, 0x6008, 0x6000))
LEFT = ("kvm_userspace_exit: reason=10 errno=-4",)


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (REFAULT * 270, {"H3"}),
        ((*REFAULT * 9, *IRQ_AT) * 30, {"H3"}),  # the host's interrupts, at the same instruction, are no progress
        (REFAULT * 200, set()),
        ((*REFAULT, *ANOTHER) * 135, set()),
        ((*REFAULT * 99, ENTRY.format(0x8), EXIT.format(0, 0, 0xC)) * 3, set()),
        ((*REFAULT * 99, *LEFT) * 3, set()),
    ],
    ids=["swallowed", "with interrupts", "not long enough", "two pages", "went on", "left to userspace"],
)
def test_a_fault_that_is_never_handled(tmp_path: Path, texts: tuple[str, ...], found: set[str]) -> None:
    assert set(violated(tmp_path, *texts, *END)) == found


WFI = (ENTRY.format(0x8), EXIT.format(2, 0x1, 0x8), "kvm_wfx_arm64: vcpu_pc=0x8 is_wfe=0")
WFE = (ENTRY.format(0x8), EXIT.format(2, 0x1, 0x8), "kvm_wfx_arm64: vcpu_pc=0x8 is_wfe=1")
WOKEN = "kvm_vcpu_wakeup: ns=900 waited=1 valid=1"


def test_wfi_blocks(tmp_path: Path) -> None:
    assert violated(tmp_path, *WFI, WOKEN, *WFE, *END) == {}
    assert set(violated(tmp_path, *WFI, WOKEN, *WFI, *END)) == {"H7"}


OUT = "sched_switch: prev_comm=vm prev_pid=100 prev_prio=120 prev_state={} next_comm=x next_pid=9 next_prio=120"
SLEEPS, POLLED = OUT.format(1), "kvm_vcpu_wakeup: ns=0 waited=0 valid=1"


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ((*WFI, SLEEPS, WOKEN), set()),
        ((*WFI, SLEEPS, POLLED), {"V4"}),
        ((*WFI, POLLED, SLEEPS), set()),  # stopped by another vCPU's SYSTEM_OFF (kvm_vcpu_sleep), which traces nothing
        ((*WFE, SLEEPS), set()),
        ((*WFI, WOKEN, *WFI, SLEEPS), {"V4", "H7"}),
    ],
    ids=["slept", "slept and polled", "stopped behind it", "stopped behind WFE", "slept for nothing"],
)
def test_sleep_of_a_halted_vcpu(tmp_path: Path, texts: tuple[str, ...], found: set[str]) -> None:
    assert set(violated(tmp_path, *END, *texts, *END)) == found


RISES, FALLS = (f"kvm_timer_update_irq: vcpu_id=0 irq=27 level={level}" for level in (1, 0))
TOLD, TOLD_OF_FALL = (f"vgic_update_irq_pending: vcpu_id=3 irq=27 level={level}" for level in (1, 0))


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        ((RISES, TOLD, FALLS, TOLD_OF_FALL), set()),
        ((RISES, TOLD_OF_FALL), {"V14"}),
        ((RISES, TOLD.replace("irq=27", "irq=26")), {"V14"}),
        ((FALLS, TOLD_OF_FALL, RISES, FALLS, TOLD_OF_FALL), {"V14"}),
        # a VM whose interrupt controller is in userspace has no vGIC; one thread may run such a VM after another
        ((RISES, FALLS), set()),
        ((RISES, TOLD, "kvm_userspace_exit: reason=10 errno=-4", *END, RISES, FALLS), set()),
    ],
    ids=["told", "of another level", "of another interrupt", "not told", "no vGIC", "another VM"],
)
def test_the_gic_is_told_of_the_timers_line(tmp_path: Path, texts: tuple[str, ...], found: set[str]) -> None:
    assert set(violated(tmp_path, *END, TOLD, *texts, *END, *END)) == found


def test_the_exits_handler_is_named(tmp_path: Path) -> None:
    path = tmp_path / "swallowed.txt"
    path.write_text(trace(*REFAULT * 270, *END))
    (found,) = check_recording(open_recording(str(path))).violations
    assert found.source.startswith("kvm_handle_guest_abort (mmu.c)")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "fixtures").glob("arm64*.dat")), ids=lambda path: path.stem
)
def test_nothing_is_missed_that_no_arm64_kernel_has(path: Path) -> None:
    """Rules on what only the other architectures trace do not apply; nobody is sent to record it."""
    lacking = [one for one in check_recording(open_recording(str(path))).not_checked if one.applies and not one.part]
    assert lacking == []


def accesses(guest: str) -> dict[tuple[int, str], int]:
    """Return how often each guest-physical address was accessed or faulted, as the report has it."""
    fixture = Path(__file__).parents[2] / "fixtures" / f"arm64-6.1-{guest}.dat"
    detail = build_report(open_recording(str(fixture))).detail
    return {(row.gpa, row.kind): row.count for row in detail.gpas}


def test_faults_on_memory_are_told_and_mmio_is_none() -> None:
    assert {gpa for gpa, kind in accesses("stage2") if kind == "page fault"} == {0x1000, 0x2000, 0x3000, 0x5000, 0x6000}
    assert accesses("lifecycle") == {
        (0x1000, "page fault"): 1,
        (0x9000, "mmio write"): 19,
        (0x9000, "mmio read"): 17,
        (0xF000, "mmio write"): 1,
    }


def test_frames_have_the_address_of_a_fault() -> None:
    frame = load(Path(__file__).parents[2] / "fixtures" / "arm64-6.1-stage2.dat").vm_exits
    assert frame["name"].tolist() == ["IABT_LOW", "DABT_LOW", "DABT_LOW", "DABT_LOW", "IABT_LOW", "DABT_LOW"]
    assert frame["gpa"].tolist() == [0x1000, 0x2000, 0x3000, 0x5000, 0x6000, 0xF000]


def test_trapped_debug_registers_are_explained(tmp_path: Path) -> None:
    """Their event alone has no kvm_ in its name (trace_handle_exit.h)."""
    path = tmp_path / "trace.txt"
    trap = (*END, ENTRY.format(0x20), EXIT.format(2, 0x18, 0x20), f"kvm_handle_sys_reg: hsr={MRS:#x}")
    path.write_text(trace(*trap, "trap_reg: trap_debug_regs write reg 0 (0x0)", ENTRY.format(0x20)))
    assert check_recording(open_recording(str(path))).unexplained == {}


FIXTURES = Path(__file__).parents[2] / "fixtures"


def test_what_an_exit_was_about_is_told_by_frames() -> None:
    """The syndrome as a number and in words, the system register, the function that HVC called."""
    exits = load(FIXTURES / "arm64-6.1-lifecycle.dat").vm_exits
    registers = exits[exits.name == "SYS64"]
    assert registers.groupby(["register", "access"], observed=True).size().to_dict() == {
        ("ID_AA64PFR0_EL1", "read"): 11,
        ("OSLAR_EL1", "write"): 7,
    }
    assert set(registers.cause) == {"read of ID_AA64PFR0_EL1 to x0", "write of OSLAR_EL1 from xzr"}
    aborts = exits[exits.name == "DABT_LOW"]
    assert (aborts.syndrome // (1 << 26) == 0x24).all()
    assert aborts.cause.iloc[0].startswith("write of a word from w")
    assert set(exits[exits.name == "HVC64"].hypercall) == {0x84000000}
    assert exits[exits.name == "IRQ"][["register", "hypercall", "syndrome", "cause"]].isna().all().all()


def test_what_an_exit_was_about_is_told_by_the_report() -> None:
    report = build_report(open_recording(FIXTURES / "arm64-6.1-lifecycle.dat"))
    rows = {(row.name, row.direction): (row.count, row.register) for row in report.detail.sysregs}
    assert rows == {("ID_AA64PFR0_EL1", "read"): (11, 0x180400), ("OSLAR_EL1", "write"): (7, 0x101080)}
    assert [(row.interface, row.name, row.count) for row in report.detail.hypercalls] == [("smccc", "PSCI_VERSION", 13)]
    assert any(row.total_ns for row in report.detail.sysregs)


def test_what_an_exit_was_about_in_words() -> None:
    path = str(FIXTURES / "arm64-6.1-lifecycle.dat")
    by_register = CliRunner().invoke(cli, ["report", path, "--by", "sysreg"], env={"COLUMNS": "80"}).output
    assert "ID_AA64PFR0_EL1  read      11" in by_register
    story = CliRunner().invoke(cli, ["report", path, "--explain", "52"], env={"COLUMNS": "120"}).output
    assert story.startswith("The guest read ID_AA64PFR0_EL1; KVM served it")
    assert "hsr 0x62300009 (read of ID_AA64PFR0_EL1 to x0)" in story
    assert "r0 0x84000000 (PSCI_VERSION)" in story


def test_a_part_may_lie_above_and_below() -> None:
    """sys_reg() of the kernel: Op0, Op1, CRn, CRm, Op2 from bit 19 downwards."""
    register = Derived(SYSTEM_REGISTER)
    is_read = Derived(ARM64.derived["kvm_handle_sys_reg", "is_read"])
    syndromes = np.array([0x62300009, 0x622807E0 | 1 << 1], np.uint64)
    assert describe_register(int(register.column(lambda _: syndromes, 2)[0])) == "ID_AA64PFR0_EL1"
    assert is_read.column(lambda _: syndromes, 2).tolist() == [1, 0]


def test_a_violation_names_arm64s_own_functions(tmp_path: Path) -> None:
    path = tmp_path / "wrong.txt"
    wrong = [line.replace("gpa=0x9000000", "gpa=0x9000008") for line in HEALTHY]
    path.write_text(trace(*wrong))
    verdict = check_recording(open_recording(str(path)))
    assert verdict.violations
    sources = " ".join(violation.source for violation in verdict.violations)
    assert "io_mem_abort (mmio.c)" in sources
    assert not {"vmx/", "svm/", "x86.c"} & set(sources.replace(")", " ").replace("(", " ").split())
    assert "vmx/vmx.c" not in sources


def test_the_model_of_arm64_has_no_rule_on_what_x86_alone_traces() -> None:
    told = CliRunner().invoke(cli, ["model", "--isa", "arm64"]).output
    rules = told[told.index("\nRules\n") :]
    assert "  V8   pending I/O is completed" in rules
    assert "kvm_handle_mmio_return, io_mem_abort (mmio.c)" in rules
    assert "  V9   " not in rules
    assert "V9, V10, V11" in rules
    every = CliRunner().invoke(cli, ["model"]).output
    assert "do not apply" not in every[every.index("\nRules\n") :]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_story_is_as_wide_as_the_terminal(width: int) -> None:
    path = str(FIXTURES / "arm64-6.1-smp.dat")
    story = CliRunner().invoke(cli, ["report", path, "--explain", "5"], env={"COLUMNS": str(width)}).output
    assert max(map(len, story.splitlines())) <= width


def test_a_rule_that_does_not_apply_has_no_blind_spots() -> None:
    verdict = check_recording(open_recording(FIXTURES / "arm64-6.1-smp.dat"))
    foreign = {one.rule for one in verdict.not_checked if not one.applies and not one.part}
    assert {"V15", "S2"} <= foreign
    told = {words.partition(" ")[0] for words in verdict.cannot_see}
    assert "V14" in told
    assert not told & foreign


def test_a_wake_up_stands_behind_the_adapted_polling(tmp_path: Path) -> None:
    """The order is kvm_vcpu_halt's, on every architecture."""
    lines = all_rules()["V4"].healthy.strip().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("kvm_halt_poll_ns"))
    swapped = [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]]
    path = tmp_path / "halted.txt"
    verdicts = []
    for one in (lines, swapped):
        path.write_text(text_trace("\n".join(one)))
        verdicts.append(check_recording(open_recording(str(path))))
    assert [verdict.rules["V4"].violated for verdict in verdicts] == [0, 1]
    assert verdicts[1].violations[0].expected == "kvm_vcpu_wakeup behind kvm_halt_poll_ns"
