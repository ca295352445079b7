"""SVM: the exit codes that KVM knows, what it owes after each, and everything else that is AMD's alone.

One row per code, keyed on its number; names are verbatim as the kernel prints them. Codes that svm_exit_handlers
lacks end in KVM_EXIT_INTERNAL_ERROR (svm_handle_invalid_exit); the ones that have a name stand here too. Processors
without NRIPS (and emulated ones) do not tell the next RIP, so KVM decodes an instruction to skip it:
kvm_emulate_insn may follow every instruction exit.
Verified against linux 6.1.192 and 6.12.117: svm_exit_handlers, svm_handle_exit (arch/x86/kvm/svm/svm.c), and
arch/x86/include/uapi/asm/svm.h (SVM_EXIT_REASONS; the same names from 6.1 to 6.18, newer kernels only add rows).
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
from kvmtrace.isa.svm_nesting import SVM_NESTING
from kvmtrace.isa.svm_switch import SVM_BRACKETS, SVM_SWITCH, SVM_UNSEEN
from kvmtrace.isa.svm_words import (
    SVM_EVENT_TYPES,
    SVM_EXIT_ERR,
    classify_nested_page_fault,
    decode_svm_cr,
    decode_svm_dr,
    decode_svm_io,
    decode_svm_msr_write,
    encode_svm_fault,
    encode_svm_io,
    encode_svm_msr,
)
from kvmtrace.isa.words import describe_page_fault_error
from kvmtrace.kvm.userspace_exits import (
    KVM_EXIT_AP_RESET_HOLD,
    KVM_EXIT_DEBUG,
    KVM_EXIT_FAIL_ENTRY,
    KVM_EXIT_HLT,
    KVM_EXIT_HYPERCALL,
    KVM_EXIT_HYPERV,
    KVM_EXIT_INTERNAL_ERROR,
    KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_SET_TPR,
    KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT,
    KVM_EXIT_X86_BUS_LOCK,
    KVM_EXIT_X86_RDMSR,
    KVM_EXIT_X86_WRMSR,
    KVM_EXIT_XEN,
)

_NONE: frozenset[int] = frozenset()
# skip_emulated_instruction without NRIPS decodes (EMULTYPE_SKIP) but never executes, so it traces nothing else;
# a failed decode is an internal error
_SKIP_MAY = frozenset({"kvm_emulate_insn"})
_SKIP_USERSPACE = SKIP_USERSPACE | {KVM_EXIT_INTERNAL_ERROR}
_PAGE_FAULT = ("page_fault_rip", "page_fault_error", "page_fault_address")
_INVALID_OP = Must(("kvm_inj_exception",), (1, None), unless=("userspace", "interrupted"))


def _skip(
    code: int,
    name: str,
    handler: str,
    length: int | tuple[int, int],
    note: str = "",
    *,
    kinds: tuple[str, ...] = (),
    must: tuple[Must, ...] = (),
    userspace: frozenset[int] = _NONE,
    may: frozenset[str] = frozenset(),
    checks: tuple[str, ...] = (),
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
        userspace=userspace | _SKIP_USERSPACE,
        must=must,
        may=may | _SKIP_MAY,
        checks=("emulated_rip", *checks),
        note=note,
        rip_when=rip_when,
        source=f"{handler}; svm_skip_emulated_instruction",
    )


def _same(
    code: int,
    name: str,
    handler: str,
    note: str,
    *,
    kinds: tuple[str, ...] = (),
    must: tuple[Must, ...] = (),
    userspace: frozenset[int] = _NONE,
) -> ExitRow:
    """Return the row of an exit after which the guest continues where it was."""
    return ExitRow(
        code, name, handler, RipClass.SAME, kinds=kinds, must=must, userspace=userspace, source=handler, note=note
    )


def _emulate(
    code: int,
    name: str,
    handler: str,
    note: str,
    *,
    kinds: tuple[str, ...] = (),
    must: tuple[Must, ...] = (),
    userspace: frozenset[int] = _NONE,
    may: frozenset[str] = frozenset(),
    checks: tuple[str, ...] = (),
    length: int = 0,
    rip_when: tuple[tuple[str, RipClass], ...] = (),
) -> ExitRow:
    """Return the row of an exit that the emulator may handle; without it the guest tries again."""
    return ExitRow(
        code,
        name,
        handler,
        RipClass.EMULATED,
        length,
        rip_when=rip_when,
        kinds=kinds,
        userspace=EMULATOR_USERSPACE | userspace,
        must=must,
        may=EMULATOR_EVENTS | may,
        checks=checks,
        source=handler,
        note=note,
    )


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
    return _fatal(
        code,
        name,
        "svm_handle_invalid_exit (svm/svm.c)",
        KVM_EXIT_INTERNAL_ERROR,
        "KVM has no handler: it does not ask for this intercept.",
        kinds=kinds,
    )


def _sev_es(code: int, name: str, handler: str, note: str, *, kinds: tuple[str, ...] = ()) -> ExitRow:
    """Return the row of an SEV-ES exit: the guest's registers, RIP among them, are not visible."""
    return ExitRow(
        code,
        name,
        handler,
        RipClass.ANY,
        kinds=kinds,
        may=frozenset(X86_FOLLOW_UPS),
        source=handler,
        note=note,
        userspace=EMULATOR_USERSPACE
        | {KVM_EXIT_HLT, KVM_EXIT_HYPERCALL, KVM_EXIT_AP_RESET_HOLD, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_SET_TPR},
    )


