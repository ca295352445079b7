"""Events beside the life of a vCPU: interrupt lines, the MMU, clocks, set-up, and what the VMM does by itself.

They change no state of KVM_RUN and belong to no single exit; the model knows where they may stand, and what must have
come before them. What stands in none of the model's tables is counted by name as unexplained.
"""

from __future__ import annotations

from typing import NamedTuple

# where a vCPU thread may trace a side event
PLACES: dict[str, str] = {
    "anywhere": "in any ioctl, in the run loop, on behalf of the VMM or of the host",
    "run loop": "between the loading and unloading of the guest's FPU, outside guest mode",
}


class SideEvent(NamedTuple):
    """A side event; `after`: the thread traced one of these since its last step, or this very event is wrong."""

    kind: str
    place: str
    source: str
    sentence: str
    after: tuple[str, ...] = ()


def _rows(place: str, source: str, sentence: str, *kinds: str) -> tuple[SideEvent, ...]:
    return tuple(SideEvent(kind, place, source, sentence) for kind in kinds)


# fmt: off
SIDE_EVENTS: dict[str, SideEvent] = {row.kind: row for row in (
    # interrupt lines
    SideEvent("kvm_set_irq", "anywhere", "kvm_set_irq (virt/kvm/irqchip.c)", "A line changes."),
    SideEvent("kvm_pic_set_irq", "anywhere", "kvm_set_pic_irq (irq_comm.c)", "The line's pin of the PIC.",
              ("kvm_set_irq",)),
    SideEvent("kvm_ioapic_set_irq", "anywhere", "kvm_set_ioapic_irq (irq_comm.c); kvm_set_ioapic on KVM_SET_IRQCHIP",
              "The line's pin of the IOAPIC."),
    SideEvent("kvm_msi_set_irq", "anywhere", "kvm_set_msi (irq_comm.c)", "A message-signalled interrupt."),
    SideEvent("kvm_ioapic_delayed_eoi_inj", "anywhere", "kvm_ioapic_eoi_inject_work (ioapic.c)",
              "A level-triggered line is raised again, later."),
    SideEvent("kvm_apic_ipi", "run loop", "kvm_apic_send_ipi (lapic.c)", "The guest wrote its ICR."),
    SideEvent("kvm_ack_irq", "anywhere", "kvm_notify_acked_irq (virt/kvm/eventfd.c)",
              "The guest ended an interrupt: who waits for that is told."),
    SideEvent("kvm_apicv_accept_irq", "anywhere", "vmx_deliver_interrupt, svm_complete_interrupt_delivery",
              "An interrupt is delivered by hardware."),
    *_rows("run loop", "avic_incomplete_ipi_interception, avic_unaccelerated_access_interception (svm/avic.c)",
           "AVIC could not do it alone.",
           "kvm_avic_incomplete_ipi", "kvm_avic_unaccelerated_access"),
    *_rows("anywhere", "avic_ga_log_notifier, avic_kick_target_vcpus_fast (svm/avic.c); vmx_pi_update_irte",
           "Hardware's interrupt remapping.", "kvm_avic_ga_log", "kvm_avic_kick_vcpu_slowpath",
           "kvm_avic_doorbell", "kvm_pi_irte_update"),
    SideEvent("kvm_apicv_inhibit_changed", "anywhere", "__kvm_set_or_clear_apicv_inhibit (x86.c)",
              "A reason against APICv appears or goes."),
    SideEvent("kvm_vector_hashing", "anywhere", "kvm_intr_is_single_vcpu", "A lowest-priority interrupt."),
    # clocks
    *_rows("run loop", "kvm_guest_time_update, record_steal_time (x86.c)", "A request before the entry.",
           "kvm_pvclock_update", "kvm_pv_tlb_flush"),
    *_rows("anywhere", "kvm_synchronize_tsc, pvclock_update_vm_gtod_copy (x86.c)",
           "The VM's clock: at set-up, from an ioctl, on migration.", "kvm_update_master_clock"),
    # nested guests, and decoding that may be seen anywhere in the run loop
    SideEvent("vcpu_match_mmio", "run loop", "vcpu_is_mmio_gpa, vcpu_mmio_gva_to_gpa (x86.c)",
              "The emulator finds a page that is known to be MMIO."),
    *_rows("anywhere", "svm_enter_smm, kvm_hv_*, nested code", "Details of nested guests.",
           "kvm_nested_vmenter", "kvm_nested_intercepts"),
    # Hyper-V's and Xen's interfaces
    *_rows("anywhere", "hyperv.c, xen.c", "The guest, or the VMM on its behalf, uses a paravirtual interface.",
           "kvm_hv_hypercall_done", "kvm_hv_flush_tlb", "kvm_hv_flush_tlb_ex", "kvm_hv_send_ipi",
           "kvm_hv_send_ipi_ex", "kvm_hv_notify_acked_sint", "kvm_hv_synic_set_irq", "kvm_hv_synic_send_eoi",
           "kvm_hv_synic_set_msr", "kvm_hv_stimer_set_config", "kvm_hv_stimer_set_count",
           "kvm_hv_stimer_cleanup", "kvm_hv_stimer_callback", "kvm_hv_stimer_expiration",
           "kvm_hv_syndbg_set_msr", "kvm_hv_timer_state"),
    # arm64's own
    *_rows("anywhere", "kvm_vm_ioctl_irq_line (arm.c), kvm_vgic_inject_irq (vgic/vgic.c), arch_timer.c",
           "An interrupt line, an interrupt of the GIC or a timer's output changes; the timer is looked at before the "
           "exit is traced.",
           "kvm_irq_line", "vgic_update_irq_pending", "kvm_timer_update_irq", "kvm_timer_hrtimer_expire",
           "kvm_timer_emulate", "kvm_get_timer_map", "kvm_timer_save_state", "kvm_timer_restore_state"),
    SideEvent("kvm_mmio_nisv", "run loop", "io_mem_abort (mmio.c)", "MMIO whose syndrome does not describe it."),
    *_rows("anywhere", "debug.c, mmu.c (kvm_toggle_cache, kvm_set_way_flush)",
           "Debug registers change hands around each entry; caches are switched or cleaned.",
           "kvm_arm_setup_debug", "kvm_arm_clear_debug", "kvm_arm_set_dreg32", "kvm_arm_set_regset",
           "kvm_set_guest_debug", "kvm_toggle_cache", "kvm_set_way_flush"),
    SideEvent("trap_reg", "run loop", "trap_debug_regs (sys_regs.c)", "A trapped debug register is accessed."),
    # asynchronous page faults
    *_rows("anywhere", "kvm_arch_async_page_not_present, kvm_check_async_pf_completion",
           "A page is fetched while the guest goes on.",
           "kvm_async_pf_completed", "kvm_async_pf_repeated_fault", "kvm_try_async_get_page"),
    # memory
    *_rows("anywhere", "MMU notifiers (virt/kvm/kvm_main.c)", "The host changes a mapping, in whatever thread.",
           "kvm_unmap_hva_range", "kvm_set_spte_hva", "kvm_age_hva", "kvm_test_age_hva"),
    *_rows("anywhere", "arch/x86/kvm/mmu/", "KVM's MMU walks, makes or drops translations.",
           "kvm_mmu_pagetable_walk", "kvm_mmu_paging_element", "kvm_mmu_set_accessed_bit", "kvm_mmu_set_dirty_bit",
           "kvm_mmu_walker_error", "kvm_mmu_get_page", "kvm_mmu_sync_page", "kvm_mmu_unsync_page",
           "kvm_mmu_prepare_zap_page", "mark_mmio_spte", "handle_mmio_page_fault", "fast_page_fault",
           "kvm_mmu_zap_all_fast", "check_mmio_spte", "kvm_mmu_set_spte", "kvm_mmu_spte_requested",
           "kvm_tdp_mmu_spte_changed", "kvm_mmu_split_huge_page", "kvm_dirty_ring_push", "kvm_dirty_ring_reset",
           "kvm_dirty_ring_exit"),
    # what the thread does as a process of the host
    *_rows("anywhere", "the host's system calls and scheduler", "The VMM opens, maps, names; threads come and go.",
           "sys_enter_openat", "sys_exit_openat", "sys_enter_close", "sys_exit_close", "sys_enter_mmap",
           "sys_exit_mmap", "sched_process_fork", "sched_process_exit", "sched_migrate_task", "sched_wakeup",
           "sched_waking", "task_rename"),
)}

# fmt: on

# an IPI carries what was written to the ICR, but for the bit that says that it is on its way (kvm_lapic_reg_write)
ICR_BUSY = 0x1000
# probes of the VMM's own functions: bring_up.py has their order
VMM_PREFIX = "vmm_"
