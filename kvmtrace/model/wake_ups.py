"""What ends the wait of a vCPU that halted in the kernel."""

from __future__ import annotations

# events behind the HLT exit, each of which shows why the vCPU goes on (kvm_vcpu_has_events, x86.c); an NMI, SMI, INIT,
# SIPI or kick shows as kvm_apic_accept_irq of another delivery mode than injection.IRR_DELIVERY_MODES
WAKES_FROM_HLT: tuple[str, ...] = (
    "inject interrupt",
    "inject exception",
    "kvm_smm_transition",
    "kvm_async_pf_ready",
    "kvm_hv_stimer_start_one_shot",
    "kvm_hv_stimer_start_periodic",
)
# once one of these was seen, interrupts may reach the guest without an event
HARDWARE_DELIVERY: tuple[str, ...] = (
    "kvm_apicv_accept_irq",
    "kvm_avic_incomplete_ipi",
    "kvm_avic_unaccelerated_access",
)
