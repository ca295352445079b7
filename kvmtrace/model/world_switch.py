"""The world switch as data: who does what between the host's and the guest's state, step by step.

One VM-entry and VM-exit of a vCPU, from KVM_RUN to the recorded exit reason and back. Each step says what
KVM's code does, what the processor does by itself, which VMCS or VMCB fields take part, and between which
recorded events it lies: `after` is the last event (or probe) before it, `before` the first one behind it.
Nothing inside vmx_vcpu_enter_exit and svm_vcpu_enter_exit can be probed (noinstr), so the switch itself
always shows as the gap between two events.

Sources: vcpu_enter_guest (x86.c), vmx_vcpu_run, vmx_prepare_switch_to_guest, vmx_vcpu_enter_exit
(vmx/vmx.c), __vmx_vcpu_run (vmx/vmenter.S), svm_vcpu_run, svm_prepare_switch_to_guest (svm/svm.c),
__svm_vcpu_run (svm/vmenter.S) of 6.1.192; SDM "VM Entries", "VM Exits"; APM "VMRUN and #VMEXIT".
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

# the phases of the lifecycle, in order
# fmt: off
PHASES: tuple[str, ...] = (
    "bind to the CPU",
    "save host state",
    "load guest state",
    "guest mode",
    "save guest state",
    "load host state",
    "record the exit reason",
    "unbind",
)
# fmt: on


@dataclass(frozen=True)
class SwitchStep:
    """One step of the world switch.

    Parameters
    ----------
    phase : str, one of PHASES
    title : str, a few words
    kvm : str, what KVM's code does; "" if the processor acts alone
    hardware : str, what the processor does by itself; "" if nothing
    fields : VMCS or VMCB fields read or written, by the kernel's names
    function : str, kernel function and file
    after, before : recorded events between which the step lies; "a|b" where kernels differ
    """

    phase: str
    title: str
    kvm: str
    hardware: str
    fields: tuple[str, ...]
    function: str
    after: str
    before: str


# fmt: off
VMX_STEPS: tuple[SwitchStep, ...] = (
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
# fmt: on

_SVM_BACK = "svm_vcpu_run_return|kvm_exit"

# fmt: off
SVM_STEPS: tuple[SwitchStep, ...] = (
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
# fmt: on

STEPS_BY_ISA: dict[str, tuple[SwitchStep, ...]] = {"vmx": VMX_STEPS, "svm": SVM_STEPS}

# ISA -> (event, the next one, what lies between): the intervals that a recording can time
# fmt: off
BRACKETS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "vmx": (
        ("vmx_vcpu_run", "kvm_entry", "entry of the run function: nothing but a look at emulation_required"),
        ("kvm_entry", "kvm_exit", "guest state loaded, guest mode, guest state saved, host state loaded"),
        ("kvm_exit", "vmx_vcpu_run_return", "vectoring information, fast path"),
        ("vmx_vcpu_run_return", "kvm_entry", "host interrupts, handler, injection, next entry's preparation"),
    ),
    "svm": (
        ("svm_vcpu_run", "kvm_entry", "entry of the run function: nothing"),
        ("kvm_entry", "svm_vcpu_run_return", "guest state loaded, guest mode, guest state saved, host state loaded"),
        ("svm_vcpu_run_return", "kvm_exit", "up to 6.4: host interrupts are served, preemption is possible"),
        ("kvm_exit", "kvm_entry", "handler, injection, next entry's preparation"),
    ),
}

# what a recording cannot show of the switch, whatever is recorded
UNSEEN: tuple[str, ...] = (
    "the registers' contents, other than RIP in kvm_entry and kvm_exit",
    "whether VMLAUNCH or VMRESUME was used",
    "MSRs loaded or restored by the VMCS's MSR lists, by VMLOAD, or lazily on return to user mode",
    "an NMI injection, where kvm_entry has no intr_info",
    "that kvm_entry's RIP is KVM's copy: a foreign VMCS with the right copy looks the same",
)
# fmt: on


def steps_as_dicts(isa: str) -> list[dict[str, Any]]:
    """Return the steps of an ISA ("vmx" or "svm") as plain dictionaries, for JSON."""
    return [asdict(step) for step in STEPS_BY_ISA[isa]]
