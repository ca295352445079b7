"""How KVM events look as text: the kernel's print formats and trace-cmd's, as patterns whose groups are fields.

A group's text becomes a number by `WORDS` (words), `BARE_HEX` (hexadecimal without 0x) or as it is written.

Sources: arch/x86/kvm/trace.h and include/trace/events/kvm.h of 5.10 to 6.12; include/trace/events/sched.h;
trace-cmd's kvm plug-in, by its output
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.formats.ftrace_text.interrupt_text import INTERRUPT_PATTERNS
from kvmtrace.isa.arm64_text import ARM64_PATTERNS, ARM64_WORDS
from kvmtrace.isa.shared import NESTED_STRUCTURE, NESTED_STRUCTURES
from kvmtrace.kvm.apic import APIC_REGISTERS, DELIVERY_MODES
from kvmtrace.kvm.vectors import EXCEPTION_NAMES

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_X = r"0x[0-9a-fA-F]+"
_H = r"[0-9a-fA-F]+"


def _compile(*patterns: str) -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(p) for p in patterns)


# kvm_exit, the fullest first: of 5.16, 5.10, 4.18 and 2.6.38 (and trace-cmd's plug-in), and whatever tells a reason
# at all, with those of the other fields that people left. A reason is of a few words, so that a line is not gone
# through more than once for each pattern.
# fmt: off
_REASON = r"reason (?P<exit_reason>\S{1,60}(?: (?!rip\b|info|intr_info\b|error_code\b|requests\b)\S{1,60}){0,3})"
EXIT_PATTERNS = _compile(
    rf"(?:vcpu (?P<vcpu_id>\d+) )?{_REASON} rip (?P<guest_rip>{_X}) info1 (?P<info1>{_X}) info2 (?P<info2>{_X}) "
    rf"intr_info (?P<intr_info>{_X}) error_code (?P<error_code>{_X})(?: requests (?P<requests>{_X}))?",
    rf"(?:vcpu (?P<vcpu_id>\d+) )?{_REASON} rip (?P<guest_rip>{_X}) info (?P<info1_hex>{_H}) (?P<info2_hex>{_H})",
    rf"(?:vcpu (?P<vcpu_id>\d+) )?{_REASON}(?: rip (?P<guest_rip>{_X}))?(?: info1 (?P<info1>{_X}))?"
    rf"(?: info2 (?P<info2>{_X}))?(?: intr_info (?P<intr_info>{_X}))?(?: error_code (?P<error_code>{_X}))?"
    rf"(?: requests (?P<requests>{_X}))?")
# fmt: on
# event -> patterns, the kernel's newest first; matched from the first character of the event's text
# fmt: off
PATTERNS: dict[str, tuple[re.Pattern[str], ...]] = {
    "kvm_entry": _compile(
        rf"vcpu (?P<vcpu_id>\d+),? rip (?P<rip>{_X}) intr_info (?P<intr_info>{_X}) error_code (?P<error_code>{_X})"
        rf"(?P<immediate_exit> ?\[immediate exit\])?",
        rf"vcpu (?P<vcpu_id>\d+),? rip (?P<rip>{_X})(?P<immediate_exit> ?\[immediate exit\])?",
        r"vcpu (?P<vcpu_id>\d+)"),  # before 5.7
    "kvm_exit": EXIT_PATTERNS,
    "kvm_nested_vmexit": (
        *EXIT_PATTERNS,
        *_compile(rf"(?:rip:? (?P<guest_rip>{_X}) )?reason: (?P<exit_reason>.{{1,80}}?) ext_inf1: (?P<info1>{_X}) "
                  rf"ext_inf2: (?P<info2>{_X}) ext_int: (?P<intr_info>{_X}) ext_int_err: (?P<error_code>{_X})",
                  rf"rip (?P<guest_rip_hex>{_H}) reason (?P<exit_reason>.{{1,80}}?) info1 (?P<info1_hex>{_H}) "
                  rf"info2 (?P<info2_hex>{_H}) int_info (?P<intr_info_hex>{_H}) "
                  rf"int_info_err (?P<error_code_hex>{_H})")),
    # the kernel, and trace-cmd's plug-in
    "kvm_nested_vmexit_inject": _compile(
        rf"reason: (?P<exit_code>.{{1,80}}?) ext_inf1: (?P<exit_info1>{_X}) ext_inf2: (?P<exit_info2>{_X}) "
        rf"ext_int: (?P<exit_int_info>{_X}) ext_int_err: (?P<exit_int_info_err>{_X})",
        rf"reason (?P<exit_code>\S{{1,60}}(?: (?!info1)\S{{1,60}}){{0,3}}) info1 (?P<exit_info1_hex>{_H}) "
        rf"info2 (?P<exit_info2_hex>{_H}) int_info (?P<exit_int_info_hex>{_H}) "
        rf"int_info_err (?P<exit_int_info_err_hex>{_H})"),
    **dict.fromkeys(("kvm_nested_vmenter", "kvm_nested_vmrun"), _compile(
        rf"rip: (?P<rip>{_X}) (?P<isa>\w+): (?P<{NESTED_STRUCTURE}>{_X}) (?:nested_rip|nrip): (?P<nested_rip>{_X}) "
        rf"int_ctl: (?P<int_ctl>{_X}) event_inj: (?P<event_inj>{_X})"
        rf"(?: \w+=(?P<tdp_enabled>[yn]) \w+: (?P<guest_pgd>{_X}))?")),
    "kvm_nested_intercepts": _compile(
        rf"cr_read: (?P<cr_read_hex>{_H}) cr_write: (?P<cr_write_hex>{_H}) excp: (?P<exceptions_hex>{_H}) "
        rf"intercepts: (?P<intercept1_hex>{_H}) (?P<intercept2_hex>{_H}) (?P<intercept3_hex>{_H})"),
    "kvm_nested_intr_vmexit": _compile(rf"rip: (?P<rip>{_X})"),
    "kvm_userspace_exit": _compile(r"reason (?P<outcome>\S+) \((?P<number>-?\d+)\)"),
    "kvm_pio": _compile(rf"pio_(?P<rw>read|write) {{1,2}}at (?P<port>{_X}) size (?P<size>\d+)(?: count (?P<count>\d+))?"
                        rf"(?: val (?P<val>{_X}))?"),
    "kvm_mmio": _compile(rf"mmio (?P<type>unsatisfied-read|read|write) len (?P<len>\d+) gpa (?P<gpa>{_X})"
                         rf" val (?P<val>{_X})"),
    "kvm_fast_mmio": _compile(rf"fast mmio at gpa (?P<gpa>{_X})"),
    "kvm_msr": _compile(rf"msr_(?P<write>read|write) (?P<ecx>{_H}) = (?P<data>{_X})(?P<exception> \(#GP\))?"),
    "kvm_cr": _compile(rf"cr_(?P<rw>read|write) (?P<cr>{_H}) = (?P<val>{_X})"),
    "kvm_cpuid": _compile(
        rf"func (?P<function>{_H}) idx (?P<index>{_H}) rax (?P<rax>{_H}) rbx (?P<rbx>{_H}) rcx (?P<rcx>{_H}) "
        rf"rdx (?P<rdx>{_H}), cpuid entry (?P<found>found|not found)(?P<used_max_basic>, used max basic)?",
        rf"func (?P<function>{_H}) rax (?P<rax>{_H}) rbx (?P<rbx>{_H}) rcx (?P<rcx>{_H}) rdx (?P<rdx>{_H})"
        r"(?:, cpuid entry (?P<found>found|not found))?"),  # before 5.6; before 4.12 no entry
    "kvm_fpu": _compile(r"(?P<load>load|unload)$"),
    "kvm_inj_virq": _compile(rf"(?P<soft>IRQ|Soft/INTn) (?P<vector>{_X})(?P<reinjected> \[reinjected\])?",
                             r"irq (?P<vector>\d+)"),
    "kvm_inj_exception": _compile(
        rf"(?P<exception>#[A-Z]+|NMI|{_X})(?: \((?P<error_code>{_X})\))?(?P<reinjected> \[reinjected\])?"),
    "kvm_page_fault": _compile(
        rf"vcpu (?P<vcpu_id>\d+) rip (?P<guest_rip>{_X}) address (?P<fault_address>{_X}) "
        rf"error_code (?P<error_code>{_X})",
        rf"address (?P<fault_address_hex>{_H}) error_code (?P<error_code_hex>{_H})"),
    "kvm_eoi": _compile(rf"apicid (?P<apicid>{_H}) vector (?P<vector>-?\d+)"),
    "kvm_pv_eoi": _compile(rf"apicid (?P<apicid>{_H}) vector (?P<vector>-?\d+)"),
    "kvm_apic_accept_irq": _compile(
        rf"apicid (?P<apicid>{_H}) vec (?P<vec>\d+) \((?P<dm>\w+)\|(?P<tm>edge|level)\)"),
    "kvm_apic": _compile(rf"apic_(?P<rw>read|write) (?P<reg>\S+) = (?P<val>{_X})"),
    "kvm_set_irq": _compile(r"gsi (?P<gsi>\d+) level (?P<level>\d+) source (?P<irq_source_id>\d+)"),
    "kvm_halt_poll_ns": _compile(
        r"vcpu (?P<vcpu_id>\d+): halt_poll_ns (?P<new>\d+) \((?P<grow>grow|shrink) (?P<old>\d+)\)"),
    "kvm_vcpu_wakeup": _compile(
        r"(?P<waited>wait|poll) time (?P<ns>-?\d+) ns(?:, polling (?P<valid>valid|invalid))?"),
    "kvm_wait_lapic_expire": _compile(r"vcpu (?P<vcpu_id>\d+): delta (?P<delta>-?\d+)"),
    "kvm_hypercall": _compile(rf"nr (?P<nr>{_X}) a0 (?P<a0>{_X}) a1 (?P<a1>{_X}) a2 (?P<a2>{_X}) {{1,2}}"
                              rf"a3 (?P<a3>{_X})"),
    "kvm_smm_transition": _compile(
        rf"vcpu (?P<vcpu_id>\d+): (?P<entering>entering|leaving) SMM, smbase (?P<smbase>{_X})"),
    # trace-cmd's plug-in prints no mode, and FAIL; no bytes: the instruction could not be fetched
    "kvm_emulate_insn": _compile(
        rf"(?P<csbase>{_H}):(?P<rip>{_H}): ?(?P<insn>(?:[0-9a-f]{{2}}(?: |$)){{0,15}})(?:\((?P<flags>\w+)\))?"
        rf"(?P<failed> ?(?:failed|FAIL))?$",
        rf"(?P<csbase>{_H}):(?P<rip>{_H}):"),  # a disassembler's words

    "sched_switch": _compile(
        r"prev_comm=(?P<prev_comm>.{0,64}?) prev_pid=(?P<prev_pid>\d+) prev_prio=(?P<prev_prio>-?\d+) "
        r"prev_state=(?P<prev_state>\S+) (?:==> )?next_comm=(?P<next_comm>.{0,64}?) next_pid=(?P<next_pid>\d+) "
        r"next_prio=(?P<next_prio>-?\d+)",
        # trace-cmd's letters of prev_state are not the kernel's: not read
        r"(?P<prev_comm>.{0,64}?):(?P<prev_pid>\d+) \[(?P<prev_prio>-?\d+)\] \S+ ==> "
        r"(?P<next_comm>.{0,64}?):(?P<next_pid>\d+) \[(?P<next_prio>-?\d+)\]"),
    "sys_enter_ioctl": _compile(rf"fd: (?P<fd_hex>{_X}|{_H}), cmd: (?P<cmd_hex>{_X}|{_H}), "
                                rf"arg: (?P<arg_hex>{_X}|{_H})"),
    "sys_exit_ioctl": _compile(rf"(?P<ret>{_X}|-?\d+)"),
    "kvm_ack_irq": _compile(r"irqchip (?P<irqchip>PIC master|PIC slave|IOAPIC|\d+) pin (?P<pin>\d+)"),
    **INTERRUPT_PATTERNS,
}
for _event, _own in ARM64_PATTERNS.items():
    PATTERNS[_event] = PATTERNS.get(_event, ()) + _compile(*_own)

# fields that -R and the kernel print in hexadecimal without 0x
BARE_HEX: dict[str, frozenset[str]] = {
    "kvm_msr": frozenset({"ecx"}), "kvm_cr": frozenset({"cr"}), "kvm_eoi": frozenset({"apicid"}),
    "kvm_cpuid": frozenset({"function", "index", "rax", "rbx", "rcx", "rdx"}),
    "kvm_pv_eoi": frozenset({"apicid"}), "kvm_apic_accept_irq": frozenset({"apicid"}),
    "kvm_apic_ipi": frozenset({"dest_id"}), "kvm_emulate_insn": frozenset({"rip", "csbase"}),
    "kvm_inj_exception": frozenset({"error_code"}),
    "kvm_nested_intercepts": frozenset({"cr_read", "cr_write", "exceptions", "intercept1", "intercept2",
                                        "intercept3"}),
}
# fmt: on

# fields that -R prints cut to eight bits, as the print format casts them
CUT_BY_TRACE_CMD = frozenset({("kvm_apic_ipi", "icr_low"), ("kvm_ioapic_set_irq", "e")})

_DIRECTION = {"read": 0, "write": 1}
_REGISTERS = {name: number for number, name in APIC_REGISTERS.items()}
# field -> word -> number; a group that is absent counts as ""
# fmt: off
WORDS: dict[str, dict[str, int]] = {
    "rw": _DIRECTION, "write": _DIRECTION, "type": {"unsatisfied-read": 0, "read": 1, "write": 2},
    "load": {"load": 1, "unload": 0}, "soft": {"IRQ": 0, "Soft/INTn": 1}, "tm": {"edge": 0, "level": 1},
    "found": {"found": 1, "not found": 0}, "grow": {"grow": 1, "shrink": 0},
    "waited": {"wait": 1, "poll": 0}, "valid": {"valid": 1, "invalid": 0},
    "entering": {"entering": 1, "leaving": 0}, "isa": NESTED_STRUCTURES, "tdp_enabled": {"y": 1, "n": 0},
    "failed": {"": 0, **dict.fromkeys((" failed", "failed", " FAIL", "FAIL"), 1)},
    "reinjected": {"": 0, " [reinjected]": 1}, "used_max_basic": {"": 0, ", used max basic": 1},
    "exception": {"": 0, " (#GP)": 1, **{name: number for number, name in EXCEPTION_NAMES.items()}},
    "immediate_exit": {"": 0, " [immediate exit]": 1, "[immediate exit]": 1},
    "dm": {name: number << 8 for number, name in DELIVERY_MODES.items()}, "reg": _REGISTERS,
    "flags": {"real": 0, "vm16": 3, "prot16": 1, "prot32": 5, "prot64": 9},
    "irqchip": {"PIC master": 0, "PIC slave": 1, "IOAPIC": 2},
}
# fmt: on
# prev_state: the letters of TASK_STATE_TO_CHAR_STR, with + where the thread was preempted
_STATES = {"R": 0, "S": 1, "D": 2, "T": 4, "t": 8, "X": 16, "Z": 32, "P": 64, "I": 128}
WORDS |= ARM64_WORDS
WORDS["prev_state"] = _STATES | {f"{letter}+": value | 256 for letter, value in _STATES.items()}

STRINGS = frozenset({"comm", "prev_comm", "next_comm", "parent_comm", "child_comm", "oldcomm", "newcomm"})

_I32, _I64, _U32, _U8 = (np.dtype(t) for t in (np.int32, np.int64, np.uint32, np.uint8))
# dtypes as the kernel's formats have them; of other fields uint64
# fmt: off
DTYPES: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("errno", "vector", "prev_pid", "next_pid", "prev_prio", "next_prio", "pid", "prio", "child_pid",
                     "parent_pid", "orig_cpu", "dest_cpu", "level", "irq_source_id"), _I32),
    **dict.fromkeys(("ret", "ns", "delta", "prev_state"), _I64),
    **dict.fromkeys(("exit_reason", "reason", "vcpu_id", "isa", "intr_info", "error_code", "type", "len", "rw", "size",
                     "count", "write", "load", "ecx", "apicid", "exit_code", "exit_int_info", "exit_int_info_err",
                     "int_ctl", "event_inj", "exceptions", "intercept1", "intercept2", "intercept3"), _U32),
    **dict.fromkeys(("cr_read", "cr_write"), np.dtype(np.uint16)),
    **dict.fromkeys(("soft", "reinjected", "exception", "immediate_exit", "has_error", "failed", "flags",
                     "tdp_enabled"), _U8),
}
DTYPE_OF_EVENT: dict[tuple[str, str], np.dtype[Any]] = {
    ("kvm_page_fault", "error_code"): np.dtype(np.uint64), ("kvm_inj_virq", "vector"): _U32,
    ("kvm_emulate_insn", "len"): _U8, ("kvm_pvclock_update", "tsc_shift"): np.dtype(np.int8),
}
# fmt: on


def parse_number(text: str, *, bare_hex: bool) -> int:
    """Return the number that a text is; 0 where it is none."""
    try:
        return int(text, 16 if bare_hex else 0)
    except ValueError:
        try:
            return int(text, 10)  # leading zeros
        except ValueError:
            return 0


def number_reader(event: str, field: str) -> Callable[[str], int]:
    """Return what turns the text of a field into a number."""
    words = WORDS.get(field, {})
    bare = field in BARE_HEX.get(event, ())
    return lambda text: words[text] if text in words else parse_number(text, bare_hex=bare)
