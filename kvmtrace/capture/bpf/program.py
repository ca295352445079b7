"""From settings to running programs: select events, compile, load, attach."""

from __future__ import annotations

import os
import struct
from dataclasses import field
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.bpf import btf_ids as bpf_btf
from kvmtrace.capture.bpf import event_programs as bpf_events
from kvmtrace.capture.bpf.attach import Attachments
from kvmtrace.capture.bpf.bpf_syscall import (
    MAP_TYPE_HASH,
    PROG_TYPE_TRACEPOINT,
    create_map,
    load_program,
)
from kvmtrace.capture.bpf.btf_types import kernel_types
from kvmtrace.capture.bpf.compiler import compile_cached, relocate
from kvmtrace.capture.elf_symbols import find_functions
from kvmtrace.capture.tracefs import lockdown_mode
from kvmtrace.errors import CapabilityError
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from kvmtrace.capture.bpf.event_programs import TracedEvent
    from kvmtrace.capture.bpf.ring import Rings
    from kvmtrace.capture.bpf.uprobes import UserProbe

MAX_TIDS = 16384
STREAM_FILES = [
    "target.h",
    "record.h",
    "tracepoint.c",
    "kvm_exit.c",
    "sched_switch.c",
    "function.h",
    "kvm_vcpu_ioctl.c",
    "vcpu_run.c",
    "user_function.c",
]
# in the source, instead of what is known only when the programs are loaded
PLACEHOLDERS = {
    name: 0x7E570000 + i
    for i, name in enumerate(
        (
            "MAP_RINGS",
            "MAP_CPUS",
            "MAP_LOST",
            "MAP_TIDS",
            "MAP_THREADS",
            "TARGET_TGID",
            "PREEMPT_COUNT_BTF_ID",
            "MAP_OTHERS",
            "MAP_SLOTS",
            "MAP_FREE",
            "MAP_HERE",
            "MAP_TRAILS",
            "MAP_FRESH",
            "MAP_TABLE",
            "MAP_COUNTS",
            "MAP_BROKEN",
            "MAP_SWITCH",
            "MAP_ALARMS",
        )
    )
}
PREEMPT_COUNT = "__preempt_count"  # a per-CPU variable up to Linux 6.1 and from 6.15 on, else part of pcpu_hot
# where KVM's timers fire, and where the recorders' own ring buffers and other CPUs wake threads
VECTORS = ("local_timer", "irq_work", "reschedule", "call_function", "call_function_single")


@dataclass(frozen=True)
class Plan:
    """What is to be traced.

    Parameters
    ----------
    events : kinds of the capture in order
    missing : "system:name" that the kernel lacks
    follow : tracepoints that follow.c hangs on, by function name
    tgid : int or None, the target's process
    targeted : bool, False is the whole machine
    filters : see RecordSettings
    btf : function -> where its type information is, for fentry/fexit
    raw : event -> macros that make its record from a raw tracepoint's arguments
    conditions : "system:name" -> what of it is recorded, for people
    preempt_count : BTF id of the kernel's preemption counter, None if programs may not read it;
    interrupts : then, the tracepoints by which interrupt.c counts, with its function for each
    user_probes : probes on the VMM's functions
    """

    events: list[TracedEvent]
    missing: list[str]
    follow: dict[str, TracedEvent]
    tgid: int | None
    targeted: bool
    filters: dict[str, Any]
    btf: dict[str, tuple[str, int]] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)
    conditions: dict[str, str] = field(default_factory=dict)
    preempt_count: int | None = None
    interrupts: list[tuple[str, TracedEvent]] = field(default_factory=list)
    user_probes: tuple[UserProbe, ...] = ()

    @property
    def may_trace(self) -> bool:
        """Say whether function probes are compiled for fentry/fexit too: the kernel has BTF and is not locked."""
        return (bpf_btf.BTF_FOLDER / "vmlinux").exists() and lockdown_mode() in (None, "none")


