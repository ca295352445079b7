"""SVM: what KVM owes after each exit code.

One row per code that KVM handles, keyed on its number; names are in kvm/exit_reasons.py. Codes without a row
that svm_exit_handlers lacks as well end in KVM_EXIT_INTERNAL_ERROR (svm_handle_invalid_exit); the ones that
have a name stand here too. Processors without NRIPS (and emulated ones) do not tell the next RIP, so KVM
decodes an instruction to skip it: kvm_emulate_insn may follow every instruction exit.
Verified against linux 6.1.192 and 6.12.117: svm_exit_handlers, svm_handle_exit (arch/x86/kvm/svm/svm.c).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from kvmtrace.isa.base import ExitExpectation, Must, RipClass
from kvmtrace.isa.exit_reasons import SVM_EXIT_ERR, SVM_EXIT_EXCP_BASE, SVM_EXIT_REASONS
from kvmtrace.isa.shared import EMULATOR_EVENTS, EMULATOR_USERSPACE, SKIP_USERSPACE
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
from kvmtrace.kvm.vectors import (
    AC_VECTOR,
    BP_VECTOR,
    DB_VECTOR,
    GP_VECTOR,
    MC_VECTOR,
    PF_VECTOR,
    UD_VECTOR,
)
from kvmtrace.model.states import FOLLOW_UPS

if TYPE_CHECKING:
    from collections.abc import Mapping

_NONE: frozenset[int] = frozenset()
# skip_emulated_instruction without NRIPS decodes (EMULTYPE_SKIP) but never executes, so it traces nothing else;
# a failed decode is an internal error
_SKIP_MAY = frozenset({"kvm_emulate_insn"})
_SKIP_USERSPACE = SKIP_USERSPACE | {KVM_EXIT_INTERNAL_ERROR}
_INVALID_OP = Must(("kvm_inj_exception",), (1, None), unless=("userspace", "interrupted"))


def _skip(
    code: int,
    handler: str,
    length: int,
    note: str = "",
    *,
    must: tuple[Must, ...] = (),
    userspace: frozenset[int] = _NONE,
    may: frozenset[str] = frozenset(),
    checks: tuple[str, ...] = (),
    rip_when: tuple[tuple[str, RipClass], ...] = (),
) -> ExitExpectation:
    """Return the row of an instruction that KVM carries out and steps over."""
    return ExitExpectation(
        code,
        handler,
        RipClass.ADVANCE,
        length,
        userspace=userspace | _SKIP_USERSPACE,
        must=must,
        may=may | _SKIP_MAY,
        checks=("emulated_length", "emulated_rip", *checks),
        note=note,
        rip_when=rip_when,
        source=f"{handler}; svm_skip_emulated_instruction",
    )


def _same(
    code: int, handler: str, note: str, *, must: tuple[Must, ...] = (), userspace: frozenset[int] = _NONE
) -> ExitExpectation:
    """Return the row of an exit after which the guest continues where it was."""
    return ExitExpectation(code, handler, RipClass.SAME, must=must, userspace=userspace, source=handler, note=note)


def _emulate(
    code: int,
    handler: str,
    note: str,
    *,
    must: tuple[Must, ...] = (),
    userspace: frozenset[int] = _NONE,
    may: frozenset[str] = frozenset(),
    checks: tuple[str, ...] = (),
) -> ExitExpectation:
    """Return the row of an exit that the emulator may handle; without it the guest tries again."""
    return ExitExpectation(
        code,
        handler,
        RipClass.EMULATED,
        userspace=EMULATOR_USERSPACE | userspace,
        must=must,
        may=EMULATOR_EVENTS | may,
        checks=checks,
        source=handler,
        note=note,
    )


def _fatal(code: int, handler: str, reason: int, note: str) -> ExitExpectation:
    """Return the row of an exit that always goes to userspace."""
    return ExitExpectation(
        code, handler, RipClass.NEVER, in_kernel=False, userspace=frozenset({reason}), source=handler, note=note
    )


def _unexpected(code: int) -> ExitExpectation:
    return _fatal(
        code,
        "svm_handle_invalid_exit (svm/svm.c)",
        KVM_EXIT_INTERNAL_ERROR,
        "KVM has no handler: it does not ask for this intercept.",
    )


def _sev_es(code: int, handler: str, note: str) -> ExitExpectation:
    """Return the row of an SEV-ES exit: the guest's registers, RIP among them, are not visible."""
    return ExitExpectation(
        code,
        handler,
        RipClass.ANY,
        may=frozenset(FOLLOW_UPS),
        source=handler,
        note=note,
        userspace=EMULATOR_USERSPACE
        | {KVM_EXIT_HLT, KVM_EXIT_HYPERCALL, KVM_EXIT_AP_RESET_HOLD, KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_SET_TPR},
    )


