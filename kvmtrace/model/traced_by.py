"""Which of KVM's functions trace a follow-up of a VM-exit: where one is missing or wrong, the fault is near them."""

from __future__ import annotations

# fmt: off
TRACED_BY: dict[str, str] = {
    "kvm_pio": "kvm_fast_pio, emulator_pio_in_out (x86.c)",
    "kvm_mmio": "emulator_read_write, read_prepare, write_mmio, vcpu_mmio_read (x86.c)",
    "kvm_emulate_insn": "x86_emulate_instruction (x86.c)",
    "kvm_cpuid": "kvm_cpuid (cpuid.c)",
    "kvm_msr": "kvm_emulate_rdmsr, kvm_emulate_wrmsr (x86.c)",
    "kvm_hypercall": "kvm_emulate_hypercall (x86.c)",
    "kvm_guest_fault": "kvm_handle_guest_abort (mmu.c)",
    "kvm_handle_sys_reg": "kvm_handle_sys_reg (sys_regs.c)",
    "kvm_wfx_arm64": "kvm_handle_wfx (handle_exit.c)",
    "kvm_hvc_arm64": "handle_hvc (handle_exit.c)",
}
# fmt: on
