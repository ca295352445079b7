"""arm64: the reasons for which KVM/arm64 leaves a guest, what it owes after each, and how its events call things.

A VM-exit's reason is made of two fields: `ret`, the kind of exception that ended guest mode (ARM_EXCEPTION_*), and for
a trap `esr_ec`, the exception class of ESR_EL2. One number holds both: ret << 6 | esr_ec. A trap has the name of its
class, as `perf kvm stat` prints it.

The program counter of kvm_entry is the one before __kvm_adjust_pc steps over an instruction or to an exception
vector, which both run functions do after kvm_entry was traced (hyp/vhe/switch.c, hyp/nvhe/switch.c): whatever KVM did
about an exit, the entry behind it shows the exit's own program counter. Only where a KVM_RUN ends with an adjustment
pending does the next entry show the address behind (RipClass.PENDING): so behind a WFI that a signal interrupted. An
MMIO access that userspace serves is stepped over by the KVM_RUN behind, again after kvm_entry was traced.
A vCPU that another one switches on (PSCI CPU_ON) begins wherever that one said.

Verified against linux 6.1.192 and 6.12.117: arch/arm64/kvm/handle_exit.c (arm_exit_handlers, handle_exit), arm.c
(kvm_arch_vcpu_ioctl_run), mmu.c, mmio.c, sys_regs.c, psci.c, hypercalls.c, trace_arm.h, trace_handle_exit.h;
arch/arm64/include/asm/esr.h, kvm_arm.h (kvm_arm_exception_class), kvm_asm.h (ARM_EXCEPTION_*).
"""

from __future__ import annotations

from kvmtrace.isa.arm64_switch import ARM64_BRACKETS, ARM64_SWITCH, ARM64_UNSEEN
from kvmtrace.isa.arm64_words import (
    TRAP_CODES,
    classify_guest_fault,
    decode_abort,
    decode_trap,
    describe_guest_fault,
    describe_register,
    describe_syndrome,
    is_vector,
    never_told,
    syndrome_code,
)
from kvmtrace.isa.base import ExitRow, Isa, Must, Part, RipClass
from kvmtrace.kvm.userspace_exits import (
    KVM_EXIT_ARM_NISV,
    KVM_EXIT_DEBUG,
    KVM_EXIT_DIRTY_RING_FULL,
    KVM_EXIT_FAIL_ENTRY,
    KVM_EXIT_HYPERCALL,
    KVM_EXIT_INTR,
    KVM_EXIT_MEMORY_FAULT,
    KVM_EXIT_MMIO,
    KVM_EXIT_SYSTEM_EVENT,
)

_RET_SHIFT = 6  # above the six bits of an exception class
_IRQ, _SERROR, _TRAP, _IL = (ret << _RET_SHIFT for ret in range(4))
assert _TRAP == TRAP_CODES
_HYP_GONE = (0xBADCA11 & 0x1F) << _RET_SHIFT  # HVC_STUB_ERR, include/asm/virt.h

_FAULT = Must(("kvm_guest_fault",), (1, 1))
_ABORT = ("abort_class", "abort_pc", "access_flag_address")
# of the syndrome of a trapped system register: Op0, Op1, CRn, CRm, Op2 as sys_reg() of asm/sysreg.h arranges them
SYSTEM_REGISTER = (
    Part("hsr", -1, 3 << 20), Part("hsr", 2, 7 << 14), Part("hsr", 2, 15 << 10), Part("hsr", 7, 15 << 1),
    Part("hsr", -12, 7 << 17),
)  # fmt: skip
_SYS_REG_MAY = frozenset({"kvm_sys_access"})
_STEP = 4  # bytes of an instruction
_SAME, _PENDING, _ANY = RipClass.SAME, RipClass.PENDING, RipClass.ANY
_CALL = Must(("kvm_hvc_arm64",), (1, 1))
_CALL_LEAVES = frozenset({KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_HYPERCALL})


