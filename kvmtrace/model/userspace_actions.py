"""What userspace may do between two KVM_RUNs, and what its exits leave undone."""

from __future__ import annotations

from kvmtrace.kvm.userspace_exits import (
    KVM_EXIT_HLT,
    KVM_EXIT_IO,
    KVM_EXIT_IOAPIC_EOI,
    KVM_EXIT_MMIO,
    KVM_EXIT_SET_TPR,
    KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR,
)

# ioctls after which a vCPU's registers, pending events or LAPIC may be others than before
STATE_SETTERS: tuple[str, ...] = (
    "KVM_SET_REGS",
    "KVM_SET_SREGS",
    "KVM_SET_SREGS2",
    "KVM_SET_VCPU_EVENTS",
    "KVM_SET_MP_STATE",
    "KVM_SET_NESTED_STATE",
    "KVM_SET_LAPIC",
    "KVM_INTERRUPT",
    "KVM_SET_GUEST_DEBUG",
    "KVM_SMI",
    "KVM_SET_ONE_REG",
    "KVM_ARM_VCPU_INIT",
)
# those of them after which the guest may go on at another RIP: what the others set pending is injected
RIP_SETTERS: tuple[str, ...] = tuple(name for name in STATE_SETTERS if name not in {"KVM_SET_LAPIC", "KVM_INTERRUPT"})
# those after which a vCPU may be in another mode, or have another SMBASE (V15)
MODE_SETTERS: tuple[str, ...] = ("KVM_SET_VCPU_EVENTS", "KVM_SET_MP_STATE", "KVM_SET_NESTED_STATE", "KVM_SET_MSRS")
# those after which an SMI may be pending (V15)
SMI_SETTERS: tuple[str, ...] = ("KVM_SET_VCPU_EVENTS", "KVM_SET_NESTED_STATE")
SMI_REQUESTS: tuple[str, ...] = ("KVM_SMI",)  # ... and those after which one is, if it returned 0
# those after which the PICs of a VM may be others, and those of a vCPU by which a VMM resets its VM (I6)
PIC_SETTERS: tuple[str, ...] = ("KVM_CREATE_VM", "KVM_CREATE_IRQCHIP", "KVM_SET_IRQCHIP")
PIC_RESETTERS: tuple[str, ...] = ("KVM_SET_MP_STATE", "KVM_SET_LAPIC", "KVM_SET_NESTED_STATE")
# traced while a VMM writes the whole state back, after a reset for example; looked at where no ioctl was recorded
SETTER_TRACES: tuple[str, ...] = (
    "kvm_hv_stimer_start_one_shot",
    "kvm_hv_stimer_start_periodic",
    "kvm_hv_syndbg_get_msr",
    "kvm_track_tsc",
)

# reasons after which the guest goes on behind the instruction, once userspace has done its part (V6, H5)
COMPLETED: tuple[int, ...] = (
    KVM_EXIT_IO,
    KVM_EXIT_MMIO,
    KVM_EXIT_HLT,
    KVM_EXIT_SET_TPR,
    KVM_EXIT_IOAPIC_EOI,
    KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR,
)
# what goes on with an access that userspace did its part of (complete_userspace_io)
COMPLETED_BY: dict[int, str] = {
    KVM_EXIT_IO: "complete_fast_pio_out, complete_fast_pio_in, complete_emulated_pio (x86.c)",
    KVM_EXIT_MMIO: "complete_emulated_mmio, complete_emulated_io (x86.c); kvm_handle_mmio_return (mmio.c)",
    KVM_EXIT_HLT: "kvm_emulate_halt, kvm_emulate_halt_noskip (x86.c)",
    KVM_EXIT_X86_RDMSR: "complete_fast_rdmsr, complete_emulated_rdmsr (x86.c)",
    KVM_EXIT_X86_WRMSR: "complete_fast_msr_access (x86.c)",
}
# reasons that can follow another userspace exit without a VM-exit between: an access that goes on (V7)
CONTINUED: tuple[int, ...] = (KVM_EXIT_IO, KVM_EXIT_MMIO)
# what the emulator traces when it goes on with an access without a VM-exit (V7)
CONTINUED_EVENTS: tuple[str, ...] = ("kvm_emulate_insn", "kvm_pio", "kvm_mmio")
# after a page fault retry_instruction() may decode an instruction and then let the guest try again; not if the
# emulator was seen at work (V6)
EXECUTED_EVENTS: tuple[str, ...] = ("kvm_mmio", "kvm_pio", "kvm_msr", "kvm_cpuid", "kvm_apic")