def _cr(code: int) -> ExitExpectation:
    handler = "cr8_write_interception (svm/svm.c)" if code == 0x18 else "cr_interception (svm/svm.c)"
    return _skip(
        code,
        handler,
        3,
        "Without decode assists, and for CLTS, LMSW and SMSW, it is emulated.",
        must=(Must(("kvm_cr",), (1, 1), unless=("emulated", "exception")),),
        may=EMULATOR_EVENTS,
        userspace=frozenset({KVM_EXIT_SET_TPR}) if code == 0x18 else _NONE,
        checks=("cr_matches_exit_code",),
    )


def _dr(code: int) -> ExitExpectation:
    return _skip(
        code,
        "dr_interception (svm/svm.c)",
        3,
        may=EMULATOR_EVENTS,
        note="The first access drops the intercepts and is executed again; nothing is traced.",
        rip_when=(("first_dr", RipClass.SAME),),
    )


def _excp(vector: int) -> int:
    return SVM_EXIT_EXCP_BASE + vector


_CR = (0x00, 0x03, 0x04, 0x08, 0x10, 0x13, 0x14, 0x18, 0x65)
_DR = (*range(0x20, 0x28), *range(0x30, 0x38))
_HYPERCALL = Must(("kvm_hypercall", "kvm_hv_hypercall", "kvm_xen_hypercall"), (1, 1), unless=("exception",))
_MMIO = (
    Must(("kvm_emulate_insn",), (1, None), unless=("no_mmio", "retry", "exception")),
    Must(("kvm_mmio",), (1, None), unless=("no_mmio", "retry", "exception", "userspace_pio")),
)

# fmt: off
_EXCEPTIONS = (
    _same(_excp(DB_VECTOR), "db_interception (svm/svm.c)", "Reflected to the guest, or KVM_EXIT_DEBUG.",
          userspace=frozenset({KVM_EXIT_DEBUG})),
    _fatal(_excp(BP_VECTOR), "bp_interception (svm/svm.c)", KVM_EXIT_DEBUG,
           "Intercepted only while the VMM debugs the guest."),
    _emulate(_excp(UD_VECTOR), "ud_interception (svm/svm.c), handle_ud (x86.c)",
             "Emulated: the other vendor's hypercall is patched and runs again.",
             must=(Must(("kvm_emulate_insn",), (1, 1), unless=("exception",)),)),
    _emulate(_excp(PF_VECTOR), "pf_interception (svm/svm.c)", "Shadow paging (no NPT).",
             must=(Must(("kvm_page_fault",), (1, 1), unless=("exception",)),), may=frozenset({"kvm_page_fault"}),
             checks=("page_fault_matches_exit",)),
    _same(_excp(MC_VECTOR), "mc_interception (svm/svm.c)", "Served by svm_handle_mce with interrupts off."),
    _same(_excp(AC_VECTOR), "ac_interception (svm/svm.c)", "Reflected to the guest."),
    _emulate(_excp(GP_VECTOR), "gp_interception (svm/svm.c)",
             "VMware backdoor and SVM erratum: decoded, then carried out or reflected as #GP."),
)

_ASYNCHRONOUS = (
    _same(0x60, "intr_interception (svm/svm.c)", "A host interrupt; nothing of the guest's is touched."),
    _same(0x61, "nmi_interception (svm/svm.c)", "A host NMI."),
    _same(0x62, "smi_interception (svm/svm.c)", "A host SMI."),
    _unexpected(0x63),
    _same(0x64, "interrupt_window_interception (svm/svm.c)",
          "The guest can take interrupts again: KVM_REQ_EVENT, usually followed by kvm_inj_virq."),
    _same(0x74, "iret_interception (svm/svm.c)", "IRET ends NMI masking: the intercept is dropped, IRET runs."),
    _fatal(0x7F, "shutdown_interception (svm/svm.c)", KVM_EXIT_SHUTDOWN,
           "The guest's triple fault; KVM resets the vCPU as by INIT, so RIP becomes 0xfff0."),
    _fatal(SVM_EXIT_ERR, "svm_handle_exit (svm/svm.c)", KVM_EXIT_FAIL_ENTRY, "VMRUN refused the VMCB."),
)

