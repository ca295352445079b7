"""The rules a recording is held against: what must hold, what it needs, what it cannot see.

The checker computes; it does not decide. Which rules exist, how bad a breach is, which events and fields
a rule needs and why it is true stand here. The exit tables (`exits_vmx.py`, `exits_svm.py`) refer to the
names in PREDICATES and CHECKS.
"""

from __future__ import annotations

from dataclasses import dataclass

VIOLATION = "violation"
SUSPICION = "suspicion"


@dataclass(frozen=True)
class Rule:
    """One invariant of the vCPU lifecycle.

    Parameters
    ----------
    id : str, "V1".."V13" contract, "J1".."J8" event injection, "H1".. heuristics
    title : str, a few words
    severity : "violation" (contradicts KVM's contract) or "suspicion" (heuristic)
    needs : events, or "event.field", without which the rule is not checked at all
    sentence : str, what must hold
    source : str, kernel functions and files
    cannot_see : str, faults of this kind that the rule misses, "" if none is known
    """

    id: str
    title: str
    severity: str
    needs: tuple[str, ...]
    sentence: str
    source: str
    cannot_see: str = ""


# fmt: off
RULES: dict[str, Rule] = {rule.id: rule for rule in (
    Rule("V1", "KVM_RUN bracket", VIOLATION, ("kvm_userspace_exit",),
         "Each KVM_RUN loads the guest FPU once, unloads it once, and ends with one kvm_userspace_exit; the "
         "ioctl and the functions around it nest: ioctl, kvm_fpu load, entries and exits, kvm_fpu unload, "
         "kvm_userspace_exit, return.",
         "kvm_arch_vcpu_ioctl_run (x86.c), kvm_vcpu_ioctl (virt/kvm/kvm_main.c)",
         "a KVM_RUN that fails before vcpu_load leaves no KVM event"),
    Rule("V2", "entry and exit alternate", VIOLATION, ("kvm_entry", "kvm_exit"),
         "kvm_entry and kvm_exit of a vCPU alternate; only a VM-entry that failed outright "
         "(KVM_EXIT_FAIL_ENTRY) "
         "has no kvm_exit, and only kernels before 5.15 re-enter by fast path without kvm_entry.",
         "vcpu_enter_guest (x86.c), vmx_vcpu_run (vmx/vmx.c), svm_vcpu_run (svm/svm.c)"),
    Rule("V3", "no scheduling in guest mode", VIOLATION, ("kvm_entry", "kvm_exit"),
         "From kvm_entry to kvm_exit interrupts are off: the vCPU thread neither sleeps nor changes its CPU. "
         "Kernels that trace kvm_exit with interrupts on (SVM before 6.5) guarantee this only up to the "
         "VM-exit.",
         "vcpu_enter_guest (x86.c): local_irq_disable before run, local_irq_enable after handle_exit_irqoff",
         "where kvm_exit is traced with interrupts on, the checkable window ends before the VM-exit"),
    Rule("V4", "mandatory follow-up", VIOLATION, ("kvm_exit",),
         "The events that the exit's handler always traces do appear before the vCPU resumes.",
         "kvm_vmx_exit_handlers (vmx/vmx.c), svm_exit_handlers (svm/svm.c)"),
    Rule("V5", "payloads agree", VIOLATION, ("kvm_exit",),
         "A follow-up event carries the same port, size, direction, RIP, address, error code, MSR direction "
         "or "
         "control register as the exit that caused it.",
         "handle_io, handle_cr, handle_ept_violation (vmx/vmx.c); io_interception, npf_interception "
         "(svm/svm.c)",
         "values that only the guest's registers hold, such as the data written"),
    Rule("V6", "RIP continuity", VIOLATION, ("kvm_exit.guest_rip", "kvm_entry.rip"),
         "The guest continues where the exit's class says: at the same instruction, behind it, or as the "
         "emulator left it.",
         "kvm_skip_emulated_instruction, x86_emulate_instruction (x86.c); skip_emulated_instruction "
         "(vmx/vmx.c)",
         "a skip that is off by a few bytes, where the instruction's length is not traced (VMX)"),
    Rule("V7", "allowed userspace exit", VIOLATION, ("kvm_exit", "kvm_userspace_exit"),
         "The userspace exit reason is one that this VM-exit, or a request between, can cause.",
         "kvm_arch_vcpu_ioctl_run, vcpu_enter_guest (x86.c) and the exit's handler",
         "with errno < 0 the reason is stale and says nothing"),
    Rule("V8", "pending I/O is completed", VIOLATION, ("kvm_userspace_exit",),
         "Port and MMIO accesses that left to userspace are completed in the next KVM_RUN before anything "
         "else, "
         "piece by piece, before the vCPU enters the guest.",
         "complete_emulated_pio, complete_emulated_mmio, complete_fast_pio_in (x86.c)",
         "the completion of a write leaves no event"),
    Rule("V9", "interrupted delivery is repeated", VIOLATION, ("kvm_exit", "kvm_entry"),
         "An event whose delivery the VM-exit interrupted (IDT-vectoring, EXITINTINFO) is injected again "
         "before "
         "the next entry, unless a legal loss replaces it.",
         "__vmx_complete_interrupts (vmx/vmx.c), svm_complete_interrupts (svm/svm.c), "
         "kvm_check_and_inject_events (x86.c)",
         "an NMI's injection has no tracepoint"),
    Rule("V10", "[reinjected] is justified", VIOLATION, ("kvm_exit", "kvm_inj_virq"),
         "An injection marked as repeated has a cause: the last exit interrupted that vector's delivery, an "
         "injection was cancelled before entry, or userspace restored it.",
         "kvm_check_and_inject_events, vmx_cancel_injection, svm_cancel_injection"),
    Rule("V11", "in-service stack", VIOLATION, ("kvm_eoi", "kvm_inj_virq"),
         "kvm_eoi names the highest vector in service: the last one injected from the LAPIC and not yet "
         "ended.",
         "apic_set_eoi, apic_find_highest_isr (lapic.c)",
         "vectors that were in service before the recording began; APICv and AVIC deliver without an event"),
    Rule("V12", "errno equals the return value", VIOLATION, ("kvm_userspace_exit",),
         "kvm_userspace_exit carries the value that the ioctl returns.",
         "kvm_vcpu_ioctl (virt/kvm/kvm_main.c)"),
    Rule("V13", "forbidden follow-up", VIOLATION, ("kvm_exit",),
         "Events that this exit's handler cannot trace do not appear before the vCPU resumes.",
         "kvm_vmx_exit_handlers (vmx/vmx.c), svm_exit_handlers (svm/svm.c)"),
    Rule("J1", "vectoring is captured", VIOLATION, ("kvm_exit",),
         "An exit with valid vectoring information never re-enters by fast path: an injection pass follows.",
         "__vmx_complete_interrupts raises KVM_REQ_EVENT"),
    Rule("J2", "injection order", VIOLATION, ("kvm_inj_virq",),
         "One pass injects at most one interrupt, and a repeated exception goes before it.",
         "kvm_check_and_inject_events (x86.c)"),
    Rule("J3", "legal loss", VIOLATION, ("kvm_exit", "kvm_entry"),
         "A vectoring event disappears only through a new exception, emulation, a reset, nesting, or "
         "userspace.",
         "kvm_multiple_exception, x86_emulate_instruction (x86.c)"),
    Rule("J4", "origin of [reinjected]", VIOLATION, ("kvm_exit", "kvm_inj_exception"),
         "A repeated exception has a cause, as V10 says for interrupts.",
         "kvm_check_and_inject_events (x86.c)"),
    Rule("J5", "injected vector is entered", VIOLATION, ("kvm_entry.intr_info", "kvm_inj_virq"),
         "The entry carries the vector of the last injection before it.",
         "vmx_inject_irq, svm_inject_irq; kvm_entry fields intr_info and error_code (kernels from 6.14 on)"),
    Rule("J6", "priority of the in-service stack", VIOLATION, ("kvm_inj_virq", "kvm_eoi"),
         "A fresh LAPIC interrupt has a higher priority class than every vector in service.",
         "kvm_get_apic_interrupt, apic_has_interrupt_for_ppr (lapic.c)"),
    Rule("J7", "window exits", VIOLATION, ("kvm_exit",),
         "An interrupt-window exit traces nothing but the injection that it made room for.",
         "handle_interrupt_window (vmx/vmx.c), interrupt_window_interception (svm/svm.c)"),
    Rule("J8", "immediate exit", VIOLATION, ("kvm_entry.immediate_exit", "kvm_exit"),
         "After an entry marked [immediate exit] no guest instruction retires: the next exit is the forced "
         "one, "
         "one taken during delivery, or asynchronous.",
         "vcpu_enter_guest (x86.c): req_immediate_exit; smp_send_reschedule on SVM, preemption timer on VMX"),
    Rule("H1", "lost wake-up", SUSPICION, ("kvm_exit", "sched_switch"),
         "A halted vCPU for which an interrupt was accepted wakes up soon.",
         "kvm_vcpu_halt, kvm_vcpu_block (virt/kvm/kvm_main.c)"),
    Rule("H2", "window storm", SUSPICION, ("kvm_exit",),
         "Interrupt-window exits lead to an injection; many in a row without one are a storm.",
         "kvm_check_and_inject_events (x86.c)"),
    Rule("H3", "no progress", SUSPICION, ("kvm_exit",),
         "The same exit at the same instruction is not repeated without end.",
         "each handler resumes, advances or leaves to userspace"),
    Rule("H4", "accepted but never injected", SUSPICION, ("kvm_apic_accept_irq", "kvm_inj_virq"),
         "An interrupt that the LAPIC accepted while the vCPU was halted is injected after the wake-up.",
         "kvm_apic_accept_events, kvm_check_and_inject_events (x86.c)"),
    Rule("H5", "RIP after userspace", SUSPICION, ("kvm_userspace_exit", "kvm_entry.rip"),
         "The guest continues behind the access that userspace completed, unless userspace set registers.",
         "complete_emulated_io, kvm_skip_emulated_instruction (x86.c)",
         "KVM_CAP_SYNC_REGS changes registers without an ioctl"),
    Rule("H6", "unusual instruction length", SUSPICION, ("kvm_exit.guest_rip", "kvm_entry.rip"),
         "The guest resumes no further on than the longest usual encoding of the instruction.",
         "vmx_skip_emulated_instruction, svm_skip_emulated_instruction; model/lengths.py",
         "instructions with superfluous prefixes are longer and legal"),
)}

