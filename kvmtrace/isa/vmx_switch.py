"""VMX: the world switch as data, who does what between the host's and the guest's state, step by step.

Nothing inside vmx_vcpu_enter_exit can be probed (noinstr), so the switch itself always shows as the gap between two
events.
Sources: vcpu_enter_guest (x86.c), vmx_vcpu_run, vmx_prepare_switch_to_guest, vmx_vcpu_enter_exit (vmx/vmx.c),
__vmx_vcpu_run (vmx/vmenter.S) of 6.1.192; SDM "VM Entries", "VM Exits".
"""

from __future__ import annotations

from kvmtrace.isa.base import SwitchStep

# fmt: off
VMX_SWITCH: tuple[SwitchStep, ...] = (
    SwitchStep(
        "bind to the CPU", "make the VMCS current",
        "vcpu_load makes this vCPU's VMCS current on this CPU; on another CPU than last time the old one gives it "
        "up first, and per-CPU host fields are rewritten.",
        "VMPTRLD; VMCLEAR on the CPU that held it, by interprocessor interrupt.",
        ("HOST_TR_BASE", "HOST_GDTR_BASE", "HOST_IA32_SYSENTER_ESP"),
        "vmx_vcpu_load_vmcs (vmx/vmx.c)", "kvm_vcpu_ioctl", "kvm_fpu"),
    SwitchStep(
        "save host state", "swap the FPU",
        "Once per KVM_RUN: the VMM's FPU state is saved and the guest's loaded.", "", (),
        "kvm_load_guest_fpu (x86.c)", "kvm_vcpu_ioctl", "kvm_fpu"),
    SwitchStep(
        "save host state", "save segments, set user-return MSRs",
        "FS, GS, LDT, DS and ES selectors and bases go to the VMCS's host area or host_state; MSRs that only user "
        "mode needs get the guest's values and are restored lazily on return to user mode.",
        "", ("HOST_FS_SELECTOR", "HOST_GS_SELECTOR", "HOST_FS_BASE", "HOST_GS_BASE"),
        "vmx_prepare_switch_to_guest (vmx/vmx.c)", "kvm_exit|kvm_fpu", "vmx_vcpu_run"),
    SwitchStep(
        "save host state", "close the door",
        "Preemption and interrupts go off, vcpu->mode becomes IN_GUEST_MODE; a last look for requests may cancel "
        "the entry and take an injection back.",
        "", ("VM_ENTRY_INTR_INFO_FIELD",), "vcpu_enter_guest (x86.c)", "kvm_exit|kvm_fpu", "vmx_vcpu_run"),
    SwitchStep(
        "load guest state", "write what changed",
        "Dirty RSP and RIP go to the VMCS; everything else is written when it changes. Host CR3 and CR4 are "
        "refreshed. XCR0, XSS and PKRU get the guest's values, the preemption timer its deadline.",
        "", ("GUEST_RSP", "GUEST_RIP", "HOST_CR3", "HOST_CR4", "VMX_PREEMPTION_TIMER_VALUE"),
        "vmx_vcpu_run (vmx/vmx.c)", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "load guest state", "load the general registers",
        "CR2 and SPEC_CTRL, then the 15 general registers except RSP, from vcpu->arch.regs.",
        "", ("HOST_RSP",), "__vmx_vcpu_run (vmx/vmenter.S)", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "load guest state", "VM-entry",
        "VMLAUNCH the first time on this CPU, VMRESUME from then on.",
        "Checks controls, host and guest state; loads CR0, CR3, CR4, RSP, RIP, RFLAGS, segments, GDTR, IDTR, EFER, "
        "PAT from the guest area and the MSR-load list; injects the event.",
        ("GUEST_*", "VM_ENTRY_CONTROLS", "VM_ENTRY_INTR_INFO_FIELD", "VM_ENTRY_MSR_LOAD_ADDR"),
        "__vmx_vcpu_run (vmx/vmenter.S)", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "guest mode", "the guest runs", "", "Until an instruction, an event or the timer causes a VM-exit.",
        ("PIN_BASED_VM_EXEC_CONTROL", "CPU_BASED_VM_EXEC_CONTROL", "SECONDARY_VM_EXEC_CONTROL", "EPT_POINTER"),
        "the guest", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "save guest state", "VM-exit: the guest area", "",
        "Saves CR0, CR3, CR4, RSP, RIP, RFLAGS, segments and, as controls say, EFER, PAT and the timer; writes the "
        "exit reason, qualification, interruption and IDT-vectoring information.",
        ("GUEST_*", "VM_EXIT_REASON", "EXIT_QUALIFICATION", "VM_EXIT_INTR_INFO", "IDT_VECTORING_INFO_FIELD",
         "GUEST_PHYSICAL_ADDRESS", "VM_EXIT_INSTRUCTION_LEN"),
        "the processor", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "load host state", "VM-exit: the host area", "",
        "Loads CR0, CR3, CR4, RSP, RIP = vmx_vmexit, selectors, FS, GS, TR, GDTR, IDTR bases, SYSENTER MSRs, EFER, "
        "PAT; RFLAGS is cleared, so interrupts are off.",
        ("HOST_*", "VM_EXIT_CONTROLS", "VM_EXIT_MSR_LOAD_ADDR"), "the processor", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "save guest state", "save the general registers",
        "vmx_vmexit stores the guest's 15 general registers, then clears them; CR2 is read.",
        "", (), "__vmx_vcpu_run (vmx/vmenter.S)", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "load host state", "restore what the VMCS does not",
        "Return-stack fill, SPEC_CTRL, DEBUGCTL, XCR0, XSS and PKRU.", "", (),
        "vmx_vcpu_run (vmx/vmx.c)", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "record the exit reason", "read and trace the reason",
        "The exit reason and IDT-vectoring information are read and kvm_exit is traced; an interrupted event "
        "delivery is queued again.",
        "", ("VM_EXIT_REASON", "IDT_VECTORING_INFO_FIELD", "EXIT_QUALIFICATION", "VM_EXIT_INTR_INFO"),
        "vmx_vcpu_run, vmx_complete_interrupts (vmx/vmx.c)", "kvm_entry", "kvm_exit"),
    SwitchStep(
        "record the exit reason", "host interrupts, then the handler",
        "With interrupts still off, an NMI or interrupt that caused the exit is served; interrupts go on and the "
        "handler of the reason runs.",
        "", (), "vmx_handle_exit_irqoff, vmx_handle_exit (vmx/vmx.c)", "vmx_vcpu_run_return", "kvm_entry|kvm_fpu"),
    SwitchStep(
        "unbind", "give back segments and FPU",
        "KERNEL_GS_BASE, FS, GS and LDT are restored when the thread is scheduled out or leaves KVM_RUN; the VMM's "
        "FPU comes back; user-return MSRs follow on return to user mode.",
        "", (), "kvm_put_guest_fpu (x86.c), vmx_prepare_switch_to_host (vmx/vmx.c)", "kvm_fpu",
        "kvm_userspace_exit"),
)

VMX_BRACKETS: tuple[tuple[str, str, str], ...] = (
    ("vmx_vcpu_run", "kvm_entry", "entry of the run function: nothing but a look at emulation_required"),
    ("kvm_entry", "kvm_exit", "guest state loaded, guest mode, guest state saved, host state loaded"),
    ("kvm_exit", "vmx_vcpu_run_return", "vectoring information, fast path"),
    ("vmx_vcpu_run_return", "kvm_entry", "host interrupts, handler, injection, next entry's preparation"),
)

VMX_UNSEEN: tuple[str, ...] = (
    "the registers' contents, other than RIP in kvm_entry and kvm_exit",
    "whether VMLAUNCH or VMRESUME was used",
    "MSRs loaded or restored by the VMCS's MSR lists, by VMLOAD, or lazily on return to user mode",
    "an NMI injection, where kvm_entry has no intr_info",
    "that kvm_entry's RIP is KVM's copy: a foreign VMCS with the right copy looks the same",
)
# fmt: on