_INSTRUCTIONS = (
    _skip(0x6F, "kvm_emulate_rdpmc (x86.c)", 2, "#GP for a counter that does not exist."),
    _skip(0x72, "kvm_emulate_cpuid (cpuid.c)", 2,
          must=(Must(("kvm_cpuid",), (1, 1), unless=("exception",)),)),
    ExitExpectation(0x73, "rsm_interception (svm/svm.c)", RipClass.ANY, userspace=EMULATOR_USERSPACE,
                    must=(Must(("kvm_emulate_insn",), (1, 1), unless=("exception",)),), may=EMULATOR_EVENTS,
                    source="rsm_interception; emulator_leave_smm", note="Back from system-management mode."),
    _skip(0x76, "kvm_emulate_invd (x86.c)", 2, "A NOP under KVM."),
    _skip(0x77, "pause_interception (svm/svm.c)", 2, "The vCPU yields to another one (kvm_vcpu_on_spin)."),
    _skip(0x78, "kvm_emulate_halt (x86.c)", 1, "RIP advances first; blocks, or KVM_EXIT_HLT without LAPIC.",
          userspace=frozenset({KVM_EXIT_HLT})),
    _skip(0x79, "invlpg_interception (svm/svm.c)", 3, "Emulated without decode assists.",
          may=EMULATOR_EVENTS),
    _skip(0x7A, "invlpga_interception (svm/svm.c)", 3, "#UD or #GP without EFER.SVME or at CPL > 0.",
          must=(Must(("kvm_invlpga",), (1, 1), unless=("exception",)),)),
    _skip(0x7B, "io_interception (svm/svm.c)", 1,
          "OUT is traced at the exit, IN once its value is there; string I/O is emulated.",
          must=(Must(("kvm_pio",), (1, 1), unless=("string", "pio_in_userspace")),
                Must(("kvm_emulate_insn",), (1, 1), unless=("not_string", "exception"))),
          userspace=EMULATOR_USERSPACE, may=EMULATOR_EVENTS,
          checks=("pio_matches_exitinfo", "io_next_rip")),
    _skip(0x7C, "msr_interception (svm/svm.c), kvm_emulate_rdmsr, kvm_emulate_wrmsr (x86.c)", 2,
          "6.1 traces a fast-path write to the x2APIC ICR before kvm_exit, whose RIP is then advanced.",
          must=(Must(("kvm_msr",), (1, 1), unless=("userspace", "fastpath")),), checks=("msr_direction",),
          userspace=frozenset({KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR}),
          rip_when=(("fastpath", RipClass.SAME),)),
    ExitExpectation(0x7D, "task_switch_interception (svm/svm.c)", RipClass.ANY, may=_SKIP_MAY,
                    userspace=frozenset({KVM_EXIT_INTERNAL_ERROR}),
                    source="task_switch_interception; kvm_task_switch",
                    note="A hardware task switch is emulated; RIP comes from the new TSS."),
    _skip(0x81, "kvm_emulate_hypercall (x86.c)", 3, must=(_HYPERCALL,),
          userspace=frozenset({KVM_EXIT_HYPERCALL, KVM_EXIT_HYPERV, KVM_EXIT_XEN})),
    _same(0x86, "skinit_interception (svm/svm.c)", "Not offered to guests: #UD.",
          must=(Must(("kvm_skinit",), (1, 1)), _INVALID_OP)),
    _same(0x87, "kvm_handle_invalid_op (x86.c)", "RDTSCP hidden from the guest: #UD.", must=(_INVALID_OP,)),
    _skip(0x89, "kvm_emulate_wbinvd (x86.c)", 2),
    _skip(0x8A, "kvm_emulate_monitor (x86.c)", 3, "A NOP under KVM, or #UD."),
    _skip(0x8B, "kvm_emulate_mwait (x86.c)", 3, "A NOP under KVM, or #UD."),
    _skip(0x8D, "kvm_emulate_xsetbv (x86.c)", 3, "#GP for an illegal XCR0."),
    _same(0x8E, "kvm_handle_invalid_op (x86.c)", "RDPRU hidden from the guest: #UD.", must=(_INVALID_OP,)),
    _skip(0xA2, "invpcid_interception (svm/svm.c)", 5, "#UD, #GP or #PF for bad operands."),
    _fatal(0xA5, "bus_lock_exit (svm/svm.c, 6.16)", KVM_EXIT_X86_BUS_LOCK, "Not replayed."),
    _skip(0xA6, "kvm_emulate_halt (x86.c)", 1, "Idle-HLT intercept: HLT with no virtual interrupt pending.",
          userspace=frozenset({KVM_EXIT_HLT})),
)

