"""Which events a recording gets, and the C that copies each: from the kernel's own format files.

No numpy here; the decoder parses the same texts once more, from the capture.
"""

from __future__ import annotations

import os
import re
from dataclasses import field
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.bpf.compiler import find_tracers
from kvmtrace.capture.run_fields import probes_here
from kvmtrace.errors import CapabilityError
from kvmtrace.isa.registry import recognise
from kvmtrace.kvm.tracepoints import EVENT_SETS, LIFECYCLE, PROBE_SYSTEM
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.capture.bpf.btf_types import Argument

COMMON_BYTES = 8  # common_type, common_flags, common_preempt_count, common_pid
_FIELD = re.compile(r"^\s*field:([^;\n]+);\s*offset:(\d+);\s*size:(\d+);", re.MULTILINE)
_NAME = re.compile(r"(\w+)(?:\[[^\]]*\])?$")
# of VM-exits; the filter "thread" says whose events are recorded at all
FILTERS = ("vcpu", "exit_reason", "sample", "slower_than_ns")
# in a stream filtered by VM-exit, these belong to the thread, not to a VM-exit
UNFILTERED_SYSTEMS = frozenset({"sched", "syscalls", "task"})
_POINTED = re.compile(r"\+(\w+)\((.*)\)")  # what stands so far behind where something points
_PROBE_TYPES = {"x64": ("u64", 8, 0), "x32": ("u32", 4, 0), "s64": ("s64", 8, 1), "s32": ("s32", 4, 1)}


@dataclass(frozen=True)
class TracedEvent:
    """One kind of the capture.

    Parameters
    ----------
    name, system : str
    format_text : str, the tracepoint's format file; for a probe, a text of the same form
    probe : (function, is_return, fields), or None for a tracepoint
    """

    name: str
    system: str
    format_text: str
    probe: tuple[str, bool, tuple[str, ...]] | None = None
    fields: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Return where the last field ends; the kernel lets programs read up to there."""
        return max((offset + size for offset, size in self.fields.values()), default=COMMON_BYTES)

    @property
    def data_bytes(self) -> int:
        """Return the bytes behind our header."""
        return self.end - COMMON_BYTES

    @property
    def tracepoint_id(self) -> int:
        """Return the number that perf_event_open takes."""
        match = re.search(r"^ID:\s*(\d+)", self.format_text, re.MULTILINE)
        assert match is not None
        return int(match[1])


def parse_fields(format_text: str) -> dict[str, tuple[int, int]]:
    """Return field name -> (offset, size) of a format text, common fields left out."""
    fields = {}
    for declaration, offset, size in _FIELD.findall(format_text):
        match = _NAME.search(declaration.strip())
        if match and int(offset) >= COMMON_BYTES:
            fields[match[1]] = (int(offset), int(size))
    return fields


def read_tracepoint(tracefs: Path, system: str, name: str) -> TracedEvent | None:
    """Read a tracepoint's format file; None if the kernel has no such tracepoint."""
    try:
        text = (tracefs / "events" / system / name / "format").read_text()
    except OSError:
        return None
    return TracedEvent(name, system, text, None, parse_fields(text))


def describe_probe(name: str, probe: tuple[str, bool, tuple[str, ...]]) -> TracedEvent:
    """Return the event of a function probe, with a format text as the kernel would write it."""
    lines = [f"name: {name}", "ID: 0", "format:"]
    for slot, text in enumerate(probe[2]):
        key, _, kind = text.partition("=")
        type_name, size, signed = _PROBE_TYPES[kind.partition(":")[2]]
        lines.append(f"\tfield:{type_name} {key};\toffset:{COMMON_BYTES + 8 * slot};\tsize:{size};\tsigned:{signed};")
    text = "\n".join([*lines, "", 'print fmt: ""', ""])
    return TracedEvent(name, PROBE_SYSTEM, text, probe, parse_fields(text))


