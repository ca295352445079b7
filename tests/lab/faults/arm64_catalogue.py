"""Deliberate faults in KVM/arm64, one changed line each, and what kvmtrace must say about them.

KVM is built into arm64's kernel, so that a fault takes a kernel. One holds all of them, each behind a number:
`/sys/module/kvm/parameters/fault` says which is switched on, 0 none. {on} in a replacement is the test of the number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from faults.catalogue import Edit, apply_edit

if TYPE_CHECKING:
    from pathlib import Path

_KVM = "arch/arm64/kvm"
_PARAMETER = (
    "/* which deliberate fault is switched on */\nint kvm_fault;\nmodule_param_named(fault, kvm_fault, int, 0644);"
)
# the number that the faults ask for
DECLARATIONS: tuple[Edit, ...] = (
    Edit("include/linux/kvm_host.h", "", r"(?<=\n)#ifndef KVM_MAX_VCPU_IDS\n", "extern int kvm_fault;\n\\g<0>"),
    Edit("virt/kvm/kvm_main.c", "", r"(?<=\n)/\* Worst case buffer size", f"{_PARAMETER}\n\n\\g<0>"),
)


@dataclass(frozen=True)
class Arm64Fault:
    """One wrong line of KVM/arm64.

    Parameters
    ----------
    name : str
    edit : the change; {on} stands for the test whether the fault is switched on
    guest : bundled guest that makes it happen
    rules : the rules one of which must be broken; empty if no rule can see it
    replay : the prediction of the guest differs from what was recorded
    what : str, what is wrong with KVM, in a sentence
    why_not : str, why no rule can see it
    endless : the guest does not end by itself
    """

    name: str
    edit: Edit
    guest: str
    rules: frozenset[str]
    what: str
    replay: bool = True
    why_not: str = ""
    endless: bool = False


def _edit(file: str, function: str, pattern: str, replacement: str) -> Edit:
    return Edit(file if "/kvm/" in file else f"{_KVM}/{file}", function, pattern, replacement)


# fmt: off
ARM64_FAULTS: tuple[Arm64Fault, ...] = (
    Arm64Fault(
        "mmio-of-twice-the-size",
        _edit("mmio.c", "int io_mem_abort", r"len = kvm_vcpu_dabt_get_as\(vcpu\);",
              "len = kvm_vcpu_dabt_get_as(vcpu) << ({on} && kvm_vcpu_dabt_get_as(vcpu) < 8);"),
        "dabt-split", frozenset({"V5"}), "MMIO of up to four bytes is done with twice the size."),
    Arm64Fault(
        "mmio-in-the-other-direction",
        _edit("mmio.c", "int io_mem_abort", r"is_write = kvm_vcpu_dabt_iswrite\(vcpu\);",
              "is_write = kvm_vcpu_dabt_iswrite(vcpu) != {on};"),
        "lifecycle", frozenset({"V5"}), "A load is done as a store, and the other way round."),
    Arm64Fault(
        "mmio-at-the-beginning-of-the-page",
        _edit("mmu.c", "int kvm_handle_guest_abort", r"(?<=page size\.\n\t\t \*/\n\t\t)fault_ipa \|=",
              "fault_ipa |= {on} ? 0 :"),
        "dabt-split", frozenset({"V5"}), "MMIO goes to the first byte of its page."),
    Arm64Fault(
        "undescribed-access-served-as-mmio",
        _edit("mmio.c", "int io_mem_abort", r"if \(!kvm_vcpu_dabt_isvalid\(vcpu\)\) \{",
              "if (!kvm_vcpu_dabt_isvalid(vcpu) && !{on}) {"),
        "dabt-split", frozenset({"V5"}), "An access that the syndrome does not describe is done as MMIO of one byte."),
    Arm64Fault(
        "mmio-read-never-completed",
        _edit("mmio.c", "int kvm_handle_mmio_return", r"if \(!kvm_vcpu_dabt_iswrite\(vcpu\)\) \{",
              "if (!kvm_vcpu_dabt_iswrite(vcpu) && !{on}) {"),
        "lifecycle", frozenset({"V8"}), "What userspace read never reaches the guest's register."),
    Arm64Fault(
        "mmio-read-exit-lost",
        _edit("mmio.c", "int io_mem_abort", r"(?<=run->exit_reason\t= KVM_EXIT_MMIO;\n\t)return 0;",
              "return {on} && !is_write;"),
        "dabt-split", frozenset({"V8"}), "A read that userspace should serve goes back to the guest.", endless=True),
    Arm64Fault(
        "mmio-not-stepped-over",
        _edit("mmio.c", "int kvm_handle_mmio_return", r"kvm_incr_pc\(vcpu\);", "if (!{on}) kvm_incr_pc(vcpu);"),
        "lifecycle", frozenset(), "The guest does MMIO again that was completed.", endless=True,
        why_not="a loop around one access looks the same"),
    Arm64Fault(
        "stage-2-fault-swallowed",
        _edit("mmu.c", "int kvm_handle_guest_abort", r"ret = user_mem_abort\(([^;]*)\);",
              r"ret = {on} ? 0 : user_mem_abort(\1);"),
        "stage2", frozenset({"H3"}), "A page of RAM is never mapped, and the guest tries it again.", endless=True),
    Arm64Fault(
        "register-of-the-neighbour",
        _edit("sys_regs.c", "int kvm_handle_sys_reg", r"params = esr_sys64_to_params\(esr\);",
              "params = esr_sys64_to_params(esr); params.Op2 ^= {on};"),
        "lifecycle", frozenset({"V5"}), "A trapped access goes to another system register."),
    Arm64Fault(
        "register-read-as-written",
        _edit("sys_regs.c", "int kvm_handle_sys_reg", r"params = esr_sys64_to_params\(esr\);",
              "params = esr_sys64_to_params(esr); params.is_write ^= {on};"),
        "lifecycle", frozenset({"V5"}), "A read of a system register is done as a write, and the other way round."),
    Arm64Fault(
        "register-not-stepped-over",
        _edit("sys_regs.c", "static void perform_access", r"kvm_incr_pc\(vcpu\);", "if (!{on}) kvm_incr_pc(vcpu);"),
        "lifecycle", frozenset(), "The guest accesses a system register again that was served.", endless=True,
        why_not="a loop around one access looks the same"),
    Arm64Fault(
        "hidden-register-stepped-over",
        _edit("sys_regs.c", "static void perform_access", r"kvm_inject_undefined\(vcpu\);",
              "if ({on}) kvm_incr_pc(vcpu); else kvm_inject_undefined(vcpu);"),
        "undefined", frozenset(), "A hidden register is stepped over, without an undefined-instruction exception.",
        why_not="exceptions and steps are carried out behind kvm_entry, and neither is traced"),
    Arm64Fault(
        "hypercall-stepped-over-twice",
        _edit("handle_exit.c", "static int handle_hvc", r"ret = kvm_hvc_call_handler\(vcpu\);",
              "ret = kvm_hvc_call_handler(vcpu); if ({on}) kvm_incr_pc(vcpu);"),
        "lifecycle", frozenset(), "The instruction behind HVC is skipped.", endless=True,
        why_not="the step is carried out behind kvm_entry, and what instruction follows is not traced"),
    Arm64Fault(
        "wfi-not-stepped-over",
        _edit("handle_exit.c", "static int kvm_handle_wfx", r"out:\n\tkvm_incr_pc\(vcpu\);",
              "out:\n\tif (!{on}) kvm_incr_pc(vcpu);"),
        "interrupt", frozenset(), "The guest executes WFI again.", replay=False,
        why_not="a loop around WFI looks the same; the interrupt ends it"),
    Arm64Fault(
        "wfi-does-not-block",
        _edit("handle_exit.c", "static int kvm_handle_wfx", r"\t\tkvm_vcpu_wfi\(vcpu\);",
              "\t\tif (!{on}) kvm_vcpu_wfi(vcpu);"),
        "interrupt", frozenset({"H7"}), "WFI returns at once, although no interrupt is pending.", replay=False),
    Arm64Fault(
        "timer-interrupt-lost",
        _edit("arch_timer.c", "static void kvm_timer_update_irq", r"if \(!userspace_irqchip\(vcpu->kvm\)\) \{",
              "if (!userspace_irqchip(vcpu->kvm) && !({on} && new_level)) {"),
        "interrupt", frozenset({"V14"}), "The timer's line rises, and the vGIC is not told.", endless=True),
    Arm64Fault(
        "timer-line-upside-down",
        _edit("arch_timer.c", "static void kvm_timer_update_irq", r"timer_ctx->irq\.level,\n(\t+)  timer_ctx\);",
              r"timer_ctx->irq.level != {on},\n\1  timer_ctx);"),
        "interrupt", frozenset({"V14"}), "The vGIC is told the opposite of the timer's level.", endless=True),
    Arm64Fault(
        "timer-line-of-the-neighbour",
        _edit("arch_timer.c", "static void kvm_timer_update_irq", r"(kvm_vgic_inject_irq\([^;]*)timer_ctx->irq\.irq,",
              r"\1timer_ctx->irq.irq ^ {on},"),
        "interrupt", frozenset({"V14"}), "The vGIC is told of another interrupt than the timer's.", endless=True),
    Arm64Fault(
        "cpu-on-elsewhere",
        _edit("psci.c", "static unsigned long kvm_psci_vcpu_on",
              r"reset_state->pc = smccc_get_arg2\(source_vcpu\);",
              "reset_state->pc = smccc_get_arg2(source_vcpu) + 4 * {on};"),
        "smp", frozenset(), "A vCPU that PSCI CPU_ON starts begins an instruction too late.", endless=True,
        why_not="kvm_hvc_arm64 traces only the call's number, not where the vCPU shall begin"),
    Arm64Fault(
        "cpu-on-sleeps",
        _edit("psci.c", "static unsigned long kvm_psci_vcpu_on",
              r"vcpu->arch\.mp_state\.mp_state = KVM_MP_STATE_RUNNABLE;",
              "if (!{on}) vcpu->arch.mp_state.mp_state = KVM_MP_STATE_RUNNABLE;"),
        "smp", frozenset(), "PSCI CPU_ON succeeds, and the vCPU stays off.", endless=True,
        why_not="the call's answer and its target are not traced"),
    Arm64Fault(
        "system-off-answered",
        _edit("psci.c", "static int kvm_psci_0_2_call",
              r"(kvm_psci_system_off\(vcpu\);(?s:.*?))ret = 0;", r"\1ret = {on};"),
        "smc", frozenset(), "PSCI SYSTEM_OFF goes back to the guest.", endless=True,
        why_not="a VMM may have PSCI's calls refused (6.12: KVM_ARM_VM_SMCCC_FILTER)"),
    Arm64Fault(
        "sgi-lost",
        _edit("vgic/vgic-mmio-v3.c", "void vgic_v3_dispatch_sgi", r"irq->pending_latch = true;",
              "irq->pending_latch = !{on};"),
        "smp", frozenset(), "A software-generated interrupt never arrives.", endless=True,
        why_not="the vGIC traces no software-generated interrupt"),
    Arm64Fault(
        "run-returns-something-else",
        _edit("virt/kvm/kvm_main.c", "static long kvm_vcpu_ioctl",
              r"trace_kvm_userspace_exit\(vcpu->run->exit_reason, r\);",
              "trace_kvm_userspace_exit(vcpu->run->exit_reason, r); r = r ? r : {on};"),
        "lifecycle", frozenset({"V12"}), "The ioctl KVM_RUN returns another value than KVM says it does."),
    Arm64Fault(
        "mmio-write-exit-lost",
        _edit("mmio.c", "int io_mem_abort", r"(?<=run->exit_reason\t= KVM_EXIT_MMIO;\n\t)return ",
              "return ({on} && is_write) || "),
        "lifecycle", frozenset(), "A write that userspace should serve goes back to the guest.", endless=True,
        why_not="a loop of writes to a device in the kernel looks the same"),
)
# fmt: on


def number_of(fault: Arm64Fault) -> int:
    """Return the number that switches a fault on."""
    return ARM64_FAULTS.index(fault) + 1


def apply_all(source: Path) -> None:
    """Put all faults, each behind its number, into an unpacked kernel source."""
    for edit in DECLARATIONS:
        apply_edit(source, edit)
    for fault in ARM64_FAULTS:
        edit = fault.edit
        test = f"(kvm_fault == {number_of(fault)})"
        apply_edit(source, Edit(edit.file, edit.function, edit.pattern, edit.replacement.replace("{on}", test)))
