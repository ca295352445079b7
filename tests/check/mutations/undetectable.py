"""Mutations that pass: those that no recording can show, and those that a further rule could.

UNDETECTABLE rows state why the recorded events cannot contradict the edit, whatever the rules. NOT_YET rows are
honest gaps: the information is there, no rule uses it. A mutation that passes and is in neither fails the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.table.event_table import EventTable
    from mutations.plan import Mutation


@dataclass(frozen=True)
class Excuse:
    """A class of mutations and why they pass; empty fields match everything.

    Parameters
    ----------
    reason : str
    operation, event, variant : as in Mutation; several, joined with "|"
    exits : names of VM-exits, one of which must be the last before the event
    not_exits : names of VM-exits, none of which may be
    isa : name of an ISA
    late_exit : only where kvm_exit is traced with interrupts on (SVM before 6.5)
    when : a further condition on the place in the recording
    """

    reason: str
    operation: str = ""
    event: str = ""
    variant: str = ""
    exits: tuple[str, ...] = ()
    not_exits: tuple[str, ...] = ()
    isa: str = ""
    late_exit: bool = False
    when: Callable[[Mutation, EventTable], bool] | None = None

    def matches(self, mutation: Mutation, table: EventTable, *, late_exit: bool) -> bool:
        """Say whether a mutation belongs to this class."""
        return self._fits(mutation, late_exit=late_exit) and (self.when is None or self.when(mutation, table))

    def _fits(self, mutation: Mutation, *, late_exit: bool) -> bool:
        return (
            _within(mutation.operation, self.operation)
            and _within(mutation.event, self.event)
            and _within(mutation.variant, self.variant)
            and _within(mutation.isa, self.isa)
            and (not self.exits or mutation.exit_name in self.exits)
            and mutation.exit_name not in self.not_exits
            and (late_exit or not self.late_exit)
        )


INTERCEPTED = {"CPUID": 0x72, "VMMCALL": 0x81}  # alteration of kvm_nested_intercepts -> code of the exit
KVM_EXIT_ARM_NISV = 28
KVM_RUN, KVM_SET_ONE_REG = 0xAE80, 0x4010AEAC
ASYNCHRONOUS = {0, 1, 2, 7, 8, 43, 52}  # VMX exits that may come whatever was forced


def _next_value(table: EventTable, row: int, event: str, field: str, step: int = 1) -> int | None:
    """Return a field of the thread's next (step 1) or last (step -1) event of a kind, None if there is none."""
    rows = table.rows(event)
    rows = rows[table.tid[rows] == table.tid[row]]
    at = int(np.searchsorted(rows, row, side="right" if step > 0 else "left")) + (0 if step > 0 else -1)
    if not 0 <= at < len(rows) or not table.has(event, field):
        return None
    everywhere = table.rows(event)
    return int(table.field(event, field)[np.searchsorted(everywhere, rows[at])])


def _asynchronous_exit_follows(mutation: Mutation, table: EventTable) -> bool:
    reason = _next_value(table, mutation.row, "kvm_exit", "exit_reason")
    return reason is None or reason & 0xFFFF in ASYNCHRONOUS or mutation.value == 0


def _real_mode_injection(mutation: Mutation, table: EventTable) -> bool:
    """Say whether an interrupt is injected in real mode next to this event: hosts may do that by moving RIP."""
    rip = _next_value(table, mutation.row, "kvm_entry", "rip", -1)
    tid = table.tid[mutation.row]
    near = table.rows("kvm_inj_virq")
    near = near[(table.tid[near] == tid) & (abs(near - mutation.row) < 40)]
    return rip is not None and rip < 0x10000 and len(near) > 0


def _string_io(mutation: Mutation, table: EventTable) -> bool:
    row = mutation.row + (mutation.event == "kvm_exit")
    info1 = _next_value(table, row, "kvm_exit", "info1", -1)
    return info1 is not None and bool(info1 & (16 if mutation.isa == "vmx" else 4))


def _of_ram(mutation: Mutation, table: EventTable) -> bool:
    """Say whether no MMIO access follows a fault, and userspace does not serve it."""
    later = [_next_row(table, mutation.row, event) for event in ("kvm_entry", "kvm_mmio", "kvm_userspace_exit")]
    return later[0] < min(later[1:])


def _undescribed(mutation: Mutation, table: EventTable) -> bool:
    """Say whether userspace serves a fault whose syndrome describes no access: no kvm_mmio follows."""
    if _next_row(table, mutation.row, "kvm_mmio") < _next_row(table, mutation.row, "kvm_userspace_exit"):
        return False
    return _next_value(table, mutation.row, "kvm_userspace_exit", "reason") == KVM_EXIT_ARM_NISV