def _cr(code: int, name: str) -> ExitRow:
    handler = "cr8_write_interception (svm/svm.c)" if code == 0x18 else "cr_interception (svm/svm.c)"
    return _skip(
        code,
        name,
        handler,
        3,
        "Without decode assists, and for CLTS, LMSW and SMSW, it is emulated.",
        must=(Must(("kvm_cr",), (1, 1), unless=("emulated", "exception")),),
        may=EMULATOR_EVENTS,
        userspace=frozenset({KVM_EXIT_SET_TPR}) if code == 0x18 else _NONE,
        checks=("cr_matches_exit",),
    )


def _dr(code: int, name: str) -> ExitRow:
    return _skip(
        code,
        name,
        "dr_interception (svm/svm.c)",
        3,
        may=EMULATOR_EVENTS,
        note="The first access drops the intercepts and is executed again; nothing is traced.",
        rip_when=(("first_dr", RipClass.SAME),),
    )


_HYPERCALL = Must(("kvm_hypercall", "kvm_hv_hypercall", "kvm_xen_hypercall"), (1, 1), unless=("exception",))
_MMIO = (
    Must(("kvm_emulate_insn",), (1, None), unless=("no_mmio", "retry", "exception", "fast_fault")),
    Must(("kvm_mmio",), (1, None), unless=("no_mmio", "retry", "exception", "userspace_pio", "fast_fault")),
)

# fmt: off
_EXCEPTIONS = (
    _same(0x41, "DB excp", "db_interception (svm/svm.c)", "Reflected to the guest, or KVM_EXIT_DEBUG.",
          userspace=frozenset({KVM_EXIT_DEBUG})),
    _fatal(0x43, "BP excp", "bp_interception (svm/svm.c)", KVM_EXIT_DEBUG,
           "Intercepted only while the VMM debugs the guest."),
    _emulate(0x46, "UD excp", "ud_interception (svm/svm.c), handle_ud (x86.c)",
             "Emulated: the other vendor's hypercall is patched and runs again.",
             must=(Must(("kvm_emulate_insn",), (1, 1), unless=("exception",)),), kinds=("undefined_opcode",)),
    _emulate(0x4E, "PF excp", "pf_interception (svm/svm.c)", "Shadow paging (no NPT).",
             must=(Must(("kvm_page_fault",), (1, 1), unless=("exception",)),), may=frozenset({"kvm_page_fault"}),
             checks=_PAGE_FAULT, kinds=("memory_fault", "virtual_fault")),
    _same(0x52, "MC excp", "mc_interception (svm/svm.c)", "Served by svm_handle_mce with interrupts off."),
    _same(0x51, "AC excp", "ac_interception (svm/svm.c)", "Reflected to the guest."),
    _emulate(0x4D, "GP excp", "gp_interception (svm/svm.c)",
             "VMware backdoor and SVM erratum: decoded, then carried out or reflected as #GP."),
)