def _trap(
    exception_class: int,
    name: str,
    handler: str,
    note: str,
    *,
    rip: RipClass = _PENDING,
    steps: bool = False,
    kinds: tuple[str, ...] = (),
    must: tuple[Must, ...] = (),
    may: frozenset[str] = frozenset(),
    userspace: frozenset[int] = frozenset(),
    checks: tuple[str, ...] = (),
    rip_when: tuple[tuple[str, RipClass], ...] = (),
) -> ExitRow:
    """Return the row of a trap that KVM can handle.

    Parameters
    ----------
    steps : KVM always steps over the instruction; it neither tries it again nor gives the guest an exception
    """
    return ExitRow(
        _TRAP | exception_class,
        name,
        handler,
        rip,
        length=_STEP if steps else 0,
        kinds=kinds,
        must=must,
        may=may,
        userspace=userspace,
        checks=checks,
        source=f"{handler}; __kvm_adjust_pc",
        note=note,
        rip_when=rip_when,
    )


def _undefined(exception_class: int, name: str, handler: str, note: str) -> ExitRow:
    """Return the row of a trap that gives the guest an undefined-instruction exception."""
    return _trap(exception_class, name, handler, note)


def _debug(exception_class: int, name: str, note: str) -> ExitRow:
    """Return the row of a debug exception, which the VMM asked for."""
    return ExitRow(
        _TRAP | exception_class,
        name,
        "kvm_handle_guest_debug (handle_exit.c)",
        RipClass.NEVER,
        in_kernel=False,
        userspace=frozenset({KVM_EXIT_DEBUG}),
        source="kvm_handle_guest_debug",
        note=note,
    )


def _failed(code: int, name: str, note: str) -> ExitRow:
    return ExitRow(
        code,
        name,
        "handle_exit (handle_exit.c)",
        RipClass.NEVER,
        in_kernel=False,
        userspace=frozenset({KVM_EXIT_FAIL_ENTRY}),
        source="handle_exit",
        note=note,
    )


def _perf_key(code: int) -> int:
    """Return the number under which `perf kvm stat` counts an exit: the class of a trap, else the kind of exception.

    Source: event_get_key (tools/perf/arch/arm64/util/kvm-stat.c)
    """
    return code & 0x3F if code >> _RET_SHIFT == _TRAP >> _RET_SHIFT else code >> _RET_SHIFT