# with -a these would record every process of the machine, and say little of KVM
NOT_MACHINE_WIDE = frozenset(
    {"sys_enter_openat", "sys_exit_openat", "sys_enter_close", "sys_enter_mmap", "sys_exit_mmap"}
)


def wanted_tracepoints(tracefs: Path, event_set: str, *, targeted: bool) -> tuple[list[TracedEvent], list[str]]:
    """Return the tracepoints of a set that this kernel has, and the names of those it lacks."""
    names = EVENT_SETS[event_set]
    if names is None:
        names = (
            *LIFECYCLE,
            *(
                f"{path.parent.name}:{path.name}"
                for system in ("kvm", "kvmmmu")
                for path in sorted((tracefs / "events" / system).glob("*/"))
            ),
        )
    events, missing = [], []
    for text in dict.fromkeys(names):
        system, _, name = text.partition(":")
        if not targeted and name in NOT_MACHINE_WIDE:
            continue
        event = read_tracepoint(tracefs, system, name)
        if event is None:
            missing.append(text)
        elif event.fields:
            events.append(event)
    return events, missing


def wanted_probes() -> list[TracedEvent]:
    """Return the function probes; which of them attach is found out by attaching."""
    return [describe_probe(name, probe) for name, probe in probes_here().items()]


def _copies(end: int) -> str:
    """Return the macros that copy bytes 8..end of a record, widest first."""
    parts, offset = [], COMMON_BYTES
    for width in (8, 4, 2, 1):
        while end - offset >= width:
            parts.append(f"COPY{width}({offset})")
            offset += width
    return " ".join(parts)


# events whose record is a copy of the tracepoint's arguments, field by field (arch/x86/kvm/trace.h,
# include/trace/events/kvm.h: TP_fast_assign), if arguments of these names and sizes are there
PLAIN_COPIES = frozenset(
    {
        "kvm_ack_irq",
        "kvm_apic",
        "kvm_apic_accept_irq",
        "kvm_apic_ipi",
        "kvm_apicv_accept_irq",
        "kvm_cpuid",
        "kvm_cr",
        "kvm_fast_mmio",
        "kvm_fpu",
        "kvm_halt_poll_ns",
        "kvm_hv_timer_state",
        "kvm_hypercall",
        "kvm_inj_exception",
        "kvm_inj_virq",
        "kvm_ioapic_set_irq",
        "kvm_msi_set_irq",
        "kvm_msr",
        "kvm_pic_set_irq",
        "kvm_ple_window_update",
        "kvm_pml_full",
        "kvm_set_irq",
        "kvm_userspace_exit",
        "kvm_vcpu_wakeup",
        "kvm_wait_lapic_expire",
        "kvm_write_tsc_offset",
        "vcpu_match_mmio",
    }
)


def argument_copies(event: TracedEvent, arguments: dict[str, Argument]) -> str:
    """Return the macros that make an event's record from a raw tracepoint's arguments, "" if they do not suffice."""
    if event.name not in PLAIN_COPIES:
        return ""
    parts = [part.replace("COPY", "CLEAR") for part in _copies(event.end).split(" ")]
    covered = 0
    for name, (offset, size) in event.fields.items():
        argument = arguments.get(name)
        if argument is None or not argument.is_number or argument.size < size or size not in (1, 2, 4, 8):
            return ""
        parts.append(f"SET{size}({offset}, {argument.slot})")
        covered += size
    return " ".join(parts if covered < event.data_bytes else parts[-len(event.fields) :])


def raw_tracepoint_source(event: TracedEvent, kind: int, copies: str) -> str:
    """Return the C line of a raw tracepoint's program, see argument_copies."""
    return f"{_macro(event)}({event.name}_raw, {kind}, {event.data_bytes}, {copies})"


def _macro(event: TracedEvent) -> str:
    if event.name in ("kvm_exit", "kvm_entry", "sched_switch"):
        return event.name.upper()
    return "TRACEPOINT_ALWAYS" if event.system in UNFILTERED_SYSTEMS else "TRACEPOINT"