_ASYNCHRONOUS = (
    _same(0x60, "interrupt", "intr_interception (svm/svm.c)", "A host interrupt; nothing of the guest's is touched.",
          kinds=("external_interrupt", "host", "asynchronous", "forced")),
    _same(0x61, "nmi", "nmi_interception (svm/svm.c)", "A host NMI.", kinds=("host", "asynchronous", "forced")),
    _same(0x62, "smi", "smi_interception (svm/svm.c)", "A host SMI.", kinds=("host", "asynchronous", "forced")),
    _unexpected(0x63, "init", kinds=("asynchronous", "forced")),
    _same(0x64, "vintr", "interrupt_window_interception (svm/svm.c)",
          "The guest can take interrupts again: KVM_REQ_EVENT, usually followed by kvm_inj_virq.",
          kinds=("interrupt_window", "host", "asynchronous", "forced")),
    _same(0x74, "iret", "iret_interception (svm/svm.c)", "IRET ends NMI masking: the intercept is dropped, IRET runs."),
    _fatal(0x7F, "shutdown", "shutdown_interception (svm/svm.c)", KVM_EXIT_SHUTDOWN,
           "The guest's triple fault; KVM resets the vCPU as by INIT, so RIP becomes 0xfff0.",
           kinds=("triple_fault", "forced")),
    _fatal(SVM_EXIT_ERR, "invalid_guest_state", "svm_handle_exit (svm/svm.c)", KVM_EXIT_FAIL_ENTRY,
           "VMRUN refused the VMCB."),
)