def _registers_set(mutation: Mutation, table: EventTable) -> bool:
    return _next_value(table, mutation.row, "kvm_vcpu_ioctl", "cmd", -1) == KVM_RUN and any(
        cmd == KVM_SET_ONE_REG for cmd in _since_exit(table, mutation.row)
    )


def _since_exit(table: EventTable, row: int) -> list[int]:
    """Return the ioctls of the thread since its last VM-exit."""
    exits = table.rows("kvm_exit")
    exits = exits[(table.tid[exits] == table.tid[row]) & (exits < row)]
    rows = table.rows("kvm_vcpu_ioctl")
    mine = (table.tid[rows] == table.tid[row]) & (rows < row) & (rows > (exits[-1] if len(exits) else -1))
    return table.field("kvm_vcpu_ioctl", "cmd")[mine].tolist()


def _other_ioctl(mutation: Mutation, table: EventTable) -> bool:
    return _next_value(table, mutation.row, "kvm_vcpu_ioctl", "cmd", -1) != KVM_RUN


def _next_row(table: EventTable, row: int, event: str) -> int:
    """Return the thread's next event of a kind; the table's length if there is none."""
    rows = table.rows(event) if table.has(event) else np.zeros(0, np.intp)
    rows = rows[(rows > row) & (table.tid[rows] == table.tid[row])]
    return int(rows[0]) if len(rows) else len(table)


def _l2_never_left_for(mutation: Mutation, table: EventTable) -> bool:
    """Say whether L2 takes no exit of the altered intercept's code before it is entered anew."""
    end = _next_row(table, mutation.row, "kvm_nested_vmenter")
    rows = table.rows("kvm_exit")
    inside = (rows > mutation.row) & (rows < end) & (table.tid[rows] == table.tid[mutation.row])
    return INTERCEPTED[mutation.variant] not in table.field("kvm_exit", "exit_reason")[inside]


def _within(word: str, allowed: str) -> bool:
    return not allowed or word in allowed.split("|")


_REGISTERS = "the value is a register's or a device's, and no other event repeats it"
_UNUSED = "the processor gives this word no meaning for this exit, and KVM does not look at it"
_OTHERS = "traced by whoever sends the interrupt, in any context; the vCPU thread owes nothing for it"
_SCHEDULER = "threads are switched for the host's reasons; nothing of KVM follows from one switch more or less"
_LATE = "before 6.5 SVM traces kvm_exit with interrupts on: scheduling and migration are legal up to there"

_PROBE = "a kprobe may miss a hit, a kretprobe at its limit as well: that one is not there proves nothing"
_LENGTH = "IN and OUT are 1 to 3 bytes long, and the recording does not have the instruction"
_VM86 = "in real mode KVM may inject by moving RIP to the handler (hosts without unrestricted guest)"
_PROBES = "vmx_vcpu_run|vmx_vcpu_run_return|svm_vcpu_run|svm_vcpu_run_return|kvm_vcpu_ioctl|kvm_vcpu_ioctl_return"