def _probe_values(event: TracedEvent, *, arguments_are_array: bool, n_arguments: int) -> str:
    assert event.probe is not None
    values = []
    for slot, text in enumerate(event.probe[2]):
        source = text.partition("=")[2].partition(":")[0]
        values.append(f"VALUE({slot}, {_expression(source, n_arguments, arguments_are_array=arguments_are_array)})")
    return " ".join(values)


def _expression(source: str, n_arguments: int, *, arguments_are_array: bool) -> str:
    """Return a fetch argument, "$retval", "$arg1" or "+8($arg1)" as kprobe events write them, in C."""
    if source == "$retval":
        return f"ARRAY_ARG(ctx, {n_arguments})" if arguments_are_array else "REGS_RESULT(ctx)"
    pointed = _POINTED.fullmatch(source)
    if pointed is not None:
        inner = _expression(pointed[2], n_arguments, arguments_are_array=arguments_are_array)
        return f"read_u64({inner} + {pointed[1]})"
    number = int(source.removeprefix("$arg"))
    return f"ARRAY_ARG(ctx, {number - 1})" if arguments_are_array else f"REGS_ARG{number}(ctx)"


# machine -> where its struct pt_regs holds the first arguments, and the result of a function
# (arch/x86/include/asm/ptrace.h; user_pt_regs of arch/arm64/include/uapi/asm/ptrace.h)
_REGISTERS = {"x86_64": ((112, 104, 96, 88), 80), "aarch64": ((0, 8, 16, 24), 0)}


def register_macros(machine: str) -> dict[str, str]:
    """Return how function.h's programs read a probed function's arguments and its result.

    Raises
    ------
    CapabilityError
        Nothing is known of this machine's registers.
    """
    if machine not in _REGISTERS:
        raise CapabilityError(f"the bpf back end does not know the registers of {machine}", "use --backend ftrace")
    arguments, result = _REGISTERS[machine]
    places = {f"ARG{i}": offset for i, offset in enumerate(arguments, 1)} | {"RESULT": result}
    return {f"REGS_{name}(ctx)": f"(*(volatile u64 *)(ctx + {offset}))" for name, offset in places.items()}


# how many arguments a probed function has: where fexit finds the result
N_ARGUMENTS = {"kvm_vcpu_ioctl": 3, "vmx_vcpu_run": 1, "svm_vcpu_run": 1}


def probe_source(event: TracedEvent, kind: int, *, traced: bool) -> str:
    """Return the C line of a function probe, for fentry/fexit (`traced`) or for registers."""
    assert event.probe is not None
    function = event.probe[0]
    macro = "VCPU_RUN" if function.endswith("_vcpu_run") else "FUNCTION"
    values = _probe_values(event, arguments_are_array=traced, n_arguments=N_ARGUMENTS.get(function, 0))
    name = f"{event.name}_traced" if traced else event.name
    own = 0 if traced else 1  # how often the mechanism itself disables preemption, see record.h
    return f"{macro}({own}, {name}, {kind}, {8 * len(event.probe[2])}, {values})"


def extra_condition(event: TracedEvent) -> str:
    """Return a C condition on the tracepoint's record beyond whose it is, "" for none."""
    if event.name == "sys_enter_mmap":  # without a file it is the noise of malloc
        return f"*(volatile u32 *)(ctx + {event.fields['fd'][0]}) < 0x7fffffff"
    return ""


def tracepoint_source(event: TracedEvent, kind: int) -> str:
    """Return the C line of a tracepoint."""
    condition = extra_condition(event)
    if condition:
        return (
            f"RECORD_IF(is_target() && {condition}, 1, {event.name}, {kind}, {event.data_bytes}, {_copies(event.end)})"
        )
    return f"{_macro(event)}({event.name}, {kind}, {event.data_bytes}, {_copies(event.end)})"