def make_plan(
    tracefs: Path,
    event_set: str,
    tgid: int | None,
    *,
    targeted: bool,
    filters: dict[str, Any],
    user_probes: tuple[UserProbe, ...] = (),
) -> Plan:
    """Decide what is traced, from what this kernel has; the filter "thread" makes one thread the target."""
    alone = "thread" in filters
    events, missing = bpf_events.wanted_tracepoints(tracefs, event_set, targeted=targeted)
    probes = [] if event_set == "minimal" else bpf_events.wanted_probes()
    follow = {}
    for function, name in (("follow_fork", "sched_process_fork"), ("follow_free", "sched_process_free")):
        event = bpf_events.read_tracepoint(tracefs, "sched", name)
        if event is not None and targeted and not alone:
            follow[function] = event
    btf = bpf_btf.find_functions({p.probe[0] for p in probes if p.probe}) if probes else {}
    counter = readable_variable(PREEMPT_COUNT)
    interrupts = [] if counter is not None else interrupt_events(tracefs)
    conditions = {f"{e.system}:{e.name}": "only of files" for e in events if e.name == "sys_enter_mmap"}
    if not targeted:
        conditions |= {f"syscalls:{name}": "not recorded with -a" for name in sorted(bpf_events.NOT_MACHINE_WIDE)}
    own = [probe.event() for probe in user_probes]
    return Plan(
        [*events, *probes, *own],
        missing,
        follow,
        None if alone else tgid,
        targeted,
        filters,
        btf,
        raw_events(events),
        conditions,
        counter,
        interrupts,
        user_probes,
    )


def raw_events(events: list[TracedEvent]) -> dict[str, str]:
    """Return the events that can be had from raw tracepoints -> the macros that copy their arguments."""
    types = kernel_types()
    found = {
        e.name: bpf_events.argument_copies(e, types.arguments(e.name) or {})
        for e in events
        if e.name in bpf_events.PLAIN_COPIES
    }
    return {name: copies for name, copies in found.items() if copies}


def readable_variable(name: str) -> int | None:
    """Return the BTF id of a per-CPU kernel variable that programs can read here, else None.

    The kernel resolves it by its symbol table, which holds variables only with CONFIG_KALLSYMS_ALL.
    """
    number = bpf_btf.find_variable(name)
    if number is None:
        return None
    # r1 = &variable; r0 = 0; exit
    probe = struct.pack("<BBhiBBhi", 0x18, 0x31, 0, number, 0, 0, 0, 0)
    probe += struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0)
    try:
        os.close(load_program("kvmtrace_probe", PROG_TYPE_TRACEPOINT, probe))
    except CapabilityError:
        return None
    return number


def interrupt_events(tracefs: Path) -> list[tuple[str, TracedEvent]]:
    """Return the tracepoints around interrupts with interrupt.c's function for each, exits first."""
    pairs = [
        ("irq", name, name.replace("irq_handler", "hardirq"))
        for name in ("irq_handler_exit", "softirq_exit", "irq_handler_entry", "softirq_entry")
    ]
    pairs += [("irq_vectors", f"{name}_{end}", f"hardirq_{end}") for end in ("exit", "entry") for name in VECTORS]
    pairs.sort(key=lambda pair: pair[2].endswith("entry"))
    found = [(function, bpf_events.read_tracepoint(tracefs, system, name)) for system, name, function in pairs]
    return [(function, event) for function, event in found if event is not None]


def plan_source(plan: Plan, wake_every: int) -> str:
    """Return the C source of all programs of a plan; the recorder is woken every `wake_every` records of a CPU."""
    defines = {name: str(PLACEHOLDERS[name]) for name in PLACEHOLDERS if name.startswith("MAP_")}
    defines["WAKE_EVERY"] = str(wake_every)
    defines["N_KINDS"] = str(len(plan.events))
    if plan.targeted:
        defines["TARGETED"] = "1"
        if plan.tgid is not None:
            defines["TARGET_TGID"] = str(PLACEHOLDERS["TARGET_TGID"])
    if plan.may_trace or plan.raw:
        defines["PROGRAMS_NEST"] = "1"
    if plan.preempt_count is not None:
        defines["PREEMPT_COUNT_BTF_ID"] = str(PLACEHOLDERS["PREEMPT_COUNT_BTF_ID"])
    defines |= bpf_events.filter_defines(plan.filters, plan.events)
    defines |= _follow_offsets(plan)
    files = [*STREAM_FILES, *(["follow.c"] if plan.follow else []), *(["interrupt.c"] if plan.interrupts else [])]
    return bpf_events.build_source(defines, files, _event_lines(plan))