_NESTED = (
    ExitExpectation(0x80, "vmrun_interception (svm/svm.c), nested_svm_vmrun (svm/nested.c)", RipClass.ANY,
                    may=_SKIP_MAY, userspace=_SKIP_USERSPACE, source="vmrun_interception",
                    note="#UD or #GP, else the guest hypervisor's guest is entered."),
    _skip(0x82, "vmload_interception (svm/svm.c)", 3, "#UD, #GP, or carried out for the guest hypervisor."),
    _skip(0x83, "vmsave_interception (svm/svm.c)", 3, "#UD, #GP, or carried out for the guest hypervisor."),
    _skip(0x84, "stgi_interception (svm/svm.c)", 3, "#UD, #GP, or carried out for the guest hypervisor."),
    _skip(0x85, "clgi_interception (svm/svm.c)", 3, "#UD, #GP, or carried out for the guest hypervisor."),
)

_MEMORY = (
    _emulate(0x400, "npf_interception (svm/svm.c), kvm_mmu_page_fault (mmu/mmu.c)",
             "The page is mapped and the instruction runs again, or MMIO is emulated.",
             must=(Must(("kvm_page_fault",), (1, 1)), *_MMIO), may=frozenset({"kvm_page_fault"}),
             userspace=frozenset({KVM_EXIT_MEMORY_FAULT}),
             checks=("page_fault_matches_exit", "emulated_rip", "mmio_matches_page_fault")),
    ExitExpectation(0x401, "avic_incomplete_ipi_interception (svm/avic.c)", RipClass.TRAP,
                    source="avic_incomplete_ipi_interception", note="An IPI that AVIC could not deliver."),
    _emulate(0x402, "avic_unaccelerated_access_interception (svm/avic.c)",
             "Trap-like for most registers; fault-like ones are emulated."),
)

_SEV_ES = (
    _sev_es(0x8F, "efer_trap (svm/svm.c)", "SEV-ES: EFER was written."),
    _sev_es(0x90, "cr_trap (svm/svm.c)", "SEV-ES: CR0 was written."),
    _sev_es(0x94, "cr_trap (svm/svm.c)", "SEV-ES: CR4 was written."),
    _sev_es(0x98, "cr_trap (svm/svm.c)", "SEV-ES: CR8 was written."),
    _sev_es(0x403, "sev_handle_vmgexit (svm/sev.c)", "SEV-ES: the guest asks through its GHCB."),
)
# fmt: on

_HANDLED = (
    *_EXCEPTIONS,
    *_ASYNCHRONOUS,
    *_INSTRUCTIONS,
    *_NESTED,
    *_MEMORY,
    *_SEV_ES,
    *(_cr(code) for code in _CR),
    *(_dr(code) for code in _DR),
)
_HANDLED_CODES = {row.code for row in _HANDLED}
# codes of the GHCB protocol (0x8000....) never are VMCB exit codes: kvm_vmgexit_enter traces them
_UNHANDLED = tuple(_unexpected(code) for code in SVM_EXIT_REASONS if code not in _HANDLED_CODES and code < 0x80000000)

SVM_EXITS: Mapping[int, ExitExpectation] = MappingProxyType(
    {row.code: row for row in sorted((*_HANDLED, *_UNHANDLED), key=lambda row: row.code)}
)
