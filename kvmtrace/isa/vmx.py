"""VMX: the exit reasons that KVM knows, what it owes after each, and everything else that is Intel's alone.

One row per reason, keyed on its number; names are verbatim as the kernel prints them. Reasons without a row are
unknown to the model, not errors. Verified against linux 6.1.192 and 6.12.117: kvm_vmx_exit_handlers and
__vmx_handle_exit (arch/x86/kvm/vmx/vmx.c), the kvm_emulate_* functions (arch/x86/kvm/x86.c), and
arch/x86/include/uapi/asm/vmx.h (VMX_EXIT_REASONS; the same names from 6.1 to 6.18, newer kernels only add rows).
"""

from __future__ import annotations

from kvmtrace.isa.base import ExitRow, Isa, Must, RipClass
from kvmtrace.isa.shared import (
    ANY_EXIT_CAUSES,
    EMULATOR_EVENTS,
    EMULATOR_USERSPACE,
    SKIP_USERSPACE,
    X86_ABSENT,
    X86_BYSTANDERS,
    X86_FOLLOW_UPS,
)
from kvmtrace.isa.vmx_nesting import VMX_NESTING
from kvmtrace.isa.vmx_switch import VMX_BRACKETS, VMX_SWITCH, VMX_UNSEEN
from kvmtrace.isa.vmx_words import (
    VMX_BASIC_EXIT_REASON_MASK,
    VMX_BUS_LOCK_DETECTED,
    VMX_EVENT_TYPES,
    VMX_FAILED_VMENTRY,
    classify_ept_violation,
    decode_vmx_cr,
    decode_vmx_dr,
    decode_vmx_io,
    decode_vmx_msr_write,
    describe_ept_violation,
    encode_vmx_fault,
    encode_vmx_io,
    encode_vmx_msr,
)
from kvmtrace.kvm.userspace_exits import (
    KVM_EXIT_DEBUG,
    KVM_EXIT_EXCEPTION,
    KVM_EXIT_FAIL_ENTRY,
    KVM_EXIT_HLT,
    KVM_EXIT_HYPERCALL,
    KVM_EXIT_HYPERV,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_NOTIFY,
    KVM_EXIT_SET_TPR,
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_UNKNOWN,
    KVM_EXIT_X86_BUS_LOCK,
    KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR,
    KVM_EXIT_XEN,
)

_EMULATE = Must(("kvm_emulate_insn",), (1, 1), unless=("exception",))
_HYPERCALL = Must(("kvm_hypercall", "kvm_hv_hypercall", "kvm_xen_hypercall"), (1, 1), unless=("exception",))


def _skip(
    code: int,
    name: str,
    handler: str,
    length: int | tuple[int, int],
    *,
    kinds: tuple[str, ...] = (),
    userspace: frozenset[int] = frozenset(),
    must: tuple[Must, ...] = (),
    may: frozenset[str] = frozenset(),
    checks: tuple[str, ...] = (),
    note: str = "",
    rip_when: tuple[tuple[str, RipClass], ...] = (),
) -> ExitRow:
    """Return the row of an instruction that KVM carries out and steps over.

    Parameters
    ----------
    length : bytes of the shortest encoding, or of the shortest and the longest usual one
    """
    shortest, longest = length if isinstance(length, tuple) else (length, 0)
    return ExitRow(
        code,
        name,
        handler,
        RipClass.ADVANCE,
        shortest,
        longest,
        kinds,
        userspace=userspace | SKIP_USERSPACE,
        must=must,
        may=may,
        checks=checks,
        note=note,
        rip_when=rip_when,
        source=f"{handler}; vmx_skip_emulated_instruction",
    )


def _same(
    code: int,
    name: str,
    handler: str,
    note: str,
    *,
    kinds: tuple[str, ...] = (),
    must: tuple[Must, ...] = (),
    userspace: frozenset[int] = frozenset(),
) -> ExitRow:
    """Return the row of an exit that is no instruction: the guest continues where it was."""
    return ExitRow(
        code, name, handler, RipClass.SAME, kinds=kinds, must=must, userspace=userspace, source=handler, note=note
    )


