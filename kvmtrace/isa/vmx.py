"""VMX: what KVM owes after each basic exit reason.

One row per reason that KVM knows, keyed on its number; names are in kvm/exit_reasons.py. Reasons without a
row are unknown to the model, not errors. Verified against linux 6.1.192 and 6.12.117: kvm_vmx_exit_handlers
and __vmx_handle_exit (arch/x86/kvm/vmx/vmx.c) and the kvm_emulate_* functions (arch/x86/kvm/x86.c).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmtrace.isa.base import ExitExpectation, Must, RipClass
from kvmtrace.isa.shared import EMULATOR_EVENTS, EMULATOR_USERSPACE, SKIP_USERSPACE
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

if TYPE_CHECKING:
    from collections.abc import Mapping

# Valid IDT-vectoring information with any other reason ends in KVM_EXIT_INTERNAL_ERROR (__vmx_handle_exit):
# EXCEPTION_NMI, TASK_SWITCH, APIC_ACCESS, EPT_VIOLATION, PML_FULL, NOTIFY
VMX_VECTORING_EXEMPT: frozenset[int] = frozenset({0, 9, 44, 48, 62, 75})

_NEVER = RipClass.NEVER
_EMULATE = Must(("kvm_emulate_insn",), (1, 1), unless=("exception",))
_HYPERCALL = Must(("kvm_hypercall", "kvm_hv_hypercall", "kvm_xen_hypercall"), (1, 1), unless=("exception",))


def _skip(
    code: int,
    handler: str,
    length: int,
    *,
    userspace: frozenset[int] = frozenset(),
    must: tuple[Must, ...] = (),
    may: frozenset[str] = frozenset(),
    checks: tuple[str, ...] = (),
    note: str = "",
    rip_when: tuple[tuple[str, RipClass], ...] = (),
) -> ExitExpectation:
    """Return the row of an instruction that KVM carries out and steps over."""
    return ExitExpectation(
        code,
        handler,
        RipClass.ADVANCE,
        length,
        userspace=userspace | SKIP_USERSPACE,
        must=must,
        may=may,
        checks=checks,
        note=note,
        rip_when=rip_when,
        source=f"{handler}; vmx_skip_emulated_instruction",
    )


def _same(
    code: int, handler: str, note: str, *, must: tuple[Must, ...] = (), userspace: frozenset[int] = frozenset()
) -> ExitExpectation:
    """Return the row of an exit that is no instruction: the guest continues where it was."""
    return ExitExpectation(code, handler, RipClass.SAME, must=must, userspace=userspace, source=handler, note=note)


def _trap(code: int, handler: str, note: str, *, must: tuple[Must, ...] = ()) -> ExitExpectation:
    """Return the row of a trap-like exit: the processor has stepped over the instruction already."""
    return ExitExpectation(code, handler, RipClass.TRAP, must=must, source=handler, note=note)


def _fatal(code: int, handler: str, reason: int, note: str) -> ExitExpectation:
    """Return the row of an exit that always goes to userspace."""
    return ExitExpectation(
        code, handler, _NEVER, in_kernel=False, userspace=frozenset({reason}), source=handler, note=note
    )


def _unexpected(code: int) -> ExitExpectation:
    """Return the row of a reason that KVM never enables: KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON."""
    return _fatal(
        code,
        "__vmx_handle_exit (vmx/vmx.c)",
        KVM_EXIT_INTERNAL_ERROR,
        "KVM has no handler: it asks for this exit only on behalf of a nested hypervisor.",
    )


def _failed_entry(code: int, note: str) -> ExitExpectation:
    return _fatal(code, "__vmx_handle_exit (vmx/vmx.c)", KVM_EXIT_FAIL_ENTRY, note)


def _nested(code: int) -> ExitExpectation:
    """Return the row of a VMX instruction: #UD without nesting, else carried out for the guest hypervisor."""
    return _skip(
        code,
        "handle_vmx_instruction (vmx/vmx.c), nested_vmx_hardware_setup (vmx/nested.c)",
        3,
        userspace=frozenset({KVM_EXIT_INTERNAL_ERROR}),
        note="nested=0: #UD at the same RIP. nested=1: carried out for the guest hypervisor.",
    )