# Conditions that lift a Must (`unless`), evaluated on the exit's segment: the events from kvm_exit to the
# next kvm_entry, kvm_exit or kvm_userspace_exit of the thread.
PREDICATES: dict[str, str] = {
    "exception": "a kvm_inj_exception lies in the segment (or that event was not recorded and RIP stays)",
    "userspace": "the segment ends in a userspace exit with errno 0",
    "interrupted": "the segment ends in a userspace exit with errno < 0",
    "retry": "the vCPU resumes at the RIP of the exit",
    "nested": "the segment has a nested event, or the vCPU runs a nested guest",
    "smm": "the segment has a kvm_smm_transition",
    "fastpath": "the exit re-entered by fast path",
    "zero_count": "a string instruction with count 0: a kvm_emulate_insn of INS/OUTS and no data moved",
    "emulated": "the segment has a kvm_emulate_insn",
    "string": "the exit qualification or EXITINFO1 says string I/O",
    "not_string": "the exit qualification or EXITINFO1 says a single port access",
    "pio_in_userspace": "IN that leaves to userspace as KVM_EXIT_IO: its kvm_pio follows on completion",
    "userspace_pio": "the segment ends in KVM_EXIT_IO: the emulator waits for a port before it touches memory",
    "icebp": "VMX EXCEPTION_NMI whose intr_info is a privileged software exception (ICEBP): KVM skips it",
    "no_decode_assist": "SVM without decode assists: EXITINFO1 bit 63 is clear and the emulator ran",
    "not_pf": "VMX EXCEPTION_NMI whose intr_info is not a page fault (vector 14)",
    "not_ud": "VMX EXCEPTION_NMI whose intr_info is not #UD (vector 6)",
    "no_mmio": "page fault whose error code lacks the reserved bit: not a known MMIO page",
    "fast_mmio": "the segment has a kvm_fast_mmio",
    "not_eoi": "APIC access that is no write to the EOI register (info1[11:0] 0xb0, type 1)",
    "first_dr": "debug-register exit resumed at the same RIP: the intercept was dropped",
}