_INSTRUCTIONS = (
    _skip(0x6F, "rdpmc", "kvm_emulate_rdpmc (x86.c)", (2, 2), "#GP for a counter that does not exist."),
    _skip(0x72, "cpuid", "kvm_emulate_cpuid (cpuid.c)", (2, 2),
          must=(Must(("kvm_cpuid",), (1, 1), unless=("exception",)),), kinds=("cpuid",)),
    ExitRow(0x73, "rsm", "rsm_interception (svm/svm.c)", RipClass.ANY, userspace=EMULATOR_USERSPACE,
            must=(Must(("kvm_emulate_insn",), (1, 1), unless=("exception",)),), may=EMULATOR_EVENTS,
            source="rsm_interception; emulator_leave_smm", note="Back from system-management mode."),
    _skip(0x76, "invd", "kvm_emulate_invd (x86.c)", (2, 2), "A NOP under KVM."),
    _skip(0x77, "pause", "pause_interception (svm/svm.c)", (2, 2),
          "The vCPU yields to another one (kvm_vcpu_on_spin)."),
    _skip(0x78, "hlt", "kvm_emulate_halt (x86.c)", (1, 1), "RIP advances first; blocks, or KVM_EXIT_HLT without LAPIC.",
          userspace=frozenset({KVM_EXIT_HLT}), kinds=("halt",)),
    _skip(0x79, "invlpg", "invlpg_interception (svm/svm.c)", 3, "Emulated without decode assists.",
          may=EMULATOR_EVENTS),
    _skip(0x7A, "invlpga", "invlpga_interception (svm/svm.c)", 3, "#UD or #GP without EFER.SVME or at CPL > 0.",
          must=(Must(("kvm_invlpga",), (1, 1), unless=("exception",)),)),
    _skip(0x7B, "io", "io_interception (svm/svm.c)", (1, 3),
          "OUT is traced at the exit, IN once its value is there; string I/O is emulated.",
          must=(Must(("kvm_pio",), (1, 1), unless=("string", "pio_in_userspace")),
                Must(("kvm_emulate_insn",), (1, 1), unless=("not_string", "exception"))),
          userspace=EMULATOR_USERSPACE, may=EMULATOR_EVENTS,
          checks=("pio_matches_exit", "io_next_rip"), kinds=("port_io",)),
    _skip(0x7C, "msr", "msr_interception (svm/svm.c), kvm_emulate_rdmsr, kvm_emulate_wrmsr (x86.c)", (2, 2),
          "6.1 traces a fast-path write to the x2APIC ICR before kvm_exit, whose RIP is then advanced.",
          must=(Must(("kvm_msr",), (1, 1), unless=("userspace", "fastpath")),), checks=("msr_direction",),
          userspace=frozenset({KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR}),
          rip_when=(("fastpath", RipClass.SAME),), kinds=("msr", "msr_read", "msr_write")),
    ExitRow(0x7D, "task_switch", "task_switch_interception (svm/svm.c)", RipClass.ANY, may=_SKIP_MAY,
            userspace=frozenset({KVM_EXIT_INTERNAL_ERROR}),
            source="task_switch_interception; kvm_task_switch",
            note="A hardware task switch is emulated; RIP comes from the new TSS.", kinds=("task_switch",)),
    _skip(0x81, "hypercall", "kvm_emulate_hypercall (x86.c)", (3, 3), must=(_HYPERCALL,),
          userspace=frozenset({KVM_EXIT_HYPERCALL, KVM_EXIT_HYPERV, KVM_EXIT_XEN})),
    _same(0x86, "skinit", "skinit_interception (svm/svm.c)", "Not offered to guests: #UD.",
          must=(Must(("kvm_skinit",), (1, 1)), _INVALID_OP)),
    _same(0x87, "rdtscp", "kvm_handle_invalid_op (x86.c)", "RDTSCP hidden from the guest: #UD.", must=(_INVALID_OP,)),
    _skip(0x89, "wbinvd", "kvm_emulate_wbinvd (x86.c)", (2, 3)),
    _skip(0x8A, "monitor", "kvm_emulate_monitor (x86.c)", (3, 3), "A NOP under KVM, or #UD."),
    _skip(0x8B, "mwait", "kvm_emulate_mwait (x86.c)", (3, 3), "A NOP under KVM, or #UD."),
    _skip(0x8D, "xsetbv", "kvm_emulate_xsetbv (x86.c)", (3, 3), "#GP for an illegal XCR0."),
    _same(0x8E, "", "kvm_handle_invalid_op (x86.c)", "RDPRU hidden from the guest: #UD.", must=(_INVALID_OP,)),
    _skip(0xA2, "invpcid", "invpcid_interception (svm/svm.c)", 5, "#UD, #GP or #PF for bad operands."),
    _fatal(0xA5, "buslock", "bus_lock_exit (svm/svm.c, 6.16)", KVM_EXIT_X86_BUS_LOCK, "Not replayed."),
    _skip(0xA6, "idle-halt", "kvm_emulate_halt (x86.c)", 1,
          "Idle-HLT intercept: HLT with no virtual interrupt pending.",
          userspace=frozenset({KVM_EXIT_HLT})),
)

_NESTED = (
    _skip(0x80, "vmrun", "vmrun_interception (svm/svm.c), nested_svm_vmrun (svm/nested.c)", (3, 3),
          "#UD, #GP, or refused; else the guest hypervisor's guest is entered.", kinds=("nested_entry",)),
    _skip(0x82, "vmload", "vmload_interception (svm/svm.c)", 3, "#UD, #GP, or carried out for the guest hypervisor."),
    _skip(0x83, "vmsave", "vmsave_interception (svm/svm.c)", 3, "#UD, #GP, or carried out for the guest hypervisor."),
    _skip(0x84, "stgi", "stgi_interception (svm/svm.c)", 3, "#UD, #GP, or carried out for the guest hypervisor."),
    _skip(0x85, "clgi", "clgi_interception (svm/svm.c)", 3, "#UD, #GP, or carried out for the guest hypervisor."),
)