# fmt: off
_ROWS: tuple[ExitRow, ...] = (
    ExitRow(_IRQ, "IRQ", "handle_exit (handle_exit.c)", RipClass.SAME,
            kinds=("external_interrupt", "host", "asynchronous", "forced"), source="handle_exit",
            note="A host interrupt; it is served before kvm_exit is traced, with interrupts let in for a moment."),
    ExitRow(_SERROR, "SERROR", "handle_exit_early (handle_exit.c)", RipClass.SAME, kinds=("asynchronous",),
            source="handle_exit_early; kvm_handle_guest_serror", note="A system error: the guest is given one."),
    _failed(_IL, "", "An illegal exception return: the guest's state is corrupt; KVM_RUN fails with -EINVAL."),
    _failed(_HYP_GONE, "HYP_GONE", "EL2 holds the hypervisor's stub: the host is shutting down."),

    _undefined(0x00, "UNKNOWN", "kvm_handle_unknown_ec (handle_exit.c)", "No class: an undefined instruction."),
    _trap(0x01, "WFx", "kvm_handle_wfx (handle_exit.c)",
          "WFI blocks the vCPU until an interrupt pends, WFE yields; both are stepped over.", steps=True,
          kinds=("halt",), must=(Must(("kvm_wfx_arm64",), (1, 1)),), checks=("wait_pc", "wait_kind")),
    _trap(0x03, "CP15_32", "kvm_handle_cp15_32 (sys_regs.c)", "AArch32: MCR, MRC.", may=_SYS_REG_MAY,
          checks=("trap_pc",)),
    _trap(0x04, "CP15_64", "kvm_handle_cp15_64 (sys_regs.c)", "AArch32: MCRR, MRRC.", may=_SYS_REG_MAY,
          checks=("trap_pc",)),
    _trap(0x05, "CP14_MR", "kvm_handle_cp14_32 (sys_regs.c)", "AArch32: debug registers.", may=_SYS_REG_MAY,
          checks=("trap_pc",)),
    _undefined(0x06, "CP14_LS", "kvm_handle_cp14_load_store (sys_regs.c)", "AArch32: LDC, STC."),
    _undefined(0x07, "FP_ASIMD", "handle_no_fpsimd (handle_exit.c)",
               "Usually handled before the exit is traced (kvm_hyp_handle_fpsimd)."),
    _trap(0x08, "CP10_ID", "kvm_handle_cp10_id (sys_regs.c)", "AArch32: VMRS.", may=_SYS_REG_MAY, checks=("trap_pc",)),
    _undefined(0x09, "PAC", "kvm_handle_ptrauth (handle_exit.c)", "Pointer authentication is hidden from the guest."),
    _trap(0x0C, "CP14_64", "kvm_handle_cp14_64 (sys_regs.c)", "AArch32: debug registers.", may=_SYS_REG_MAY,
          checks=("trap_pc",)),
    _trap(0x12, "", "handle_hvc (handle_exit.c)", "AArch32: HVC.", rip=_SAME, must=(_CALL,), checks=("call_pc",),
          userspace=_CALL_LEAVES, rip_when=(("powered_off", _ANY),)),
    _trap(0x13, "", "handle_smc (handle_exit.c)", "AArch32: SMC.", steps=True, userspace=_CALL_LEAVES,
          rip_when=(("sleeps", _ANY),)),
    _trap(0x15, "SVC64", "handle_svc (handle_exit.c)",
          "6.12: of a guest hypervisor's guest, which that one is given; earlier kernels know no such trap.",
          rip=_ANY),
    _trap(0x16, "HVC64", "handle_hvc (handle_exit.c), kvm_smccc_call_handler (hypercalls.c)",
          "The processor has stepped over it already. PSCI may end the VM, restart it or start another vCPU.",
          rip=_SAME, must=(_CALL,), checks=("call_pc",), userspace=_CALL_LEAVES, rip_when=(("powered_off", _ANY),)),
    _trap(0x17, "SMC64", "handle_smc (handle_exit.c)",
          "6.1 answers NOT_SUPPORTED; newer kernels serve it like HVC. KVM steps over it.", steps=True,
          userspace=_CALL_LEAVES, rip_when=(("sleeps", _ANY),)),
    _trap(0x18, "SYS64", "kvm_handle_sys_reg (sys_regs.c)", "MSR, MRS or a cache operation on a trapped register.",
          kinds=("msr", "msr_read", "msr_write"), must=(Must(("kvm_handle_sys_reg",), (1, 1)),), may=_SYS_REG_MAY,
          checks=("trap_class", "trap_pc", "trap_register")),
    _undefined(0x19, "SVE", "handle_sve (handle_exit.c)", "SVE is hidden from the guest."),
    _trap(0x1A, "ERET", "kvm_handle_eret (handle_exit.c)",
          "6.12: a guest hypervisor enters its guest; undefined on earlier kernels, or of hidden pointer keys.",
          rip=_ANY),
    _trap(0x20, "IABT_LOW", "kvm_handle_guest_abort (mmu.c)", "The page of an instruction is mapped, or refused.",
          kinds=("memory_fault",), must=(_FAULT,), may=frozenset({"kvm_access_fault"}),
          checks=(*_ABORT, "abort_fetch"),
          userspace=frozenset({KVM_EXIT_MEMORY_FAULT})),
    _trap(0x24, "DABT_LOW", "kvm_handle_guest_abort (mmu.c), io_mem_abort (mmio.c)",
          "The page is mapped and the instruction runs again, or it is MMIO, which the syndrome describes.",
          kinds=("second_level_fault", "memory_fault", "known_mmio"), must=(_FAULT,),
          may=frozenset({"kvm_access_fault", "kvm_mmio"}), checks=(*_ABORT, "abort_mmio", "abort_left"),
          userspace=frozenset({KVM_EXIT_MMIO, KVM_EXIT_ARM_NISV, KVM_EXIT_MEMORY_FAULT})),
    _debug(0x30, "BREAKPT_LOW", "A breakpoint of the VMM."),
    _debug(0x32, "SOFTSTP_LOW", "The VMM steps the guest."),
    _debug(0x34, "WATCHPT_LOW", "A watchpoint of the VMM."),
    _debug(0x38, "BKPT32", "AArch32: BKPT, while the VMM debugs the guest."),
    _debug(0x3C, "BRK64", "BRK, while the VMM debugs the guest."),
)