# Payload comparisons (V5 and the exact lengths of V6) that an exit row may ask for (`checks`).
CHECKS: dict[str, str] = {
    "pio_matches_qualification": "kvm_pio port, size and direction equal the exit qualification (VMX)",
    "pio_matches_exitinfo": "kvm_pio port, size and direction equal EXITINFO1 (SVM)",
    "page_fault_matches_exit": "kvm_page_fault rip is the exit's, error_code is info1, address is info2 "
                               "(SVM NPF)",
    "msr_direction": "kvm_msr direction equals the exit reason's (VMX) or EXITINFO1's (SVM)",
    "cr_matches_qualification": "kvm_cr number and direction equal the exit qualification (VMX)",
    "cr_matches_exit_code": "kvm_cr number and direction equal the exit code (SVM)",
    "io_next_rip": "a non-string IN/OUT resumes at EXITINFO2 (SVM)",
    "emulated_length": "an instruction skipped by the emulator advances RIP by kvm_emulate_insn's length",
    "emulated_rip": "kvm_emulate_insn.rip is the exit's RIP",
    "mmio_matches_page_fault": "the first kvm_mmio lies on the page of kvm_page_fault's address",
    "fast_mmio_length": "after kvm_fast_mmio the guest resumes behind the instruction",
}
# fmt: on