_MEMORY = (
    _emulate(0x400, "npf", "npf_interception (svm/svm.c), kvm_mmu_page_fault (mmu/mmu.c)",
             "The page is mapped and the instruction runs again, or MMIO is emulated.",
             must=(Must(("kvm_page_fault",), (1, 1), unless=("fast_fault", "vectored_mmio")), *_MMIO),
             may=frozenset({"kvm_page_fault", "kvm_fast_mmio"}), userspace=frozenset({KVM_EXIT_MEMORY_FAULT}),
             rip_when=(("fast_fault", RipClass.ADVANCE),), length=1,
             checks=(*_PAGE_FAULT, "emulated_rip", "mmio_matches_page_fault"),
             kinds=("second_level_fault", "memory_fault", "known_mmio")),
    ExitRow(0x401, "avic_incomplete_ipi", "avic_incomplete_ipi_interception (svm/avic.c)", RipClass.TRAP,
            source="avic_incomplete_ipi_interception", note="An IPI that AVIC could not deliver."),
    _emulate(0x402, "avic_unaccelerated_access", "avic_unaccelerated_access_interception (svm/avic.c)",
             "Trap-like for most registers; fault-like ones are emulated.", kinds=("hardware_eoi",)),
)

_SEV_ES = (
    _sev_es(0x8F, "write_efer_trap", "efer_trap (svm/svm.c)", "SEV-ES: EFER was written."),
    _sev_es(0x90, "write_cr0_trap", "cr_trap (svm/svm.c)", "SEV-ES: CR0 was written."),
    _sev_es(0x94, "write_cr4_trap", "cr_trap (svm/svm.c)", "SEV-ES: CR4 was written."),
    _sev_es(0x98, "write_cr8_trap", "cr_trap (svm/svm.c)", "SEV-ES: CR8 was written."),
    _sev_es(0x403, "vmgexit", "sev_handle_vmgexit (svm/sev.c)", "SEV-ES: the guest asks through its GHCB.",
            kinds=("encrypted",)),
)
_REGISTERS = (
    _cr(0x00, "read_cr0"),
    _cr(0x03, "read_cr3"),
    _cr(0x04, "read_cr4"),
    _cr(0x08, "read_cr8"),
    _cr(0x10, "write_cr0"),
    _cr(0x13, "write_cr3"),
    _cr(0x14, "write_cr4"),
    _cr(0x18, "write_cr8"),
    _cr(0x65, "cr0_sel_write"),
    _dr(0x20, "read_dr0"),
    _dr(0x21, "read_dr1"),
    _dr(0x22, "read_dr2"),
    _dr(0x23, "read_dr3"),
    _dr(0x24, "read_dr4"),
    _dr(0x25, "read_dr5"),
    _dr(0x26, "read_dr6"),
    _dr(0x27, "read_dr7"),
    _dr(0x30, "write_dr0"),
    _dr(0x31, "write_dr1"),
    _dr(0x32, "write_dr2"),
    _dr(0x33, "write_dr3"),
    _dr(0x34, "write_dr4"),
    _dr(0x35, "write_dr5"),
    _dr(0x36, "write_dr6"),
    _dr(0x37, "write_dr7"),
)

_UNHANDLED = (
    _unexpected(0x02, "read_cr2"),
    _unexpected(0x12, "write_cr2"),
    _unexpected(0x40, "DE excp"),
    _unexpected(0x44, "OF excp"),
    _unexpected(0x45, "BR excp"),
    _unexpected(0x47, "NM excp"),
    _unexpected(0x48, "DF excp"),
    _unexpected(0x4A, "TS excp"),
    _unexpected(0x4B, "NP excp"),
    _unexpected(0x4C, "SS excp"),
    _unexpected(0x50, "MF excp"),
    _unexpected(0x53, "XF excp"),
    _unexpected(0x66, "read_idtr"),
    _unexpected(0x67, "read_gdtr"),
    _unexpected(0x68, "read_ldtr"),
    _unexpected(0x69, "read_rt"),
    _unexpected(0x6A, "write_idtr"),
    _unexpected(0x6B, "write_gdtr"),
    _unexpected(0x6C, "write_ldtr"),
    _unexpected(0x6D, "write_rt"),
    _unexpected(0x6E, "rdtsc"),
    _unexpected(0x70, "pushf"),
    _unexpected(0x71, "popf"),
    _unexpected(0x75, "swint"),
    _unexpected(0x7E, "ferr_freeze"),
    _unexpected(0x88, "icebp"),
)
# fmt: on