UNDETECTABLE: tuple[Excuse, ...] = (
    Excuse(_PROBE, "drop", _PROBES),
    Excuse(_PROBE, "swap", "vmx_vcpu_run_return", "with kvm_inj_virq"),
    Excuse(
        "the fast path sends IPIs and traces the LAPIC's register inside the run function, too",
        "swap",
        "vmx_vcpu_run_return|svm_vcpu_run_return",
        "with kvm_apic|with kvm_apic_ipi",
    ),
    Excuse(
        "an MSR write of the fast path is traced before the run function returns, of the slow path behind",
        "swap",
        "kvm_msr",
        "with vmx_vcpu_run_return|with svm_vcpu_run_return",
    ),
    Excuse(
        "a string instruction that moves nothing has no kvm_pio to compare the port with",
        "alter",
        "kvm_exit",
        "bit16",
        when=_string_io,
    ),
    Excuse(
        "SVM forces an exit by an interrupt to itself, which may arrive after some instructions",
        "alter",
        "kvm_entry",
        "immediate",
        isa="svm",
    ),
    Excuse(
        "an asynchronous exit may come first, and a forced exit that is not marked looks like one",
        "alter",
        "kvm_entry",
        "immediate",
        isa="vmx",
        when=_asynchronous_exit_follows,
    ),
    Excuse(_LENGTH, "alter", "kvm_entry|kvm_exit", "rip+1|rip-1", exits=("IO_INSTRUCTION", "io")),
    Excuse(
        _VM86, "alter", "kvm_entry|kvm_exit", "rip+1|rip-1|rip+16|rip-16|rip+page", isa="vmx", when=_real_mode_injection
    ),
    Excuse(
        "host interrupt and interrupt window look alike on SVM: same RIP, nothing traced",
        "alter",
        "kvm_exit",
        "interrupt",
        exits=("interrupt", "vintr"),
    ),
    Excuse(
        "how many elements a string instruction moves is in a register",
        "drop|duplicate|alter",
        "kvm_pio",
        "|count",
        when=_string_io,
    ),
    Excuse(
        "string I/O is emulated: EXITINFO2 is not used", "alter", "kvm_exit", "page|bit0", isa="svm", when=_string_io
    ),
    Excuse(
        "on VMX only kvm_mmio has the guest-physical address of a known MMIO page",
        "alter",
        "kvm_mmio",
        "gpa+8|gpa+page",
        exits=("EPT_MISCONFIG",),
    ),
    Excuse("whether an injection is a software interrupt is KVM's own note", "alter", "kvm_inj_virq", "soft"),
    Excuse(
        "before the first EOI of a vector it is not known what the LAPIC had in service",
        "drop|alter",
        "kvm_inj_virq",
        "|vector",
    ),
    Excuse(_OTHERS, "swap", "kvm_apic_accept_irq"),
    Excuse(_OTHERS, "swap", variant="with kvm_apic_accept_irq"),
    Excuse(_REGISTERS, "alter", "kvm_pio|kvm_mmio|kvm_msr|kvm_cr|kvm_cpuid", "value"),
    Excuse(_REGISTERS, "alter", "kvm_cpuid", "leaf"),
    Excuse("ECX is a register's value: only kvm_msr has it", "alter", "kvm_msr", "msr"),
    Excuse(
        _UNUSED,
        "alter",
        "kvm_exit",
        "bit0|bit3|bit16",
        isa="vmx",
        not_exits=("IO_INSTRUCTION", "EPT_VIOLATION", "CR_ACCESS", "EXCEPTION_NMI", "APIC_ACCESS"),
    ),
    Excuse(_UNUSED, "alter", "kvm_exit", "bit0|bit3|bit16", isa="svm", not_exits=("io", "npf", "msr", "PF excp")),
    Excuse(_UNUSED, "alter", "kvm_exit", "bit3|bit16", isa="svm", exits=("msr",)),
    Excuse("of non-string port I/O, REP has no meaning", "alter", "kvm_exit", "bit3", isa="svm", exits=("io",)),
    Excuse(
        "IDT-vectoring information without its valid bit means nothing", "alter", "kvm_exit", "bit0|page", isa="vmx"
    ),
    Excuse(_UNUSED, "alter", "kvm_exit", "bit0|page", isa="svm", not_exits=("io", "npf", "PF excp")),
    Excuse(
        "the event that caused the exit; KVM reads it for EXCEPTION_NMI and EXTERNAL_INTERRUPT only",
        "alter",
        "kvm_exit",
        "valid",
        isa="vmx",
        not_exits=("EXCEPTION_NMI",),
    ),
    Excuse(
        "on VMX only kvm_page_fault has the guest-physical address",
        "alter",
        "kvm_page_fault",
        "address+page",
        isa="vmx",
        exits=("EPT_VIOLATION",),
    ),
    Excuse(
        "whether an exception has an error code depends on the CPU mode, which is not traced",
        "alter",
        "kvm_inj_exception",
        "has error",
    ),
    Excuse("an error code is in no other event", "alter", "kvm_inj_exception", "error"),
    Excuse(_OTHERS, "drop|duplicate|alter", "kvm_apic_accept_irq"),
    Excuse(_SCHEDULER, "drop|duplicate|swap", "sched_switch"),
    Excuse(_SCHEDULER, "swap", variant="with sched_switch"),
    Excuse(_LATE, "alter", "kvm_exit", "other CPU", late_exit=True),
    Excuse(_LATE, "insert", "sched_switch", "in guest mode", late_exit=True),
    Excuse("a wake-up may repeat, and be spurious", "duplicate|alter", "kvm_vcpu_wakeup", "|valid"),
)

