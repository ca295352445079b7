"""Mutations that pass: those that no recording can show, and those that a further rule could.

UNDETECTABLE rows state why the recorded events cannot contradict the edit, whatever the rules. NOT_YET rows are
honest gaps: the information is there, no rule uses it. A mutation that passes and is in neither fails the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvmtrace.events.table import EventTable
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
    isa : "vmx" or "svm"
    late_exit : only where kvm_exit is traced with interrupts on (SVM before 6.5)
    """

    reason: str
    operation: str = ""
    event: str = ""
    variant: str = ""
    exits: tuple[str, ...] = ()
    not_exits: tuple[str, ...] = ()
    isa: str = ""
    late_exit: bool = False

    def matches(self, mutation: Mutation, *, late_exit: bool) -> bool:
        """Say whether a mutation belongs to this class."""
        return (_within(mutation.operation, self.operation) and _within(mutation.event, self.event)
                and _within(mutation.variant, self.variant) and _within(mutation.isa, self.isa)
                and (not self.exits or mutation.exit_name in self.exits)
                and mutation.exit_name not in self.not_exits and (late_exit or not self.late_exit))


def _within(word: str, allowed: str) -> bool:
    return not allowed or word in allowed.split("|")


_REGISTERS = "the value is a register's or a device's, and no other event repeats it"
_UNUSED = "the processor gives this word no meaning for this exit, and KVM does not look at it"
_OTHERS = "traced by whoever sends the interrupt, in any context; the vCPU thread owes nothing for it"
_SCHEDULER = "threads are switched for the host's reasons; nothing of KVM follows from one switch more or less"
_LATE = "before 6.5 SVM traces kvm_exit with interrupts on: scheduling and migration are legal up to there"
_LAPIC = "an injection of unknown origin may be the LAPIC's own, and its registers are not traced"

UNDETECTABLE: tuple[Excuse, ...] = (
    Excuse(_REGISTERS, "alter", "kvm_pio|kvm_mmio|kvm_msr|kvm_cr|kvm_cpuid", "value"),
    Excuse(_REGISTERS, "alter", "kvm_cpuid", "leaf"),
    Excuse("ECX is a register's value: only kvm_msr has it", "alter", "kvm_msr", "msr"),
    Excuse(_UNUSED, "alter", "kvm_exit", "bit0|bit3|bit16", isa="vmx",
           not_exits=("IO_INSTRUCTION", "EPT_VIOLATION", "CR_ACCESS", "EXCEPTION_NMI", "APIC_ACCESS")),
    Excuse(_UNUSED, "alter", "kvm_exit", "bit0|bit3|bit16", isa="svm", not_exits=("io", "npf", "msr", "PF excp")),
    Excuse(_UNUSED, "alter", "kvm_exit", "bit3|bit16", isa="svm", exits=("msr",)),
    Excuse("of non-string port I/O, REP has no meaning", "alter", "kvm_exit", "bit3", isa="svm", exits=("io",)),
    Excuse("IDT-vectoring information without its valid bit means nothing", "alter", "kvm_exit", "bit0|page",
           isa="vmx"),
    Excuse(_UNUSED, "alter", "kvm_exit", "bit0|page", isa="svm", not_exits=("io", "npf", "PF excp")),
    Excuse("the event that caused the exit; KVM reads it for EXCEPTION_NMI and EXTERNAL_INTERRUPT only", "alter",
           "kvm_exit", "valid", isa="vmx", not_exits=("EXCEPTION_NMI",)),
    Excuse("on VMX only kvm_page_fault has the guest-physical address", "alter", "kvm_page_fault", "address+page",
           isa="vmx", exits=("EPT_VIOLATION",)),
    Excuse("whether an exception has an error code depends on the CPU mode, which is not traced", "alter",
           "kvm_inj_exception", "has error"),
    Excuse("an error code is in no other event", "alter", "kvm_inj_exception", "error"),
    Excuse(_OTHERS, "drop|duplicate|alter", "kvm_apic_accept_irq"),
    Excuse(_SCHEDULER, "drop|duplicate|swap", "sched_switch"),
    Excuse(_SCHEDULER, "swap", variant="with sched_switch"),
    Excuse(_LATE, "alter", "kvm_exit", "other CPU", late_exit=True),
    Excuse(_LATE, "insert", "sched_switch", "in guest mode", late_exit=True),
    Excuse("other threads' and the LAPIC's EOI work may be traced up to a late kvm_exit", "insert", "kvm_eoi",
           "in guest mode", late_exit=True),
    Excuse(_LAPIC, "insert", "kvm_inj_virq", "behind kvm_exit"),
    Excuse("a wake-up may repeat, and be spurious", "duplicate|alter", "kvm_vcpu_wakeup", "|valid"),
)

NOT_YET: tuple[Excuse, ...] = ()


def traced_late(table: EventTable) -> bool:
    """Say whether most kvm_exit events were traced with interrupts on."""
    rows = table.rows("kvm_exit")
    return bool(len(rows)) and float(np.mean(table.irq_flags[rows] & 1)) < 0.5


def why_undetectable(mutation: Mutation, table: EventTable) -> str:
    """Return why a mutation cannot be seen; "not yet: ..." for a known gap; "" if nobody says so."""
    late = traced_late(table)
    for prefix, rows in (("", UNDETECTABLE), ("not yet: ", NOT_YET)):
        for row in rows:
            if row.matches(mutation, late_exit=late):
                return prefix + row.reason
    return ""