# classes that the kernel names and no guest traps with
_OTHER_NAMES = {
    _TRAP | 0x1F: "IMP_DEF", _TRAP | 0x21: "IABT_CUR", _TRAP | 0x22: "PC_ALIGN",
    _TRAP | 0x25: "DABT_CUR", _TRAP | 0x26: "SP_ALIGN", _TRAP | 0x28: "FP_EXC32", _TRAP | 0x2C: "FP_EXC64",
    _TRAP | 0x2F: "SERROR trap", _TRAP | 0x31: "BREAKPT_CUR", _TRAP | 0x33: "SOFTSTP_CUR",
    _TRAP | 0x35: "WATCHPT_CUR", _TRAP | 0x3A: "VECTOR32",
}
# of arch/x86/kvm/trace.h, and what include/trace/events/kvm.h has for an IOAPIC and asynchronous page faults only; the
# vGIC's injections and ends of interrupts are traced by nothing
_ABSENT = frozenset({
    "kvm_apic", "kvm_apic_accept_irq", "kvm_apic_ipi", "kvm_cpuid", "kvm_cr", "kvm_emulate_insn", "kvm_eoi",
    "kvm_fast_mmio", "kvm_hv_hypercall", "kvm_hypercall", "kvm_inj_exception", "kvm_inj_virq", "kvm_invlpga",
    "kvm_msr", "kvm_page_fault", "kvm_pio", "kvm_pml_full", "kvm_pv_eoi", "kvm_skinit", "kvm_smm_transition",
    "kvm_xen_hypercall",
    "kvm_apicv_accept_irq", "kvm_apicv_inhibit_changed", "kvm_async_pf_completed", "kvm_async_pf_not_present",
    "kvm_async_pf_ready", "kvm_async_pf_repeated_fault", "kvm_avic_doorbell", "kvm_avic_ga_log",
    "kvm_avic_incomplete_ipi", "kvm_avic_unaccelerated_access", "kvm_ioapic_delayed_eoi_inj", "kvm_ioapic_set_irq",
    "kvm_msi_set_irq", "kvm_nested_intercepts", "kvm_nested_intr_vmexit", "kvm_nested_vmenter",
    "kvm_nested_vmenter_failed", "kvm_nested_vmexit", "kvm_nested_vmexit_inject", "kvm_nested_vmrun",
    "kvm_pic_set_irq", "kvm_try_async_get_page",
    "vcpu_match_mmio", "vmx_vcpu_run", "vmx_vcpu_run_return", "svm_vcpu_run",
    "svm_vcpu_run_return",
    "kvm_entry.immediate_exit", "kvm_entry.intr_info", "kvm_entry.vcpu_id", "kvm_exit.info1", "kvm_exit.info2",
    "kvm_exit.intr_info", "kvm_exit.isa", "kvm_exit.vcpu_id",
})
# fmt: on