_ARM64: tuple[Excuse, ...] = (
    Excuse(
        "a trap of no class gives the guest an exception, which is not traced",
        "alter",
        "kvm_exit",
        "kind",
        exits=("IRQ",),
    ),
    Excuse(
        "which page a fault on RAM was on, and whether its syndrome described the access, stands nowhere else",
        "alter",
        "kvm_guest_fault",
        "described|direction|offset|page|size",
        isa="arm64",
        when=_of_ram,
    ),
    Excuse(
        "an access that its syndrome does not describe is userspace's whole affair: no kvm_mmio tells where it went",
        "alter",
        "kvm_guest_fault",
        "direction|offset|page|size",
        isa="arm64",
        when=_undescribed,
    ),
    Excuse(
        "memory that is read-only, or goes away meanwhile, may have an access flag fault and be served as MMIO",
        "alter",
        "kvm_guest_fault",
        "access flag",
        isa="arm64",
    ),
    Excuse("registers that KVM does not know are not traced", "drop", "kvm_sys_access"),
    Excuse("without its access an exit looks like one whose page was mapped", "drop", "kvm_mmio", exits=("DABT_LOW",)),
    Excuse(_REGISTERS, "alter", "kvm_hvc_arm64", "function|immediate"),
    Excuse("a wait that ended at once leaves no wake-up", "alter", "kvm_wfx_arm64", "WFE"),
    Excuse("the halt-polling interval is adapted as the host finds best", "drop|duplicate", "kvm_halt_poll_ns"),
    Excuse(
        "the VMM set the vCPU's registers", "alter", "kvm_entry", "pc+4|pc-4|pc+page", isa="arm64", when=_registers_set
    ),
    Excuse(
        "what other ioctls return is the VMM's affair",
        "alter",
        "kvm_vcpu_ioctl_return|sys_exit_ioctl",
        "return",
        isa="arm64",
        when=_other_ioctl,
    ),
    Excuse(_PROBE, "swap", "kvm_vcpu_ioctl", "with kvm_mmio", isa="arm64"),
    Excuse(
        "a device in the kernel may take a write, and a CPU that cannot run the vCPU be found before it is entered",
        "alter",
        "kvm_userspace_exit",
        "fail entry",
        isa="arm64",
        exits=("DABT_LOW",),
    ),
)
_NESTED: tuple[Excuse, ...] = (
    Excuse(
        "nothing else says whether L1 asked for an exit that L2 does not take",
        "alter",
        "kvm_nested_intercepts",
        when=_l2_never_left_for,
    ),
    Excuse(
        "how long an instruction with an operand in memory is, the recording does not have",
        "alter",
        "kvm_entry|kvm_exit",
        "rip+1|rip-1",
        exits=("VMCLEAR", "VMON", "VMPTRLD", "VMREAD", "VMWRITE"),
    ),
    Excuse(
        "KVM looks at what L1 wants before or behind its step over the instruction, as the version has it",
        "swap",
        "kvm_emulate_insn",
        "with kvm_nested_vmenter_failed",
    ),
)
UNDETECTABLE += (*_ARM64, *_NESTED)

NOT_YET: tuple[Excuse, ...] = (
    Excuse(
        "who accepted an interrupt is not asked where it is injected behind an instruction that enters L2",
        "insert",
        "kvm_inj_virq",
        "behind kvm_exit",
        exits=("vmrun", "VMLAUNCH", "VMRESUME"),
    ),
    Excuse(
        "an emulator leaves EXITINTINFO bits behind, so a vector below 32 of type 0 is taken for stale",
        "alter",
        "kvm_exit",
        "valid",
        isa="svm",
    ),
    Excuse(
        "the operand's size is decoded for the known forms of instructions only",
        "alter|duplicate",
        "kvm_mmio",
        "|len",
        isa="vmx|svm",
    ),
    Excuse(
        "reasons of the second and later userspace exits of one access are not looked at",
        "alter",
        "kvm_userspace_exit",
        "fail entry|intr",
        isa="vmx|svm",
    ),
    Excuse(
        "usual lengths are compared for resumes in the kernel, not behind a userspace exit",
        "alter",
        "kvm_entry|kvm_exit",
        "rip+1|rip-1",
        exits=("HLT", "hlt"),
    ),
    Excuse("without NRIPS one skip in many that is not decoded is tolerated", "drop", "kvm_emulate_insn", isa="svm"),
    Excuse(
        "a second decode is tolerated where invalid guest state or an injection might explain it",
        "duplicate|insert",
        "kvm_emulate_insn",
    ),
    Excuse(
        "a decode beside an injection is taken for that of a software interrupt",
        "alter",
        "kvm_exit",
        "interrupt",
        exits=("hlt",),
    ),
    Excuse(
        "of two equal IPIs the first may go to nobody, if nothing went to its destination before",
        "duplicate",
        "kvm_apic_ipi",
    ),
    Excuse(
        "within its page the address of an access is not compared with the fault's",
        "alter",
        "kvm_mmio",
        "gpa+8|gpa+page",
    ),
)


def traced_late(table: EventTable) -> bool:
    """Say whether most kvm_exit events were traced with interrupts on."""
    rows = table.rows("kvm_exit")
    return bool(len(rows)) and float(np.mean(table.irq_flags[rows] & 1)) < 0.5


def why_undetectable(mutation: Mutation, table: EventTable) -> str:
    """Return why a mutation cannot be seen; "not yet: ..." for a known gap; "" if nobody says so."""
    late = traced_late(table)
    for prefix, rows in (("", UNDETECTABLE), ("not yet: ", NOT_YET)):
        for row in rows:
            if row.matches(mutation, table, late_exit=late):
                return prefix + row.reason
    return ""