def _trap(
    code: int, name: str, handler: str, note: str, *, kinds: tuple[str, ...] = (), must: tuple[Must, ...] = ()
) -> ExitRow:
    """Return the row of a trap-like exit: the processor has stepped over the instruction already."""
    return ExitRow(code, name, handler, RipClass.TRAP, kinds=kinds, must=must, source=handler, note=note)


def _fatal(code: int, name: str, handler: str, reason: int, note: str, *, kinds: tuple[str, ...] = ()) -> ExitRow:
    """Return the row of an exit that always goes to userspace."""
    return ExitRow(
        code,
        name,
        handler,
        RipClass.NEVER,
        kinds=kinds,
        in_kernel=False,
        userspace=frozenset({reason}),
        source=handler,
        note=note,
    )


def _unexpected(code: int, name: str, *, kinds: tuple[str, ...] = ()) -> ExitRow:
    """Return the row of a reason that KVM never enables: KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON."""
    return _fatal(
        code,
        name,
        "__vmx_handle_exit (vmx/vmx.c)",
        KVM_EXIT_INTERNAL_ERROR,
        "KVM has no handler: it asks for this exit only on behalf of a nested hypervisor.",
        kinds=kinds,
    )


def _failed_entry(code: int, name: str, note: str, *, kinds: tuple[str, ...] = ()) -> ExitRow:
    return _fatal(code, name, "__vmx_handle_exit (vmx/vmx.c)", KVM_EXIT_FAIL_ENTRY, note, kinds=kinds)


def _nested(code: int, name: str, longest: int = 0, *, kinds: tuple[str, ...] = ()) -> ExitRow:
    """Return the row of a VMX instruction: #UD without nesting, else carried out for the guest hypervisor."""
    return _skip(
        code,
        name,
        "handle_vmx_instruction (vmx/vmx.c), nested_vmx_hardware_setup (vmx/nested.c)",
        (3, longest),
        kinds=kinds,
        userspace=frozenset({KVM_EXIT_INTERNAL_ERROR}),
        note="nested=0: #UD at the same RIP. nested=1: carried out for the guest hypervisor.",
    )