_RUN = "kvm_arch_vcpu_ioctl_run (arm.c)"
# fmt: off
_RULE_SOURCES = {
    "V1": f"{_RUN}, kvm_vcpu_ioctl (virt/kvm/kvm_main.c)",
    "V2": _RUN,
    "V3": f"{_RUN}: local_irq_disable before the guest, local_irq_enable after kvm_exit's moment",
    "V4": "arm_exit_handlers (handle_exit.c)",
    "V5": "kvm_handle_guest_abort (mmu.c), io_mem_abort (mmio.c), kvm_handle_sys_reg (sys_regs.c)",
    "V6": "kvm_incr_pc (include/asm/kvm_emulate.h), __kvm_adjust_pc (hyp/exception.c)",
    "V7": f"{_RUN} and the exit's handler",
    "V8": "kvm_handle_mmio_return, io_mem_abort (mmio.c)",
    "V13": "arm_exit_handlers (handle_exit.c)",
    "V14": "kvm_timer_update_irq (arch_timer.c), kvm_vgic_inject_irq (vgic/vgic.c)",
    "H5": "kvm_handle_mmio_return (mmio.c), __kvm_adjust_pc (hyp/exception.c)",
    "H7": "kvm_vcpu_check_block (virt/kvm/kvm_main.c), kvm_arch_vcpu_runnable (arm.c)",
    "H11": "kvm_io_bus_read, kvm_io_bus_write (virt/kvm/kvm_main.c); io_mem_abort (mmio.c)",
}
# fmt: on

ARM64 = Isa(
    name="arm64",
    number=128,  # ours: arm64's kvm_exit has no such field
    title="arm64 (EL2)",
    module="kvm",
    rows=_ROWS,
    other_names=_OTHER_NAMES,
    hexadecimal=True,
    signature=frozenset({"ret", "esr_ec", "vcpu_pc"}),
    derived={
        ("kvm_exit", "exit_reason"): (Part("ret", _RET_SHIFT, 0x1F), Part("esr_ec", mask=0x3F)),
        ("kvm_exit", "guest_rip"): (Part("vcpu_pc"),),
        ("kvm_entry", "rip"): (Part("vcpu_pc"),),
        ("kvm_guest_fault", "fault_address"): (Part("ipa"),),
        ("kvm_handle_sys_reg", "register"): SYSTEM_REGISTER,
        ("kvm_handle_sys_reg", "is_read"): (Part("hsr", 0, 1),),
    },
    describe_fault=describe_guest_fault,
    never_told=never_told,
    syndrome_code=syndrome_code,
    decode_abort=decode_abort,
    decode_trap=decode_trap,
    describe_syndrome=describe_syndrome,
    describe_register=describe_register,
    announces_reads=True,
    resets_anywhere=True,
    perf_guest_key=_perf_key,
    is_vector=is_vector,
    classify_fault=classify_guest_fault,
    rule_sources=_RULE_SOURCES,
    world_switch=ARM64_SWITCH,
    brackets=ARM64_BRACKETS,
    unseen=ARM64_UNSEEN,
    control_structure="context",
    vcpu_object="struct kvm_vcpu with its kvm_cpu_context",
    follow_ups=(
        "kvm_guest_fault",
        "kvm_access_fault",
        "kvm_mmio",
        "kvm_handle_sys_reg",
        "kvm_sys_access",
        "kvm_wfx_arm64",
        "kvm_hvc_arm64",
    ),
    untraced=frozenset({"kvm_fpu"}),
    absent=_ABSENT,
    any_exit_causes={
        KVM_EXIT_INTR: "a signal is pending, or a timer of a VM whose interrupt controller is in userspace fired",
        KVM_EXIT_SYSTEM_EVENT: "KVM_REQ_SUSPEND: PSCI SYSTEM_SUSPEND of another vCPU",
        KVM_EXIT_DIRTY_RING_FULL: "the vCPU's dirty ring is full",
        KVM_EXIT_FAIL_ENTRY: "the thread was moved to a CPU that cannot run this vCPU",
    },
)
