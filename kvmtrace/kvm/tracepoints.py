"""Names of the events that kvmtrace records, and the sets a user can ask for.

Kernel names are verbatim. Tracepoints that a kernel lacks are left out by the recorder, which says so.
Sources: arch/x86/kvm/trace.h, arch/arm64/kvm/trace_arm.h, trace_handle_exit.h and vgic/trace.h,
include/trace/events/kvm.h, include/trace/events/sched.h.
"""

from __future__ import annotations

import os

# our own probe events (kprobe / kretprobe / fentry / fexit), system "kvmtrace" in every capture
PROBE_SYSTEM = "kvmtrace"

MINIMAL: tuple[str, ...] = ("kvm:kvm_entry", "kvm:kvm_exit", "kvm:kvm_userspace_exit")

# what KVM traces of its own on each kind of machine, as uname names it; the others are PCs
# fmt: off
_PC: tuple[str, ...] = (
    "kvm:kvm_ack_irq", "kvm:kvm_apic", "kvm:kvm_apic_accept_irq", "kvm:kvm_apic_ipi",
    "kvm:kvm_apicv_accept_irq", "kvm:kvm_async_pf_completed", "kvm:kvm_async_pf_not_present",
    "kvm:kvm_async_pf_ready", "kvm:kvm_avic_incomplete_ipi", "kvm:kvm_avic_unaccelerated_access",
    "kvm:kvm_apicv_inhibit_changed", "kvm:kvm_update_master_clock",
    "kvm:kvm_cpuid", "kvm:kvm_cr", "kvm:kvm_dirty_ring_exit", "kvm:kvm_emulate_insn", "kvm:kvm_eoi",
    "kvm:kvm_fast_mmio", "kvm:kvm_fpu", "kvm:kvm_halt_poll_ns", "kvm:kvm_hv_hypercall",
    "kvm:kvm_hv_stimer_start_one_shot", "kvm:kvm_hv_stimer_start_periodic", "kvm:kvm_hv_syndbg_get_msr",
    "kvm:kvm_hv_timer_state", "kvm:kvm_hypercall", "kvm:kvm_inj_exception", "kvm:kvm_inj_virq",
    "kvm:kvm_invlpga", "kvm:kvm_ioapic_set_irq", "kvm:kvm_mmio", "kvm:kvm_msi_set_irq", "kvm:kvm_msr",
    "kvm:kvm_nested_intercepts", "kvm:kvm_nested_intr_vmexit", "kvm:kvm_nested_vmenter",
    "kvm:kvm_nested_vmenter_failed", "kvm:kvm_nested_vmexit", "kvm:kvm_nested_vmexit_inject",
    "kvm:kvm_nested_vmrun", "kvm:kvm_page_fault", "kvm:kvm_pic_set_irq", "kvm:kvm_pio",
    "kvm:kvm_ple_window_update", "kvm:kvm_pml_full", "kvm:kvm_pv_eoi", "kvm:kvm_pv_tlb_flush",
    "kvm:kvm_pvclock_update", "kvm:kvm_set_irq", "kvm:kvm_skinit", "kvm:kvm_smm_transition",
    "kvm:kvm_track_tsc", "kvm:kvm_vcpu_wakeup", "kvm:kvm_wait_lapic_expire", "kvm:kvm_write_tsc_offset",
    "kvm:kvm_xen_hypercall", "kvm:vcpu_match_mmio",
)
_OF_MACHINES: dict[str, tuple[str, ...]] = {
    "aarch64": (
        "kvm:kvm_access_fault", "kvm:kvm_async_pf_completed", "kvm:kvm_dirty_ring_exit", "kvm:kvm_fpu",
        "kvm:kvm_guest_fault", "kvm:kvm_halt_poll_ns", "kvm:kvm_handle_sys_reg", "kvm:kvm_hvc_arm64",
        "kvm:kvm_irq_line",
        "kvm:kvm_mmio", "kvm:kvm_mmio_nisv", "kvm:kvm_sys_access", "kvm:kvm_timer_hrtimer_expire",
        "kvm:kvm_timer_update_irq", "kvm:kvm_toggle_cache", "kvm:kvm_vcpu_wakeup", "kvm:kvm_wfx_arm64",
        "kvm:vgic_update_irq_pending",
    ),
}

# all that the reference model can use, on this machine
LIFECYCLE: tuple[str, ...] = (
    *MINIMAL,
    *_OF_MACHINES.get(os.uname().machine, _PC),
    "sched:sched_switch", "sched:sched_migrate_task", "sched:sched_process_fork", "sched:sched_process_exit",
    "task:task_rename",
    "syscalls:sys_enter_ioctl", "syscalls:sys_exit_ioctl",
    "syscalls:sys_enter_openat", "syscalls:sys_exit_openat",
    "syscalls:sys_enter_mmap", "syscalls:sys_exit_mmap",
    "syscalls:sys_enter_close",
)

EVENT_SETS: dict[str, tuple[str, ...] | None] = {
    "minimal": MINIMAL,
    "lifecycle": LIFECYCLE,
    "all": None,  # LIFECYCLE plus every tracepoint of the systems kvm and kvmmmu
}
# fmt: on