# fmt: off
_ROWS: tuple[ExitRow, ...] = (
    ExitRow(
        0, "EXCEPTION_NMI", "handle_exception_nmi (vmx/vmx.c)", RipClass.EMULATED,
        userspace=EMULATOR_USERSPACE | {KVM_EXIT_EXCEPTION, KVM_EXIT_HLT},  # HLT: handle_rmode_exception
        must=(Must(("kvm_emulate_insn",), (1, 1), unless=("not_ud", "exception")),
              Must(("kvm_page_fault",), (1, 1), unless=("not_pf", "exception"))),
        may=EMULATOR_EVENTS | {"kvm_page_fault"}, source="handle_exception_nmi, handle_ud, kvm_handle_page_fault",
        note="NMI and #MC were served with interrupts off; #UD is emulated; #PF arrives only without EPT; ICEBP "
             "is skipped before its #DB is queued.",
        rip_when=(("icebp", RipClass.ADVANCE),),
        kinds=("exception", "forced", "memory_fault", "virtual_fault", "interrupts_delivery", "undefined_opcode")),
    _same(1, "EXTERNAL_INTERRUPT", "handle_external_interrupt (vmx/vmx.c)",
          "A host interrupt: served by vmx_handle_exit_irqoff, nothing of the guest's is touched.",
          kinds=("external_interrupt", "host", "asynchronous", "forced")),
    _fatal(2, "TRIPLE_FAULT", "handle_triple_fault (vmx/vmx.c)", KVM_EXIT_SHUTDOWN,
           "The guest's triple fault ends the VM.",
           kinds=("triple_fault", "forced")),
    _same(7, "INTERRUPT_WINDOW", "handle_interrupt_window (vmx/vmx.c)",
          "The guest can take interrupts again: KVM_REQ_EVENT, usually followed by kvm_inj_virq.",
          kinds=("interrupt_window", "host", "asynchronous", "forced")),
    _same(8, "NMI_WINDOW", "handle_nmi_window (vmx/vmx.c)",
          "The guest can take an NMI again; its injection leaves no event.",
          kinds=("host", "asynchronous", "forced")),
    ExitRow(9, "TASK_SWITCH", "handle_task_switch (vmx/vmx.c)", RipClass.ANY,
            userspace=frozenset({KVM_EXIT_INTERNAL_ERROR}), source="handle_task_switch; kvm_task_switch",
            note="A hardware task switch is emulated; RIP comes from the new TSS.",
            kinds=("task_switch", "interrupts_delivery")),
    _skip(10, "CPUID", "kvm_emulate_cpuid (cpuid.c)", (2, 2), must=(Must(("kvm_cpuid",), (1, 1),
          unless=("exception",)),),
          note="#GP instead if CPUID faulting is on and CPL > 0.", kinds=("cpuid",)),
    _skip(12, "HLT", "kvm_emulate_halt (x86.c)", (1, 1), userspace=frozenset({KVM_EXIT_HLT}),
          note="RIP advances first; with an in-kernel LAPIC the vCPU then blocks, else KVM_EXIT_HLT.", kinds=("halt",)),
    _skip(13, "INVD", "kvm_emulate_invd (x86.c)", (2, 2), note="A NOP under KVM."),
    _skip(14, "INVLPG", "handle_invlpg (vmx/vmx.c)", 3, note="Only without EPT."),
    _skip(15, "RDPMC", "kvm_emulate_rdpmc (x86.c)", (2, 2), note="#GP for a counter that does not exist."),
    _skip(18, "VMCALL", "kvm_emulate_hypercall (x86.c)", (3, 3),
          userspace=frozenset({KVM_EXIT_HYPERCALL, KVM_EXIT_HYPERV, KVM_EXIT_XEN}), must=(_HYPERCALL,),
          note="KVM_HC_MAP_GPA_RANGE may go to userspace; Hyper-V hypercalls from CPL > 0 raise #UD untraced."),
    _skip(28, "CR_ACCESS", "handle_cr (vmx/vmx.c)", (2, 4), userspace=frozenset({KVM_EXIT_SET_TPR, KVM_EXIT_UNKNOWN}),
          must=(Must(("kvm_cr",), (1, 1)),), checks=("cr_matches_exit",),
          note="MOV CR is 3 bytes, CLTS 2; CR8 writes that lower the TPR go to userspace without in-kernel LAPIC."),
    _skip(29, "DR_ACCESS", "handle_dr (vmx/vmx.c)", (3, 4), rip_when=(("first_dr", RipClass.SAME),),
          note="The first access drops the intercept and is executed again; nothing is traced."),
    _skip(30, "IO_INSTRUCTION", "handle_io (vmx/vmx.c)", (1, 3), userspace=EMULATOR_USERSPACE,
          must=(Must(("kvm_pio",), (1, 1), unless=("string", "pio_in_userspace")),
                Must(("kvm_emulate_insn",), (1, 1), unless=("not_string", "exception"))),
          may=EMULATOR_EVENTS, checks=("pio_matches_exit", "emulated_rip"),
          note="OUT is traced at the exit, IN once its value is there; string I/O is emulated.", kinds=("port_io",)),
    _skip(31, "MSR_READ", "kvm_emulate_rdmsr (x86.c)", (2, 2), userspace=frozenset({KVM_EXIT_X86_RDMSR}),
          must=(Must(("kvm_msr",), (1, 1), unless=("userspace",)),), checks=("msr_direction",),
          note="Nothing is traced if the access goes to userspace, not even on completion.", kinds=("msr", "msr_read")),
    _skip(32, "MSR_WRITE", "kvm_emulate_wrmsr, handle_fastpath_set_msr_irqoff (x86.c)", (2, 2),
          userspace=frozenset({KVM_EXIT_X86_WRMSR}),
          must=(Must(("kvm_msr",), (1, 1), unless=("userspace",)),), checks=("msr_direction",),
          note="x2APIC ICR and TSC deadline are written on the fast path, interrupts still off.",
          kinds=("msr", "msr_write", "fast_path")),
    _failed_entry(33, "INVALID_STATE", "VM-entry failed: invalid guest state."),
    _failed_entry(34, "MSR_LOAD_FAIL", "VM-entry failed while it loaded MSRs."),
    _skip(36, "MWAIT_INSTRUCTION", "kvm_emulate_mwait (x86.c)", (3, 3), note="A NOP under KVM, or #UD."),
    _same(37, "MONITOR_TRAP_FLAG", "handle_monitor_trap (vmx/vmx.c)", "One guest instruction has retired.",
          kinds=("forced",)),
    _skip(39, "MONITOR_INSTRUCTION", "kvm_emulate_monitor (x86.c)", (3, 3), note="A NOP under KVM, or #UD."),
    _skip(40, "PAUSE_INSTRUCTION", "handle_pause (vmx/vmx.c)", (2, 2),
          note="PAUSE-loop exiting: the vCPU yields to another one (kvm_vcpu_on_spin)."),
    _failed_entry(41, "MCE_DURING_VMENTRY", "VM-entry failed on a machine check.", kinds=("forced",)),
    _trap(43, "TPR_BELOW_THRESHOLD", "handle_tpr_below_threshold (vmx/vmx.c)",
          "The TPR fell below the threshold: interrupts pend.",
          kinds=("asynchronous", "forced")),
    ExitRow(
        44, "APIC_ACCESS", "handle_apic_access (vmx/vmx.c)", RipClass.ADVANCE, 2, userspace=EMULATOR_USERSPACE,
        must=(Must(("kvm_emulate_insn", "kvm_eoi"), (1, None), unless=("exception",)),), may=EMULATOR_EVENTS,
        checks=("emulated_rip",), source="handle_apic_access; kvm_lapic_set_eoi",
        note="A plain write to EOI is carried out and skipped without decoding; all else is emulated.",
        kinds=("interrupts_delivery",)),
    _trap(45, "EOI_INDUCED", "handle_apic_eoi_induced (vmx/vmx.c)", "EOI of a vector that the I/O APIC waits for.",
          must=(Must(("kvm_eoi",), (1, None)),), kinds=("hardware_eoi",)),
    ExitRow(46, "GDTR_IDTR", "handle_desc (vmx/vmx.c)", RipClass.EMULATED, userspace=EMULATOR_USERSPACE,
            must=(_EMULATE,), may=EMULATOR_EVENTS, checks=("emulated_rip",), source="handle_desc",
            note="UMIP emulation: SGDT, SIDT."),
    ExitRow(47, "LDTR_TR", "handle_desc (vmx/vmx.c)", RipClass.EMULATED, userspace=EMULATOR_USERSPACE,
            must=(_EMULATE,), may=EMULATOR_EVENTS, checks=("emulated_rip",), source="handle_desc",
            note="UMIP emulation: SLDT, STR, and with descriptor-table exiting LLDT, LTR."),
    ExitRow(
        48, "EPT_VIOLATION", "handle_ept_violation (vmx/vmx.c)", RipClass.EMULATED,
        userspace=EMULATOR_USERSPACE | {KVM_EXIT_MEMORY_FAULT}, must=(Must(("kvm_page_fault",), (1, 1)),),
        may=EMULATOR_EVENTS, checks=("page_fault_rip", "page_fault_error", "emulated_rip", "mmio_matches_page_fault"),
        source="handle_ept_violation; kvm_mmu_page_fault (mmu/mmu.c)",
        note="The page is mapped and the instruction runs again, or it is emulated (first touch of MMIO).",
        kinds=("second_level_fault", "memory_fault", "interrupts_delivery")),
    ExitRow(
        49, "EPT_MISCONFIG", "handle_ept_misconfig (vmx/vmx.c)", RipClass.EMULATED, 1, userspace=EMULATOR_USERSPACE,
        must=(Must(("kvm_fast_mmio", "kvm_emulate_insn"), (1, None), unless=("exception", "retry")),
              Must(("kvm_mmio",), (1, None), unless=("exception", "retry", "fast_mmio", "userspace_pio"))),
        may=EMULATOR_EVENTS | {"kvm_fast_mmio"}, checks=("emulated_rip",),
        source="handle_ept_misconfig; handle_mmio_page_fault (mmu/mmu.c)",
        note="A known MMIO page: its EPT entry is misconfigured on purpose. Never a kvm_page_fault.",
        rip_when=(("fast_mmio", RipClass.ADVANCE),), kinds=("known_mmio", "memory_fault")),
    _same(52, "PREEMPTION_TIMER", "handle_fastpath_preemption_timer (vmx/vmx.c)",
          "The LAPIC timer by VMX preemption timer, or a forced exit; re-enters by fast path.",
          kinds=("host", "asynchronous", "forced", "fast_path")),
    _skip(54, "WBINVD", "kvm_emulate_wbinvd (x86.c)", (2, 3)),
    _skip(55, "XSETBV", "kvm_emulate_xsetbv (x86.c)", (3, 3), note="#GP for an illegal XCR0."),
    _trap(56, "APIC_WRITE", "handle_apic_write (vmx/vmx.c)", "APIC-register virtualization wrote a register.",
          must=(Must(("kvm_apic",), (1, None)),)),
    _same(57, "RDRAND", "kvm_handle_invalid_op (x86.c)", "RDRAND hidden from the guest: #UD.",
          must=(Must(("kvm_inj_exception",), (1, None), unless=("userspace", "interrupted")),)),
    _skip(58, "INVPCID", "handle_invpcid (vmx/vmx.c)", 5, userspace=frozenset({KVM_EXIT_INTERNAL_ERROR}),
          note="#UD, #GP or #PF for bad operands."),
    ExitRow(60, "ENCLS", "handle_encls (vmx/sgx.c)", RipClass.ANY,
            userspace=frozenset({KVM_EXIT_DEBUG, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_UNKNOWN}),
            source="handle_encls", note="SGX: #UD, #GP, or carried out for the guest."),
    _same(61, "RDSEED", "kvm_handle_invalid_op (x86.c)", "RDSEED hidden from the guest: #UD.",
          must=(Must(("kvm_inj_exception",), (1, None), unless=("userspace", "interrupted")),)),
    _same(62, "PML_FULL", "handle_pml_full (vmx/vmx.c)",
          "The page-modification log is full; it was flushed at the exit.",
          must=(Must(("kvm_pml_full",), (1, 1)),), kinds=("asynchronous", "interrupts_delivery")),
    _fatal(74, "BUS_LOCK", "handle_bus_lock_vmexit (vmx/vmx.c)", KVM_EXIT_X86_BUS_LOCK,
           "A bus lock was taken; trap-like, RIP is behind the instruction."),
    _same(75, "NOTIFY", "handle_notify (vmx/vmx.c)", "No interrupt window for too long.",
          userspace=frozenset({KVM_EXIT_NOTIFY}), kinds=("host", "interrupts_delivery")),
    _skip(84, "MSR_READ_IMM", "kvm_emulate_rdmsr_imm (x86.c, 6.18)", 9, userspace=frozenset({KVM_EXIT_X86_RDMSR}),
          must=(Must(("kvm_msr",), (1, 1), unless=("userspace",)),),
          note="RDMSR with an immediate; row from the instruction's encoding, not replayed.",
          kinds=("msr", "msr_read")),
    _skip(85, "MSR_WRITE_IMM", "kvm_emulate_wrmsr_imm (x86.c, 6.18)", 9, userspace=frozenset({KVM_EXIT_X86_WRMSR}),
          must=(Must(("kvm_msr",), (1, 1), unless=("userspace",)),),
          note="WRMSRNS with an immediate; row from the instruction's encoding, not replayed.",
          kinds=("msr", "msr_write")),
    _nested(19, "VMCLEAR"),
    _nested(20, "VMLAUNCH", 3, kinds=("nested_entry",)),
    _nested(21, "VMPTRLD"),
    _nested(22, "VMPTRST"),
    _nested(23, "VMREAD"),
    _nested(24, "VMRESUME", 3, kinds=("nested_entry",)),
    _nested(25, "VMWRITE"),
    _nested(26, "VMOFF"),
    _nested(27, "VMON"),
    _nested(50, "INVEPT"),
    _nested(53, "INVVPID"),
    _nested(59, "VMFUNC"),
    _unexpected(3, "INIT_SIGNAL", kinds=("forced",)),
    _unexpected(4, "SIPI_SIGNAL", kinds=("forced",)),
    _unexpected(11, ""),  # GETSEC
    _unexpected(16, "RDTSC"),
    _unexpected(17, ""),  # RSM
    _unexpected(51, "RDTSCP"),
    _unexpected(63, "XSAVES"),
    _unexpected(64, "XRSTORS"),
    _unexpected(67, "UMWAIT"),
    _unexpected(68, "TPAUSE"),
)
# fmt: on

