"""arm64: the world switch as data, as a kernel with the virtualization host extensions (VHE) does it.

Without VHE the same steps are done by the hypervisor code at EL2 (hyp/nvhe/switch.c), which no tracer of the host sees.
Sources: kvm_arch_vcpu_load, kvm_arch_vcpu_ioctl_run (arm.c), __kvm_vcpu_run_vhe (hyp/vhe/switch.c), __guest_enter and
__guest_exit (hyp/entry.S), __kvm_adjust_pc (hyp/exception.c) of 6.1.192; Arm Architecture Reference Manual, "AArch64
Exception Model".
"""

from __future__ import annotations

from kvmtrace.isa.base import SwitchStep

# fmt: off
ARM64_SWITCH: tuple[SwitchStep, ...] = (
    SwitchStep(
        "bind to the CPU", "load the vCPU",
        "vcpu_load takes the vCPU to this CPU: its timers, interrupt interface and, with VHE, its EL1 registers.",
        "", ("VMPIDR_EL2", "CNTVOFF_EL2", "ICH_HCR_EL2"), "kvm_arch_vcpu_load (arm.c)", "kvm_vcpu_ioctl", "kvm_entry"),
    SwitchStep(
        "save host state", "save the host's registers",
        "Interrupts are off; the system registers that host and guest share are saved.",
        "", ("TPIDR_EL0", "SP_EL0"), "sysreg_save_host_state_vhe (hyp/vhe/sysreg-sr.c)", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "load guest state", "stage 2, traps and the program counter",
        "The guest's stage-2 table and traps are switched on; a pending step over an instruction or an exception is "
        "carried out on the saved program counter.",
        "", ("VTTBR_EL2", "VTCR_EL2", "HCR_EL2", "ELR_EL2"),
        "__activate_vm, __activate_traps, __kvm_adjust_pc (hyp/vhe/switch.c)", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "load guest state", "load the general registers",
        "The guest's 31 general registers.", "ERET to EL1 or EL0.", ("ELR_EL2", "SPSR_EL2"),
        "__guest_enter (hyp/entry.S)", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "guest mode", "the guest runs", "", "Until a trapped instruction, an abort or an interrupt.",
        ("HCR_EL2", "VTTBR_EL2"), "the guest", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "save guest state", "exception to EL2",
        "__guest_exit stores the general registers; the syndrome is read, and some exits end here, without kvm_exit.",
        "Writes the syndrome, the return address and state, and the faulting addresses.",
        ("ESR_EL2", "ELR_EL2", "SPSR_EL2", "FAR_EL2", "HPFAR_EL2"),
        "__guest_exit (hyp/entry.S), fixup_guest_exit (hyp/include/hyp/switch.h)", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "load host state", "restore the host's registers",
        "Traps are switched off, the shared system registers get the host's values.", "", ("HCR_EL2", "VBAR_EL1"),
        "__deactivate_traps, sysreg_restore_host_state_vhe (hyp/vhe/switch.c)", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "record the exit reason", "let interrupts in, trace the reason",
        "The interrupt controller and timers are synchronised, interrupts go on, kvm_exit is traced.", "",
        ("ESR_EL2",), "kvm_arch_vcpu_ioctl_run (arm.c)", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "unbind", "put the vCPU",
        "A pending adjustment of the program counter is carried out; vcpu_put saves what vcpu_load loaded.", "",
        (), "kvm_arch_vcpu_ioctl_run, kvm_arch_vcpu_put (arm.c)", "kvm_exit", "kvm_userspace_exit"),
)

ARM64_BRACKETS: tuple[tuple[str, str, str], ...] = (
    ("kvm_entry", "kvm_exit", "the world switch, guest mode, and back; host interrupts at its end"),
    ("kvm_exit", "kvm_entry", "handler, requests, interrupts made ready for the guest"),
)

ARM64_UNSEEN: tuple[str, ...] = (
    "the registers' contents, other than the program counter in kvm_entry and kvm_exit",
    "whether kvm_entry's program counter is still to be adjusted: a step or an exception is carried out behind it",
    "the syndrome, but where kvm_guest_fault or kvm_handle_sys_reg repeats it",
    "exits that the code at EL2 handles by itself: first use of floating point, work-arounds (fixup_guest_exit)",
    "which interrupt the vGIC puts into a list register, and when the guest acknowledges and ends it",
    "without VHE, whatever the hypervisor code does at EL2 (hyp/nvhe): no tracepoint, kprobe or BPF program reaches it",
)
# fmt: on