# codes of the GHCB protocol never are VMCB exit codes: kvm_vmgexit_enter traces them
# fmt: off
_GHCB_NAMES = {
    0x80000001: "vmgexit_mmio_read",
    0x80000002: "vmgexit_mmio_write",
    0x80000003: "vmgexit_nmi_complete",
    0x80000004: "vmgexit_ap_hlt_loop",
    0x80000005: "vmgexit_ap_jump_table",
    0x80000010: "vmgexit_page_state_change",
    0x80000011: "vmgexit_guest_request",
    0x80000012: "vmgexit_ext_guest_request",
    0x80000013: "vmgexit_ap_creation",
    0x8000FFFD: "vmgexit_hypervisor_feature",
}
# fmt: on

_TABLES = ("IDTR", "GDTR", "LDTR")
_TRACE_CMD_WORDS = {
    "EXCP_": "{} excp",
    "INTR": "interrupt",
    "IOIO": "io",
    "VMMCALL": "hypercall",
    "ERR": "invalid_guest_state",
    **{f"{table}_{way.upper()}": f"{way}_{table.lower()}" for table in _TABLES for way in ("read", "write")},
    "TR_READ": "read_rt",
    "TR_WRITE": "write_rt",
}

SVM = Isa(
    name="svm",
    number=2,  # KVM_ISA_SVM, arch/x86/kvm/trace.h
    title="AMD-V (SVM)",
    module="kvm_amd",
    rows=(*_EXCEPTIONS, *_ASYNCHRONOUS, *_INSTRUCTIONS, *_NESTED, *_MEMORY, *_SEV_ES, *_REGISTERS, *_UNHANDLED),
    other_names=_GHCB_NAMES,
    prefix="EXIT_",
    prefixed_words=_TRACE_CMD_WORDS,
    failed_entry_code=SVM_EXIT_ERR,
    hexadecimal=True,
    vectoring_field="intr_info",  # EXITINTINFO
    fault_address_field="info2",
    next_rip_field="info2",
    event_types=SVM_EVENT_TYPES,
    decode_io=decode_svm_io,
    decode_cr=decode_svm_cr,
    decode_dr=decode_svm_dr,
    decode_msr_write=decode_svm_msr_write,
    encode_io=encode_svm_io,
    encode_msr=encode_svm_msr,
    encode_fault=encode_svm_fault,
    describe_fault=describe_page_fault_error,
    classify_fault=classify_nested_page_fault,
    hypercall=b"\x0f\x01\xd9",
    run_function="svm_vcpu_run",
    run_flags="+0x570(+{vcpu_svm.vmcb}($arg1))",  # APM, layout of the VMCB: state save area at 0x400, RFLAGS at 0x170
    run_source="svm_vcpu_run (svm/svm.c)",
    late_exit="SVM before 6.5",
    control_structure="VMCB",
    vcpu_object="struct vcpu_svm with its VMCB",
    follow_ups=X86_FOLLOW_UPS,
    bystanders=X86_BYSTANDERS,
    absent=X86_ABSENT,
    any_exit_causes=ANY_EXIT_CAUSES,
    world_switch=SVM_SWITCH,
    brackets=SVM_BRACKETS,
    unseen=SVM_UNSEEN,
    nesting=SVM_NESTING,
    decodes_to_skip=True,
    soft_events_move_rip=True,
)