def exit_macros(leaving: TracedEvent) -> dict[str, str]:
    """Return how a program reads kvm_exit's record: EXIT_REASON(ctx) and EXIT_ISA(ctx); {} for an unknown kvm_exit."""
    at = {name: f"(*(volatile u32 *)((ctx) + {offset}))" for name, (offset, _) in leaving.fields.items()}
    if {"exit_reason", "isa"} <= at.keys():
        return {"EXIT_REASON(ctx)": at["exit_reason"], "EXIT_ISA(ctx)": at["isa"]}
    isa = recognise(at)
    if isa is None:
        return {}
    parts = isa.derived["kvm_exit", "exit_reason"]
    reason = " | ".join(f"({at[part.field]} & {part.mask & 0xFFFFFFFF:#x}U) << {part.shift}" for part in parts)
    return {"EXIT_REASON(ctx)": f"({reason})", "EXIT_ISA(ctx)": f"{isa.number}U"}


def _vcpu_macros(vcpu: int, leaving: TracedEvent, entering: TracedEvent) -> dict[str, str]:
    """Return the macros of the filter by vCPU.

    Raises
    ------
    CapabilityError
        This KVM's events do not tell the vCPU.
    """
    if "vcpu_id" not in leaving.fields or "vcpu_id" not in entering.fields:
        raise CapabilityError(
            "this KVM's kvm_entry and kvm_exit do not tell the vCPU", "choose its thread: -p PID --thread TID"
        )
    return {
        "EXIT_VCPU_OFFSET": str(leaving.fields["vcpu_id"][0]),
        "ENTRY_VCPU_OFFSET": str(entering.fields["vcpu_id"][0]),
        "FILTER_VCPU": str(vcpu),
    }


def filter_defines(filters: dict[str, Any], events: list[TracedEvent]) -> dict[str, str]:
    """Return the macros that switch the exit filters on, with the offsets they need.

    Raises
    ------
    CapabilityError
        This KVM's events do not tell what a filter goes by.
    """
    by_name = {event.name: event for event in events}
    defines: dict[str, str] = {}
    if not filters.keys() & set(FILTERS) or "kvm_exit" not in by_name or "kvm_entry" not in by_name:
        return defines
    leaving, entering = by_name["kvm_exit"], by_name["kvm_entry"]
    defines |= exit_macros(leaving)
    defines["EXIT_WORDS"] = str((leaving.data_bytes + 7) // 8)
    if "vcpu" in filters:
        defines |= _vcpu_macros(int(filters["vcpu"]), leaving, entering)
    if "exit_reason" in filters:
        # VMX keeps flags above the 16 bits of the basic reason
        tests = " || ".join(
            f"{'((r) & 0xffff)' if int(reason) < 1 << 16 else '(r)'} == {int(reason)}U"
            for reason in filters["exit_reason"]
        )
        defines["FILTER_REASONS(r)"] = f"({tests})"
    if "sample" in filters:
        defines["FILTER_SAMPLE"] = str(int(filters["sample"]))
    if "slower_than_ns" in filters:
        defines["FILTER_SLOWER_NS"] = f"{int(filters['slower_than_ns'])}ULL"
    return defines


def describe_filters(filters: dict[str, Any]) -> dict[str, str]:
    """Return the metadata's `filters`: what was dropped in the kernel, for people."""
    texts = {
        "thread": lambda v: f"only thread {v}",
        "vcpu": lambda v: f"only vCPU {v}",
        "exit_reason": lambda v: "only VM-exits with reason " + ", ".join(str(reason) for reason in v),
        "sample": lambda v: f"1 in {v} VM-exits (per vCPU thread)",
        "slower_than_ns": lambda v: (
            f"only VM-exits that took at least {v} ns until the next VM-entry; what happened between is not recorded"
        ),
    }
    return {name: texts[name](value) for name, value in filters.items() if name in texts}


def build_source(defines: dict[str, str], files: list[str], lines: list[str]) -> str:
    """Return the C source: macros, the named files of tracers/, one line per event."""
    folder = find_tracers()
    if "function.h" in files:
        defines = defines | register_macros(os.uname().machine)
    head = [f"#define {name} {value}" for name, value in defines.items()]
    return "\n".join([*head, *((folder / name).read_text() for name in files), *lines, ""])
