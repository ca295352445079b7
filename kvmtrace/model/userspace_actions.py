"""What userspace may do between two KVM_RUNs, and what its exits leave undone."""

from __future__ import annotations

from kvmtrace.kvm.userspace_exits import KVM_EXIT_HLT, KVM_EXIT_IO, KVM_EXIT_MMIO

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
)
# traced while a VMM writes the whole state back, after a reset for example; looked at where no ioctl was recorded
SETTER_TRACES: tuple[str, ...] = (
    "kvm_hv_stimer_start_one_shot",
    "kvm_hv_stimer_start_periodic",
    "kvm_hv_syndbg_get_msr",
    "kvm_track_tsc",
)

# reasons after which the guest goes on behind the instruction, once userspace has done its part (V6, H5)
COMPLETED: tuple[int, ...] = (KVM_EXIT_IO, KVM_EXIT_MMIO, KVM_EXIT_HLT)
# reasons that can follow another userspace exit without a VM-exit between: an access that goes on (V7)
CONTINUED: tuple[int, ...] = (KVM_EXIT_IO, KVM_EXIT_MMIO)
# what the emulator traces when it goes on with an access without a VM-exit (V7)
CONTINUED_EVENTS: tuple[str, ...] = ("kvm_emulate_insn", "kvm_pio", "kvm_mmio")
# after a page fault retry_instruction() may decode an instruction and then let the guest try again; not if the
# emulator was seen at work (V6)
EXECUTED_EVENTS: tuple[str, ...] = ("kvm_mmio", "kvm_pio", "kvm_msr", "kvm_cpuid", "kvm_apic")
