"""SVM: the world switch as data, who does what between the host's and the guest's state, step by step.

Nothing inside svm_vcpu_enter_exit can be probed (noinstr), so the switch itself always shows as the gap between two
events.
Sources: vcpu_enter_guest (x86.c), svm_vcpu_run, svm_prepare_switch_to_guest (svm/svm.c), __svm_vcpu_run
(svm/vmenter.S) of 6.1.192; APM "VMRUN and #VMEXIT".
"""

from __future__ import annotations

from kvmtrace.isa.base import SwitchStep

_SVM_BACK = "svm_vcpu_run_return|kvm_exit"

# fmt: off
SVM_SWITCH: tuple[SwitchStep, ...] = (
    SwitchStep(
        "bind to the CPU", "take the VMCB to this CPU",
        "vcpu_load notes the CPU; a VMCB that ran elsewhere gets a new ASID and has nothing cached.", "",
        ("control.asid", "control.clean"), "svm_vcpu_load, pre_svm_run (svm/svm.c)", "kvm_vcpu_ioctl", "kvm_fpu"),
    SwitchStep(
        "save host state", "swap the FPU",
        "Once per KVM_RUN: the VMM's FPU state is saved and the guest's loaded.", "", (),
        "kvm_load_guest_fpu (x86.c)", "kvm_vcpu_ioctl", "kvm_fpu"),
    SwitchStep(
        "save host state", "save what VMRUN does not",
        "FS, GS, TR, LDTR, KERNEL_GS_BASE and the SYSCALL and SYSENTER MSRs go to the CPU's host save area; TSC_AUX "
        "is set for the guest and restored on return to user mode.",
        "VMSAVE to the host save area.", ("host save area",), "svm_prepare_switch_to_guest (svm/svm.c)",
        "kvm_exit|kvm_fpu", "svm_vcpu_run"),
    SwitchStep(
        "save host state", "close the door",
        "Preemption and interrupts go off, vcpu->mode becomes IN_GUEST_MODE; a last look for requests may cancel "
        "the entry and take an injection back.",
        "", ("control.event_inj",), "vcpu_enter_guest (x86.c)", "kvm_exit|kvm_fpu", "svm_vcpu_run"),
    SwitchStep(
        "load guest state", "write what changed",
        "RAX, RSP, RIP and CR2 go to the VMCB, the task priority to V_TPR, the ASID to the control area; CLGI holds "
        "off everything; XCR0, XSS, PKRU and SPEC_CTRL get the guest's values.",
        "CLGI: no interrupt, NMI or SMI until STGI.",
        ("save.rax", "save.rsp", "save.rip", "save.cr2", "control.int_ctl", "control.asid", "control.clean"),
        "svm_vcpu_run (svm/svm.c)", "kvm_entry", _SVM_BACK),
    SwitchStep(
        "load guest state", "load the general registers",
        "VMLOAD of the guest's FS, GS, TR, LDTR and MSRs, then 14 general registers (RAX and RSP are in the VMCB).",
        "VMLOAD from the VMCB.", ("save.fs", "save.gs", "save.tr", "save.ldtr", "save.kernel_gs_base"),
        "__svm_vcpu_run (svm/vmenter.S)", "kvm_entry", _SVM_BACK),
    SwitchStep(
        "load guest state", "VM-entry", "VMRUN.",
        "Saves the host's CR0, CR3, CR4, EFER, RFLAGS, RIP, RSP, RAX, CS, SS, DS, ES, GDTR, IDTR at VM_HSAVE_PA; "
        "checks and loads the guest's from the VMCB; injects EVENTINJ.",
        ("save.*", "control.event_inj", "VM_HSAVE_PA"), "__svm_vcpu_run (svm/vmenter.S)", "kvm_entry", _SVM_BACK),
    SwitchStep(
        "guest mode", "the guest runs", "", "Until an intercept or a fault causes a #VMEXIT.",
        ("control.intercepts", "control.iopm_base_pa", "control.msrpm_base_pa", "control.nested_cr3"), "the guest",
        "kvm_entry", _SVM_BACK),
    SwitchStep(
        "save guest state", "#VMEXIT: the save area", "",
        "Saves CR0, CR3, CR4, EFER, RFLAGS, RIP, RSP, RAX, CS, SS, DS, ES, GDTR, IDTR and CPL; writes EXITCODE, "
        "EXITINFO1, EXITINFO2, EXITINTINFO and, with NRIPS, the next RIP.",
        ("save.*", "control.exit_code", "control.exit_info_1", "control.exit_info_2", "control.exit_int_info",
         "control.next_rip"),
        "the processor", "kvm_entry", _SVM_BACK),
    SwitchStep(
        "load host state", "#VMEXIT: the host save area", "",
        "Clears GIF and loads the host state that VMRUN saved; execution continues behind VMRUN.",
        ("VM_HSAVE_PA",), "the processor", "kvm_entry", _SVM_BACK),
    SwitchStep(
        "save guest state", "save the general registers",
        "The 14 general registers are stored and cleared; VMSAVE keeps FS, GS, TR, LDTR and MSRs; RAX, RSP, RIP and "
        "CR2 are read from the VMCB.",
        "VMSAVE to the VMCB.", ("save.fs", "save.gs", "save.rax", "save.rsp", "save.rip", "save.cr2"),
        "__svm_vcpu_run (svm/vmenter.S), svm_vcpu_run (svm/svm.c)", "kvm_entry", _SVM_BACK),
    SwitchStep(
        "load host state", "restore what VMRUN does not",
        "VMLOAD of the host save area, return-stack fill, SPEC_CTRL, TSS; XCR0, XSS and PKRU; STGI lets NMIs in; the "
        "guest's CR8 goes back to the LAPIC.",
        "VMLOAD, STGI.", ("host save area", "control.int_ctl"),
        "svm_vcpu_run (svm/svm.c)", "kvm_entry", _SVM_BACK),
    SwitchStep(
        "record the exit reason", "queue again what was interrupted",
        "EXITINTINFO: an interrupted event delivery is queued again.", "", ("control.exit_int_info",),
        "svm_complete_interrupts (svm/svm.c)", "kvm_entry", _SVM_BACK),
    SwitchStep(
        "record the exit reason", "trace the reason, run the handler",
        "Up to 6.4 interrupts are on again and host interrupts were served before svm_handle_exit traces kvm_exit; "
        "from 6.5 on svm_vcpu_run traces it with interrupts off. Then the handler of the code runs.",
        "", ("control.exit_code", "control.exit_info_1", "control.exit_info_2"),
        "svm_handle_exit (svm/svm.c)", "kvm_entry|svm_vcpu_run_return", "kvm_exit"),
    SwitchStep(
        "unbind", "give back the FPU",
        "The VMM's FPU comes back; user-return MSRs follow on return to user mode.", "", (),
        "kvm_put_guest_fpu (x86.c), svm_vcpu_put (svm/svm.c)", "kvm_fpu", "kvm_userspace_exit"),
)

SVM_BRACKETS: tuple[tuple[str, str, str], ...] = (
    ("svm_vcpu_run", "kvm_entry", "entry of the run function: nothing"),
    ("kvm_entry", "svm_vcpu_run_return", "guest state loaded, guest mode, guest state saved, host state loaded"),
    ("svm_vcpu_run_return", "kvm_exit", "up to 6.4: host interrupts are served, preemption is possible"),
    ("kvm_exit", "kvm_entry", "handler, injection, next entry's preparation"),
)

SVM_UNSEEN: tuple[str, ...] = (
    "the registers' contents, other than RIP in kvm_entry and kvm_exit",
    "MSRs loaded or restored by the VMCS's MSR lists, by VMLOAD, or lazily on return to user mode",
    "an NMI injection, where kvm_entry has no intr_info",
)
# fmt: on