_VMX_INSTRUCTIONS = (19, 20, 21, 22, 23, 24, 25, 26, 27, 50, 53, 59)
_UNEXPECTED = (3, 4, 11, 16, 17, 51, 63, 64, 67, 68)

# fmt: off
_ROWS: tuple[ExitExpectation, ...] = (
    ExitExpectation(
        0, "handle_exception_nmi (vmx/vmx.c)", RipClass.EMULATED,
        userspace=EMULATOR_USERSPACE | {KVM_EXIT_EXCEPTION},
        must=(Must(("kvm_emulate_insn",), (1, 1), unless=("not_ud", "exception")),
              Must(("kvm_page_fault",), (1, 1), unless=("not_pf", "exception"))),
        may=EMULATOR_EVENTS | {"kvm_page_fault"}, source="handle_exception_nmi, handle_ud, kvm_handle_page_fault",
        note="NMI and #MC were served with interrupts off; #UD is emulated; #PF arrives only without EPT; ICEBP "
             "is skipped before its #DB is queued.",
        rip_when=(("icebp", RipClass.ADVANCE),)),
    _same(1, "handle_external_interrupt (vmx/vmx.c)",
          "A host interrupt: served by vmx_handle_exit_irqoff, nothing of the guest's is touched."),
    _fatal(2, "handle_triple_fault (vmx/vmx.c)", KVM_EXIT_SHUTDOWN, "The guest's triple fault ends the VM."),
    _same(7, "handle_interrupt_window (vmx/vmx.c)",
          "The guest can take interrupts again: KVM_REQ_EVENT, usually followed by kvm_inj_virq."),
    _same(8, "handle_nmi_window (vmx/vmx.c)", "The guest can take an NMI again; its injection leaves no event."),
    ExitExpectation(9, "handle_task_switch (vmx/vmx.c)", RipClass.ANY,
                    userspace=frozenset({KVM_EXIT_INTERNAL_ERROR}), source="handle_task_switch; kvm_task_switch",
                    note="A hardware task switch is emulated; RIP comes from the new TSS."),
    _skip(10, "kvm_emulate_cpuid (cpuid.c)", 2, must=(Must(("kvm_cpuid",), (1, 1), unless=("exception",)),),
          note="#GP instead if CPUID faulting is on and CPL > 0."),
    _skip(12, "kvm_emulate_halt (x86.c)", 1, userspace=frozenset({KVM_EXIT_HLT}),
          note="RIP advances first; with an in-kernel LAPIC the vCPU then blocks, else KVM_EXIT_HLT."),
    _skip(13, "kvm_emulate_invd (x86.c)", 2, note="A NOP under KVM."),
    _skip(14, "handle_invlpg (vmx/vmx.c)", 3, note="Only without EPT."),
    _skip(15, "kvm_emulate_rdpmc (x86.c)", 2, note="#GP for a counter that does not exist."),
    _skip(18, "kvm_emulate_hypercall (x86.c)", 3,
          userspace=frozenset({KVM_EXIT_HYPERCALL, KVM_EXIT_HYPERV, KVM_EXIT_XEN}), must=(_HYPERCALL,),
          note="KVM_HC_MAP_GPA_RANGE may go to userspace; Hyper-V hypercalls from CPL > 0 raise #UD untraced."),
    _skip(28, "handle_cr (vmx/vmx.c)", 2, userspace=frozenset({KVM_EXIT_SET_TPR, KVM_EXIT_UNKNOWN}),
          must=(Must(("kvm_cr",), (1, 1)),), checks=("cr_matches_qualification",),
          note="MOV CR is 3 bytes, CLTS 2; CR8 writes that lower the TPR go to userspace without in-kernel LAPIC."),
    _skip(29, "handle_dr (vmx/vmx.c)", 3, rip_when=(("first_dr", RipClass.SAME),),
          note="The first access drops the intercept and is executed again; nothing is traced."),
    _skip(30, "handle_io (vmx/vmx.c)", 1, userspace=EMULATOR_USERSPACE,
          must=(Must(("kvm_pio",), (1, 1), unless=("string", "pio_in_userspace")),
                Must(("kvm_emulate_insn",), (1, 1), unless=("not_string", "exception"))),
          may=EMULATOR_EVENTS, checks=("pio_matches_qualification", "emulated_rip"),
          note="OUT is traced at the exit, IN once its value is there; string I/O is emulated."),
    _skip(31, "kvm_emulate_rdmsr (x86.c)", 2, userspace=frozenset({KVM_EXIT_X86_RDMSR}),
          must=(Must(("kvm_msr",), (1, 1), unless=("userspace",)),), checks=("msr_direction",),
          note="Nothing is traced if the access goes to userspace, not even on completion."),
    _skip(32, "kvm_emulate_wrmsr, handle_fastpath_set_msr_irqoff (x86.c)", 2,
          userspace=frozenset({KVM_EXIT_X86_WRMSR}),
          must=(Must(("kvm_msr",), (1, 1), unless=("userspace",)),), checks=("msr_direction",),
          note="x2APIC ICR and TSC deadline are written on the fast path, interrupts still off."),
    _failed_entry(33, "VM-entry failed: invalid guest state."),
    _failed_entry(34, "VM-entry failed while it loaded MSRs."),
    _skip(36, "kvm_emulate_mwait (x86.c)", 3, note="A NOP under KVM, or #UD."),
    _same(37, "handle_monitor_trap (vmx/vmx.c)", "One guest instruction has retired."),
    _skip(39, "kvm_emulate_monitor (x86.c)", 3, note="A NOP under KVM, or #UD."),
    _skip(40, "handle_pause (vmx/vmx.c)", 2,
          note="PAUSE-loop exiting: the vCPU yields to another one (kvm_vcpu_on_spin)."),
    _failed_entry(41, "VM-entry failed on a machine check."),
    _trap(43, "handle_tpr_below_threshold (vmx/vmx.c)", "The TPR fell below the threshold: interrupts pend."),
    ExitExpectation(
        44, "handle_apic_access (vmx/vmx.c)", RipClass.ADVANCE, 2, userspace=EMULATOR_USERSPACE,
        must=(Must(("kvm_emulate_insn", "kvm_eoi"), (1, None), unless=("exception",)),), may=EMULATOR_EVENTS,
        checks=("emulated_rip",), source="handle_apic_access; kvm_lapic_set_eoi",
        note="A plain write to EOI is carried out and skipped without decoding; all else is emulated."),
    _trap(45, "handle_apic_eoi_induced (vmx/vmx.c)", "EOI of a vector that the I/O APIC waits for.",
          must=(Must(("kvm_eoi",), (1, None)),)),
    ExitExpectation(46, "handle_desc (vmx/vmx.c)", RipClass.EMULATED, userspace=EMULATOR_USERSPACE,
                    must=(_EMULATE,), may=EMULATOR_EVENTS, checks=("emulated_rip",), source="handle_desc",
                    note="UMIP emulation: SGDT, SIDT."),
    ExitExpectation(47, "handle_desc (vmx/vmx.c)", RipClass.EMULATED, userspace=EMULATOR_USERSPACE,
                    must=(_EMULATE,), may=EMULATOR_EVENTS, checks=("emulated_rip",), source="handle_desc",
                    note="UMIP emulation: SLDT, STR, and with descriptor-table exiting LLDT, LTR."),
    ExitExpectation(
        48, "handle_ept_violation (vmx/vmx.c)", RipClass.EMULATED,
        userspace=EMULATOR_USERSPACE | {KVM_EXIT_MEMORY_FAULT}, must=(Must(("kvm_page_fault",), (1, 1)),),
        may=EMULATOR_EVENTS, checks=("page_fault_matches_exit", "emulated_rip", "mmio_matches_page_fault"),
        source="handle_ept_violation; kvm_mmu_page_fault (mmu/mmu.c)",
        note="The page is mapped and the instruction runs again, or it is emulated (first touch of MMIO)."),
    ExitExpectation(
        49, "handle_ept_misconfig (vmx/vmx.c)", RipClass.EMULATED, 1, userspace=EMULATOR_USERSPACE,
        must=(Must(("kvm_fast_mmio", "kvm_emulate_insn"), (1, None), unless=("exception", "retry")),
              Must(("kvm_mmio",), (1, None), unless=("exception", "retry", "fast_mmio", "userspace_pio"))),
        may=EMULATOR_EVENTS | {"kvm_fast_mmio"}, checks=("emulated_rip", "fast_mmio_length"),
        source="handle_ept_misconfig; handle_mmio_page_fault (mmu/mmu.c)",
        note="A known MMIO page: its EPT entry is misconfigured on purpose. Never a kvm_page_fault.",
        rip_when=(("fast_mmio", RipClass.ADVANCE),)),
    _same(52, "handle_fastpath_preemption_timer (vmx/vmx.c)",
          "The LAPIC timer by VMX preemption timer, or a forced exit; re-enters by fast path."),
    _skip(54, "kvm_emulate_wbinvd (x86.c)", 2),
    _skip(55, "kvm_emulate_xsetbv (x86.c)", 3, note="#GP for an illegal XCR0."),
    _trap(56, "handle_apic_write (vmx/vmx.c)", "APIC-register virtualization wrote a register.",
          must=(Must(("kvm_apic",), (1, None)),)),
    _same(57, "kvm_handle_invalid_op (x86.c)", "RDRAND hidden from the guest: #UD.",
          must=(Must(("kvm_inj_exception",), (1, None), unless=("userspace", "interrupted")),)),
    _skip(58, "handle_invpcid (vmx/vmx.c)", 5, userspace=frozenset({KVM_EXIT_INTERNAL_ERROR}),
          note="#UD, #GP or #PF for bad operands."),
    ExitExpectation(60, "handle_encls (vmx/sgx.c)", RipClass.ANY,
                    userspace=frozenset({KVM_EXIT_DEBUG, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_UNKNOWN}),
                    source="handle_encls", note="SGX: #UD, #GP, or carried out for the guest."),
    _same(61, "kvm_handle_invalid_op (x86.c)", "RDSEED hidden from the guest: #UD.",
          must=(Must(("kvm_inj_exception",), (1, None), unless=("userspace", "interrupted")),)),
    _same(62, "handle_pml_full (vmx/vmx.c)", "The page-modification log is full; it was flushed at the exit.",
          must=(Must(("kvm_pml_full",), (1, 1)),)),
    _fatal(74, "handle_bus_lock_vmexit (vmx/vmx.c)", KVM_EXIT_X86_BUS_LOCK,
           "A bus lock was taken; trap-like, RIP is behind the instruction."),
    _same(75, "handle_notify (vmx/vmx.c)", "No interrupt window for too long.",
          userspace=frozenset({KVM_EXIT_NOTIFY})),
    _skip(84, "kvm_emulate_rdmsr_imm (x86.c, 6.18)", 9, userspace=frozenset({KVM_EXIT_X86_RDMSR}),
          must=(Must(("kvm_msr",), (1, 1), unless=("userspace",)),),
          note="RDMSR with an immediate; row from the instruction's encoding, not replayed."),
    _skip(85, "kvm_emulate_wrmsr_imm (x86.c, 6.18)", 9, userspace=frozenset({KVM_EXIT_X86_WRMSR}),
          must=(Must(("kvm_msr",), (1, 1), unless=("userspace",)),),
          note="WRMSRNS with an immediate; row from the instruction's encoding, not replayed."),
    *(_nested(code) for code in _VMX_INSTRUCTIONS),
    *(_unexpected(code) for code in _UNEXPECTED),
)
# fmt: on


VMX_EXITS: Mapping[int, ExitExpectation] = MappingProxyType(
    {row.code: row for row in sorted(_ROWS, key=lambda row: row.code)}
)