def thread_bytes(plan: Plan) -> int:
    """Return the size of struct thread of kvm_exit.c."""
    held = 0
    if "slower_than_ns" in plan.filters:
        held = 24 + 8 * max((e.data_bytes + 7) // 8 for e in plan.events if e.name == "kvm_exit")
    return 24 + held


def _follow_offsets(plan: Plan) -> dict[str, str]:
    defines = {}
    for event in plan.events:
        if event.name == "sched_switch":
            defines["NEXT_PID_OFFSET"] = str(event.fields["next_pid"][0])
    if "follow_fork" in plan.follow:
        defines["CHILD_PID_OFFSET"] = str(plan.follow["follow_fork"].fields["child_pid"][0])
    if "follow_free" in plan.follow:
        defines["FREED_PID_OFFSET"] = str(plan.follow["follow_free"].fields["pid"][0])
    return defines


def _event_lines(plan: Plan) -> list[str]:
    lines = []
    for kind, event in enumerate(plan.events):
        if event.probe is None:
            lines.append(bpf_events.tracepoint_source(event, kind))
            if event.name in plan.raw:
                lines.append(bpf_events.raw_tracepoint_source(event, kind, plan.raw[event.name]))
            continue
        lines.append(bpf_events.probe_source(event, kind, traced=False))
        if plan.may_trace:
            lines.append(bpf_events.probe_source(event, kind, traced=True))
    return lines


class Programs:
    """The attached programs of a plan, and the maps that are theirs alone.

    Parameters
    ----------
    plan : Plan
    rings : Rings
    """

    def __init__(self, plan: Plan, rings: Rings) -> None:
        self.plan = plan
        self.tids = create_map("kvmtrace_tids", MAP_TYPE_HASH, 4, 4, MAX_TIDS)
        self.threads = create_map(
            "kvmtrace_thread", MAP_TYPE_HASH, 4, thread_bytes(plan), MAX_TIDS if plan.filters else 1
        )
        self.attached = Attachments()
        maps = rings.maps() | {"MAP_TIDS": self.tids, "MAP_THREADS": self.threads}
        values = {PLACEHOLDERS[name]: table.fd for name, table in maps.items()}
        values[PLACEHOLDERS["TARGET_TGID"]] = plan.tgid or 0
        values[PLACEHOLDERS["PREEMPT_COUNT_BTF_ID"]] = plan.preempt_count or 0
        self.code = relocate(compile_cached(plan_source(plan, rings.wake_every)), values)
        self.unattached: list[str] = []

    def add_tids(self, tids: Iterable[int]) -> None:
        """Count threads among the target's."""
        for tid in tids:
            self.tids.update(struct.pack("<I", tid), struct.pack("<I", 1))

    def follow(self) -> None:
        """Start following the target's new threads, and interrupts where that is the way to know of them."""
        for function, event in self.plan.interrupts:
            name = f"{function}:{event.name}"
            if not self.attached.raw_tracepoint(event, self.code[function], name):
                self.attached.tracepoint(event, self.code[function], name)
        for function, event in self.plan.follow.items():
            self.attached.tracepoint(event, self.code[function], function)

    def attach(self) -> None:
        """Attach every event's program; probes that this kernel does not allow are left out."""
        by_user = {probe.name: probe for probe in self.plan.user_probes}
        for event in self.plan.events:
            if event.name in by_user:
                self._attach_user(by_user[event.name])
            elif event.probe is None:
                raw = self.code.get(f"on_{event.name}_raw")
                if raw is None or not self.attached.raw_tracepoint(event, raw):
                    self.attached.tracepoint(event, self.code[f"on_{event.name}"])
            elif not self.attached.function(
                event, self.code.get(f"on_{event.name}_traced"), self.code.get(f"on_{event.name}"), self.plan.btf
            ):
                self.unattached.append(event.name)

    def _attach_user(self, probe: UserProbe) -> None:
        offset = find_functions(probe.binary, [probe.symbol]).get(probe.symbol)
        if offset is None:
            self.unattached.append(probe.name)
            return
        self.attached.user_function(
            probe.name, self.code[f"on_{probe.name}"], probe.binary, offset, is_return=probe.is_return
        )

    def close(self) -> None:
        """Detach and free everything."""
        self.attached.close()
        self.tids.close()
        self.threads.close()
