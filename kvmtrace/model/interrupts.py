"""Interrupts on their way: who sends them, what parts one from the next, what decides where they go.

An interrupt is sent (by an IPI, a message, a pin of the IOAPIC), accepted by the LAPICs of the vCPUs that it is for,
taken by each of them once, and ended. KVM does the first two in one go: a sender and the acceptances that it causes
stand side by side in one thread.
Sources: kvm_irq_delivery_to_apic (irq_comm.c), __apic_accept_irq, kvm_apic_local_deliver (lapic.c), ioapic_set_irq,
kvm_ioapic_update_eoi_one (ioapic.c)
"""

from __future__ import annotations

from typing import NamedTuple


class Sender(NamedTuple):
    """An event that tells vector, mode and destination; `after`: it is traced behind the acceptances it causes.

    `fields`: without one of them it does not tell; `beside`: without one of these events, acceptances of other causes
    would be taken for its own.
    """

    kind: str
    fields: tuple[str, ...]
    beside: tuple[str, ...]
    after: bool
    source: str
    sentence: str


# fmt: off
SENDERS: dict[str, Sender] = {row.kind: row for row in (
    Sender("kvm_apic_ipi", ("icr_low", "dest_id"), ("kvm_exit",), False, "kvm_apic_send_ipi (lapic.c)",
           "A vCPU wrote its ICR."),
    Sender("kvm_msi_set_irq", ("address", "data"), ("kvm_set_irq", "kvm_ioapic_set_irq"), False,
           "kvm_set_msi_irq (irq_comm.c)",
           "A message-signalled interrupt; also traced while routes are looked through."),
    Sender("kvm_ioapic_set_irq", ("e", "pin", "coalesced"), ("kvm_set_irq",), True, "ioapic_set_irq (ioapic.c)",
           "A pin of the IOAPIC; traced when all is done."),
)}
# fmt: on

# other events of a thread that part an acceptance from what was sent before
PARTING_EVENTS: tuple[str, ...] = (
    "kvm_set_irq", "kvm_pic_set_irq", "kvm_ack_irq", "kvm_ioapic_delayed_eoi_inj", "kvm_eoi", "kvm_pv_eoi", "kvm_apic",
    "kvm_hypercall", "kvm_hv_hypercall", "kvm_xen_hypercall", "kvm_mmio", "kvm_pio", "kvm_msr", "kvm_exit",
    "kvm_inj_virq", "kvm_inj_exception", "kvm_async_pf_ready", "kvm_userspace_exit", "kvm_fpu", "kvm_vcpu_wakeup",
    "kvm_vcpu_ioctl", "sys_enter_ioctl", "sys_exit_ioctl", "kvm_emulate_insn", "kvm_smm_transition",
)  # fmt: skip

# those of them, and of the senders, that tell of registers, ends and modes: followed for themselves
FOLLOWED_EVENTS: tuple[str, ...] = ("kvm_eoi", "kvm_apic", "kvm_msr", "kvm_mmio", "kvm_smm_transition")

# LAPIC registers and MSRs whose writes may change which vCPUs a destination names (kvm_recalculate_apic_map)
ROUTING_REGISTERS: dict[int, str] = {0x20: "APIC_ID", 0xD0: "APIC_LDR", 0xE0: "APIC_DFR", 0xF0: "APIC_SPIV"}
ROUTING_MSRS: dict[int, str] = {0x1B: "IA32_APIC_BASE"}
# ioctls after which a destination may name other vCPUs, or a pin another entry
ROUTING_IOCTLS: tuple[str, ...] = ("KVM_CREATE_VM", "KVM_CREATE_VCPU", "KVM_SET_IRQCHIP", "KVM_SET_GSI_ROUTING")
# ioctls that let other threads than the VM's raise lines: an irqfd's signaller, the PIT's worker
FOREIGN_LINES: tuple[str, ...] = ("KVM_IRQFD", "KVM_CREATE_PIT2")
# interfaces whose interrupts have no sender among these events: names of their events, or what those begin with, and
# ioctls that set them up. (A VMM that writes a vCPU's whole state makes others of Hyper-V's events appear.)
OTHER_INTERFACES: tuple[str, ...] = (
    "kvm_hv_synic", "kvm_hv_stimer_expiration", "kvm_hv_stimer_callback", "kvm_hv_hypercall", "kvm_hv_send_ipi",
    "kvm_xen_",
)  # fmt: skip
OTHER_INTERFACES_BY: tuple[str, ...] = ("KVM_XEN_HVM_CONFIG", "KVM_XEN_HVM_SET_ATTR", "KVM_XEN_VCPU_SET_ATTR")

# what the LAPIC sends to its own vCPU by the local vector table (kvm_apic_local_deliver): timer, performance counters
LOCAL_VECTORS: dict[int, str] = {0x320: "APIC_LVTT", 0x340: "APIC_LVTPC"}
LVT_MASKED = 1 << 16
LVT_PERIODIC = 1 << 17  # of the timer: it goes on by itself
# writes to them start the timer, or may; ioctls that do
TIMER_REGISTERS: dict[int, str] = {0x320: "APIC_LVTT", 0x380: "APIC_TMICT", 0x3E0: "APIC_TDCR"}
TIMER_SETTERS: tuple[str, ...] = ("KVM_SET_LAPIC", "KVM_SET_MSRS", "KVM_SET_MP_STATE", "KVM_SET_NESTED_STATE")
LAPIC_SETTERS: tuple[str, ...] = ("KVM_SET_LAPIC",)  # ioctls that write it
# ... or its request register, or queue a vector that no LAPIC accepted (kvm_vcpu_ioctl_interrupt)
PENDING_SETTERS: tuple[str, ...] = (*LAPIC_SETTERS, "KVM_INTERRUPT")
APIC_BASE_ENABLED = 1 << 11
SPIV_DIRECTED_EOI = 1 << 12  # EOIs are not told to the IOAPIC
SPIV_ENABLED = 1 << 8  # without it, all of the table is masked
# events of a vCPU's thread behind which an acceptance may be of something else
OTHER_SENDERS: tuple[str, ...] = (
    "kvm_hypercall", "kvm_hv_hypercall", "kvm_xen_hypercall", "kvm_async_pf_ready", "kvm_ack_irq",
    "kvm_ioapic_delayed_eoi_inj", "kvm_set_irq", "kvm_pic_set_irq", "kvm_vcpu_ioctl", "sys_enter_ioctl",
    "kvm_userspace_exit",
)  # fmt: skip

# changes of lines, and the pins that are told of an EOI: all of them may stand between an EOI and another such event
LINE_EVENTS: tuple[str, ...] = ("kvm_set_irq", "kvm_pic_set_irq", "kvm_ioapic_set_irq", "kvm_ack_irq")

# bits of a redirection entry that the guest does not write: delivery status, remote IRR
READ_ONLY_ENTRY_BITS = 1 << 12 | 1 << 14
ENTRY_VECTOR = 0xFF
ENTRY_LEVEL = 1 << 15
ENTRY_MASKED = 1 << 16
ENTRY_LOGICAL = 1 << 11
ENTRY_MODE, ENTRY_DESTINATION = 8, 56  # lowest bit of: the delivery mode (three), the destination (eight)
BROADCAST = 0xFF
N_ISA_PINS = 16  # of the IOAPIC: wired to the lines of ISA, which are edge-triggered and of one device each
RTC_PIN = 8  # held back until its last interrupt was ended, for userspace's sake (rtc_irq_check_coalesced)
ENTRY_REMOTE_IRR = 1 << 14
