"""Event injection as numbers: types of events, what may be lost, where a reset continues."""

from __future__ import annotations

from kvmtrace.isa.words import (
    INTR_TYPE_EXT_INTR,
    INTR_TYPE_HARD_EXCEPTION,
    INTR_TYPE_PRIV_SW_EXCEPTION,
    INTR_TYPE_SOFT_EXCEPTION,
    INTR_TYPE_SOFT_INTR,
)
from kvmtrace.kvm.vectors import BP_VECTOR, GP_VECTOR, OF_VECTOR, PF_VECTOR, UD_VECTOR

# interruption types (SDM "Format of the VM-Exit Interruption-Information Field", APM "EXITINTINFO") that each
# tracepoint injects; an NMI's injection has no tracepoint
INJECTED_BY: dict[str, tuple[int, ...]] = {
    "kvm_inj_virq": (INTR_TYPE_EXT_INTR, INTR_TYPE_SOFT_INTR),
    "kvm_inj_exception": (INTR_TYPE_HARD_EXCEPTION, INTR_TYPE_PRIV_SW_EXCEPTION, INTR_TYPE_SOFT_EXCEPTION),
}

# legal losses of an interrupted delivery (J3), beside a new exception, a task switch and a reset
# fmt: off
LEGAL_LOSSES: dict[str, str] = {
    "kvm_smm_transition": "system-management mode was entered or left (enter_smm, emulator_leave_smm)",
    "kvm_emulate_insn": "decoding clears the exception queue (x86_emulate_instruction); exceptions only",
}
# fmt: on
# SVM before 6.0 runs INT3 and INTO again; a soft event whose skip fails is dropped (svm_complete_soft_interrupt)
SOFT_VECTORS: tuple[int, ...] = (BP_VECTOR, OF_VECTOR)

# faults that a handler raises in place of stepping over the instruction (V6): never both
INSTEAD_OF_A_STEP: tuple[int, ...] = (UD_VECTOR, GP_VECTOR, PF_VECTOR)
# of these, with error code 0 that tells the guest of a page instead, behind any instruction (kvm_inject_page_fault,
# kvm_arch_async_page_not_present)
ASYNCHRONOUS_WITHOUT_CODE: tuple[int, ...] = (PF_VECTOR,)

RESET_RIPS: dict[int, str] = {
    0xFFF0: "INIT or reset: kvm_vcpu_reset (x86.c)",
    0x0: "SIPI: kvm_vcpu_deliver_sipi_vector (x86.c)",
}
SMI_RIP = 0x8000  # of SMBASE: enter_smm (x86.c, smm.c)

# kvm_apic_accept_irq traces the delivery mode << 8: those that end in the IRR (__apic_accept_irq, lapic.c)
IRR_DELIVERY_MODES: dict[int, str] = {0x000: "fixed", 0x100: "lowest priority"}
SMI_DELIVERY_MODE = 0x200
INIT_DELIVERY_MODE = 0x500
SIPI_DELIVERY_MODE = 0x600
# events of Hyper-V's SynIC, which may end interrupts by itself (auto-EOI): nothing is certain of the in-service stack
AUTO_EOI = "kvm_hv_synic"  # the beginning of their names

# an event that was enabled and never fired, beside the others, which come before and after it: this KVM (PVM is one)
# does not trace it, and nothing follows from its absence
NOT_TRACED_BESIDE: dict[str, tuple[str, ...]] = {
    "kvm_inj_virq": ("kvm_apic_accept_irq", "kvm_eoi"),
}