VMX = Isa(
    name="vmx",
    number=1,  # KVM_ISA_VMX, arch/x86/kvm/trace.h
    title="Intel VT-x (VMX)",
    module="kvm_intel",
    rows=_ROWS,
    other_names={77: "TDCALL"},  # TDX guests, whose registers and handlers are elsewhere
    aliases={"PENDING_INTERRUPT": 7},  # until 4.20, and in trace-cmd's plug-in
    code_mask=VMX_BASIC_EXIT_REASON_MASK,
    flag_names={VMX_FAILED_VMENTRY: "FAILED_VMENTRY"},
    failed_entry_bit=VMX_FAILED_VMENTRY,
    bus_lock_bit=VMX_BUS_LOCK_DETECTED,
    exit_intr_info=True,
    vectoring_field="info2",
    vectoring_refused=True,
    event_types=VMX_EVENT_TYPES,
    decode_io=decode_vmx_io,
    decode_cr=decode_vmx_cr,
    decode_dr=decode_vmx_dr,
    decode_msr_write=decode_vmx_msr_write,
    encode_io=encode_vmx_io,
    encode_msr=encode_vmx_msr,
    encode_fault=encode_vmx_fault,
    describe_fault=describe_ept_violation,
    classify_fault=classify_ept_violation,
    run_function="vmx_vcpu_run",
    run_flags="+{vcpu_vmx.rflags}($arg1)",  # as read last: by vmx_interrupt_blocked, before anything fresh is injected
    run_source="vmx_vcpu_run (vmx/vmx.c)",
    control_structure="VMCS",
    vcpu_object="struct vcpu_vmx with its VMCS",
    late_exit="VMX before 5.8",
    follow_ups=X86_FOLLOW_UPS,
    bystanders=X86_BYSTANDERS,
    absent=X86_ABSENT,
    any_exit_causes=ANY_EXIT_CAUSES,
    world_switch=VMX_SWITCH,
    brackets=VMX_BRACKETS,
    unseen=VMX_UNSEEN,
    bus_lock_userspace=frozenset({KVM_EXIT_X86_BUS_LOCK}),
    # since 5.10; trace_kvm_exit moved from vmx_handle_exit to vmx_vcpu_run in 5.8
    early_exit_field="error_code",
    nesting=VMX_NESTING,
    emulates_real_mode=True,
    hypercall=b"\x0f\x01\xc1",
    resets_fpu=True,
    marks_mmio=True,
    interrupts_without_exit=True,
)
