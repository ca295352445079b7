"""What the ISAs of x86 share: what may follow any VM-exit, and groups of follow-up events.

Requests to the vCPU (kvm_make_request) are served between an exit's handler and the next VM-entry, so their
traces and userspace exits can stand behind every exit, whatever its reason.

Sources: vcpu_enter_guest, vcpu_run, kvm_skip_emulated_instruction, x86_emulate_instruction (x86.c).
"""

from __future__ import annotations

from kvmtrace.kvm.userspace_exits import (
    KVM_EXIT_DEBUG,
    KVM_EXIT_DIRTY_RING_FULL,
    KVM_EXIT_HYPERV,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_INTR,
    KVM_EXIT_IO,
    KVM_EXIT_IOAPIC_EOI,
    KVM_EXIT_IRQ_WINDOW_OPEN,
    KVM_EXIT_MMIO,
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    KVM_EXIT_TPR_ACCESS,
    KVM_EXIT_X86_BUS_LOCK,
    KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR,
)

# What the handlers of VM-exits trace on the guest's behalf. They appear between VM-exit and the next
# VM-entry, or complete I/O after KVM_RUN began; each exit row says which of them it owes or allows (V4, V13).
# fmt: off
X86_FOLLOW_UPS: tuple[str, ...] = (
    "kvm_pio", "kvm_mmio", "kvm_fast_mmio", "kvm_msr", "kvm_cr", "kvm_cpuid", "kvm_hypercall",
    "kvm_hv_hypercall", "kvm_xen_hypercall", "kvm_page_fault", "kvm_emulate_insn", "kvm_pml_full",
    "kvm_invlpga", "kvm_skinit",
)

# Consequences that may follow any exit, or come from the run loop: looked at by other rules, never forbidden.
X86_BYSTANDERS: tuple[str, ...] = (
    "kvm_apic", "kvm_eoi", "kvm_pv_eoi", "kvm_ple_window_update", "kvm_smm_transition",
    "kvm_nested_vmenter", "kvm_nested_vmrun", "kvm_nested_vmexit", "kvm_nested_vmexit_inject",
    "kvm_nested_intr_vmexit", "kvm_nested_vmenter_failed", "kvm_nested_intercepts", "kvm_apic_accept_irq",
    "kvm_wait_lapic_expire", "kvm_hv_stimer_start_one_shot", "kvm_hv_stimer_start_periodic",
    "kvm_hv_syndbg_get_msr", "kvm_track_tsc", "kvm_write_tsc_offset", "kvm_hv_timer_state",
    "kvm_async_pf_not_present", "kvm_async_pf_ready", "sched_switch",
)
# fmt: on

# field of kvm_nested_vmenter, on every ISA: address of the structure with which L1 enters L2
NESTED_STRUCTURE = "vmcb"
# what kvm_nested_vmenter calls that structure in text -> Isa.number
NESTED_STRUCTURES: dict[str, int] = {"vmcs": 1, "vmcb": 2}

# KVM_EXIT_* -> the request or state that causes it
# fmt: off
ANY_EXIT_CAUSES: dict[int, str] = {
    KVM_EXIT_IRQ_WINDOW_OPEN: "the VMM asked for an interrupt window (dm_request_for_irq_injection)",
    KVM_EXIT_SHUTDOWN: "KVM_REQ_TRIPLE_FAULT: an exception could not be delivered",
    KVM_EXIT_INTR: "a signal is pending (errno is -EINTR)",
    KVM_EXIT_TPR_ACCESS: "KVM_REQ_REPORT_TPR_ACCESS: the emulator touched the TPR (kvm_apic, register 0x80)",
    KVM_EXIT_SYSTEM_EVENT: "KVM_REQ_HV_CRASH, KVM_REQ_HV_RESET",
    KVM_EXIT_IOAPIC_EOI: "KVM_REQ_IOAPIC_EOI_EXIT: split irqchip",
    KVM_EXIT_HYPERV: "KVM_REQ_HV_EXIT: SynIC",
    KVM_EXIT_DIRTY_RING_FULL: "the vCPU's dirty ring is full",
}
# fmt: on

# of arm64's arch_timer.c and vgic.c
X86_ABSENT: frozenset[str] = frozenset({"kvm_timer_update_irq", "vgic_update_irq_pending"})

ANY_EXIT_USERSPACE: frozenset[int] = frozenset(ANY_EXIT_CAUSES)

# VMX only: bit 26 of the exit reason overrides whatever the handler decided
BUS_LOCK_USERSPACE: frozenset[int] = frozenset({KVM_EXIT_X86_BUS_LOCK})

# events of the thread that no exit row forbids: injections, wake-ups, and what other rules look at
ANY_EXIT_EVENTS: frozenset[str] = frozenset(X86_BYSTANDERS) | {
    "kvm_inj_virq",
    "kvm_inj_exception",
    "kvm_halt_poll_ns",
    "kvm_vcpu_wakeup",
}

# what one run of the instruction emulator can trace: MSR accesses come from emulator_get_msr_with_filter and
# emulator_set_msr_with_filter, kvm_cpuid from em_cpuid and string_registers_quirk
EMULATOR_EVENTS: frozenset[str] = frozenset(
    {
        "kvm_emulate_insn",
        "kvm_mmio",
        "kvm_pio",
        "kvm_msr",
        "kvm_cpuid",
    }
)

# ... and the userspace exits it can end in
# fmt: off
EMULATOR_USERSPACE: frozenset[int] = frozenset({
    KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_DEBUG, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR,
})
# fmt: on

# a skipped instruction under KVM_GUESTDBG_SINGLESTEP
SKIP_USERSPACE: frozenset[int] = frozenset({KVM_EXIT_DEBUG})
