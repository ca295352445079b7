"""Conditions on a VM-exit, and comparisons of its payload: the words that the exit tables use.

A predicate lifts a duty (`Must.unless`) or changes where the guest continues (`rip_when`); it looks at the exit's
segment: the events from kvm_exit to the next kvm_entry, kvm_exit or kvm_userspace_exit of the thread. A comparison
holds a follow-up's payload against the exit's own words. What each of them reads stands beside it, so that the engine
knows which duties a recording allows to judge. The functions are registered in `check` under the same names.
"""

from __future__ import annotations

from kvmtrace.lazy_dataclass import dataclass


@dataclass(frozen=True)
class Predicate:
    """A condition on a VM-exit: when it holds, and the events and fields that it reads."""

    sentence: str
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A comparison of payloads that an exit row asks for (`checks`).

    Parameters
    ----------
    rule : id of the rule that a difference breaks
    sentence : what is compared
    needs : the events and fields that it reads
    source : the kernel functions that put what is compared into the events
    """

    rule: str
    sentence: str
    needs: tuple[str, ...]
    source: str = ""


# fmt: off
PREDICATES: dict[str, Predicate] = {
    "exception": Predicate("a kvm_inj_exception lies in the segment (where that was not recorded: RIP stays)",
                           ("kvm_inj_exception|kvm_exit.guest_rip", "kvm_inj_exception|kvm_entry.rip")),
    "userspace": Predicate("the segment ends in a userspace exit with errno 0", ("kvm_userspace_exit.errno",)),
    "interrupted": Predicate("the segment ends in a userspace exit with errno < 0", ("kvm_userspace_exit.errno",)),
    "retry": Predicate("the vCPU resumes at the RIP of the exit", ("kvm_exit.guest_rip", "kvm_entry.rip")),
    "first_dr": Predicate("a debug-register exit resumes at the same RIP: the intercept was dropped",
                          ("kvm_exit.guest_rip", "kvm_entry.rip")),
    "fastpath": Predicate("kvm_msr stands before a kvm_exit that is traced late: the fast path wrote the MSR",
                          ("kvm_msr",)),
    "emulated": Predicate("the segment has a kvm_emulate_insn", ("kvm_emulate_insn",)),
    "string": Predicate("info1 says string I/O", ("kvm_exit.info1",)),
    "not_string": Predicate("info1 says a single port access", ("kvm_exit.info1",)),
    "pio_in_userspace": Predicate("IN that leaves to userspace as KVM_EXIT_IO: its kvm_pio follows on completion",
                                  ("kvm_exit.info1", "kvm_userspace_exit.reason")),
    "userspace_pio": Predicate("the segment ends in KVM_EXIT_IO: the emulator waits for a port before it touches "
                               "memory", ("kvm_userspace_exit.reason",)),
    "icebp": Predicate("an exception exit whose intr_info is a privileged software exception (ICEBP): KVM skips it",
                       ("kvm_exit.intr_info",)),
    "not_pf": Predicate("an exception exit whose intr_info is not a page fault (vector 14)", ("kvm_exit.intr_info",)),
    "not_ud": Predicate("an exception exit whose intr_info is not #UD (vector 6)", ("kvm_exit.intr_info",)),
    "no_mmio": Predicate("page fault whose error code lacks the reserved bit: not a known MMIO page",
                         ("kvm_exit.info1",)),
    "fast_fault": Predicate("kvm_fast_mmio answered the page fault (7.x; where it was not recorded: no kvm_page_fault, "
                          "and RIP moved)", ("kvm_exit.guest_rip", "kvm_entry.rip")),
    "vectored_mmio": Predicate("a page fault on a known MMIO page that interrupted a delivery: 7.x refuses to emulate "
                               "it before it traces the fault", ("kvm_exit.info1", "kvm_exit.vectoring")),
    "fast_mmio": Predicate("the segment has a kvm_fast_mmio", ("kvm_fast_mmio",)),
    "powered_off": Predicate("the guest called PSCI CPU_OFF: it goes on where another vCPU switches it on",
                             ("kvm_hvc_arm64.r0",)),
    "sleeps": Predicate("the thread was scheduled away behind the exit (where that was not recorded: always)", ()),
}

CHECKS: dict[str, Comparison] = {
    "pio_matches_exit": Comparison(
        "V5", "kvm_pio's port, size and direction equal the exit's",
        ("kvm_exit.info1", "kvm_pio.port", "kvm_pio.size", "kvm_pio.rw"),
        "kvm_fast_pio, emulator_pio_in_out (x86.c)"),
    "page_fault_rip": Comparison(
        "V5", "kvm_page_fault's RIP is the exit's",
        ("kvm_exit.guest_rip", "kvm_exit.vectoring", "kvm_page_fault.guest_rip"),
        "the trace in the handler; kvm_handle_page_fault (mmu/mmu.c)"),
    "page_fault_error": Comparison(
        "V5", "kvm_page_fault's error_code is info1", ("kvm_exit.info1", "kvm_page_fault.error_code"),
        "the trace in the handler; kvm_handle_page_fault (mmu/mmu.c)"),
    "page_fault_address": Comparison(
        "V5", "kvm_page_fault's address is info2", ("kvm_exit.info2", "kvm_page_fault.fault_address"),
        "the trace in the handler; kvm_handle_page_fault (mmu/mmu.c)"),
    "msr_direction": Comparison("V5", "kvm_msr's direction equals the exit's", ("kvm_exit.info1", "kvm_msr.write"),
                                "kvm_emulate_rdmsr, kvm_emulate_wrmsr (x86.c)"),
    "cr_matches_exit": Comparison(
        "V5", "kvm_cr's register and direction equal the exit's", ("kvm_exit.info1", "kvm_cr.cr", "kvm_cr.rw"),
        "the trace in the handler"),
    "emulated_rip": Comparison(
        "V5", "kvm_emulate_insn's RIP is the exit's",
        ("kvm_exit.guest_rip", "kvm_exit.vectoring", "kvm_emulate_insn.rip"),
        "x86_emulate_instruction, init_emulate_ctxt (x86.c)"),
    "mmio_matches_page_fault": Comparison(
        "V5", "the first kvm_mmio lies on the page of kvm_page_fault's address",
        ("kvm_mmio.gpa", "kvm_mmio.len", "kvm_page_fault.fault_address", "kvm_emulate_insn.insn"),
        "emulator_read_write_onepage, vcpu_mmio_gva_to_gpa (x86.c)"),
    "abort_class": Comparison(
        "V5", "the syndrome of kvm_guest_fault is of the exit's class", ("kvm_guest_fault.hsr",),
        "kvm_handle_guest_abort (mmu.c)"),
    "abort_pc": Comparison("V5", "kvm_guest_fault's program counter is the exit's",
                           ("kvm_exit.guest_rip", "kvm_guest_fault.vcpu_pc"), "kvm_handle_guest_abort (mmu.c)"),
    "abort_fetch": Comparison(
        "V5", "the syndrome of an instruction's fault describes no access, and its address is the program counter's",
        ("kvm_guest_fault.hsr", "kvm_guest_fault.hxfar", "kvm_exit.guest_rip"), "kvm_handle_guest_abort (mmu.c)"),
    "abort_mmio": Comparison(
        "V5", "one kvm_mmio access follows kvm_guest_fault, with the address, size and direction of its syndrome",
        ("kvm_guest_fault.hsr", "kvm_guest_fault.hxfar", "kvm_guest_fault.ipa", "kvm_mmio.gpa", "kvm_mmio.len",
         "kvm_mmio.type"), "io_mem_abort (mmio.c)"),
    "abort_left": Comparison(
        "V5", "KVM_EXIT_ARM_NISV if and only if the syndrome does not describe the access that userspace serves",
        ("kvm_guest_fault.hsr", "kvm_userspace_exit.reason"), "io_mem_abort (mmio.c)"),
    "access_flag_address": Comparison(
        "V5", "kvm_access_fault follows an access flag fault, with its address, and no other fault",
        ("kvm_guest_fault.hsr", "kvm_guest_fault.ipa", "kvm_access_fault.ipa"), "handle_access_fault (mmu.c)"),
    "trap_class": Comparison(
        "V5", "the syndrome of kvm_handle_sys_reg is of the exit's class", ("kvm_handle_sys_reg.hsr",),
        "kvm_handle_sys_reg (sys_regs.c)"),
    "trap_pc": Comparison("V5", "kvm_sys_access's program counter is the exit's",
                          ("kvm_exit.guest_rip", "kvm_sys_access.vcpu_pc"), "perform_access (sys_regs.c)"),
    "trap_register": Comparison(
        "V5", "one kvm_sys_access follows kvm_handle_sys_reg, with the register and direction that its syndrome tells",
        ("kvm_handle_sys_reg.hsr", "kvm_sys_access.is_write", "kvm_sys_access.Op0", "kvm_sys_access.Op1",
         "kvm_sys_access.CRn", "kvm_sys_access.CRm", "kvm_sys_access.Op2"), "perform_access (sys_regs.c)"),
    "wait_pc": Comparison("V5", "kvm_wfx_arm64's program counter is the exit's",
                          ("kvm_exit.guest_rip", "kvm_wfx_arm64.vcpu_pc"), "kvm_handle_wfx (handle_exit.c)"),
    "wait_kind": Comparison(
        "V5", "only WFI blocks the vCPU, and is woken up", ("kvm_wfx_arm64.is_wfe", "kvm_vcpu_wakeup"),
        "kvm_handle_wfx (handle_exit.c), kvm_vcpu_halt (virt/kvm/kvm_main.c)"),
    "call_pc": Comparison("V5", "kvm_hvc_arm64's program counter is the exit's",
                          ("kvm_exit.guest_rip", "kvm_hvc_arm64.vcpu_pc"), "handle_hvc (handle_exit.c)"),
    "io_next_rip": Comparison(
        "V6", "a port access that is no string instruction resumes at the RIP that the exit tells",
        ("kvm_exit.info1", "kvm_exit.info2"), "svm_skip_emulated_instruction (svm/svm.c), kvm_fast_pio (x86.c)"),
}
# fmt: on
