"""Raw and BTF tracepoints: where the programs find what they need, in a tracepoint's arguments and KVM's structures.

They cost about half of what plain tracepoints do, for which the kernel first fills in a record. What a raw program
reads is what the record would hold, and where the kernel's type information does not say enough, the plain
tracepoint is used. Sources: arch/x86/kvm/trace.h (kvm_exit), vmx_get_exit_info(), svm_get_exit_info()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmtrace.capture.bpf.btf_types import Argument, KernelTypes

# of summary.c: macro -> (tracepoint, argument, sizes it may have)
_SUMMARY_ARGUMENTS = {
    "USERSPACE_REASON_ARG": ("kvm_userspace_exit", "reason", (4,)),
    "USERSPACE_ERRNO_ARG": ("kvm_userspace_exit", "errno", (4,)),
    "FPU_LOAD_ARG": ("kvm_fpu", "load", (4,)),
}
# where the reason of the last VM-exit stands, newest first: since 6.16, since 5.11
_VMX_REASON = (("vt", "exit_reason"), ("exit_reason",))


def summary_macros(types: KernelTypes) -> dict[str, str]:
    """Return the macros for summary.c's raw programs; a program whose macros are missing is not compiled."""
    macros = {}
    for macro, (tracepoint, name, sizes) in _SUMMARY_ARGUMENTS.items():
        argument = (types.arguments(tracepoint) or {}).get(name)
        if argument is not None and argument.is_number and argument.size in sizes:
            macros[macro] = str(argument.slot)
    if ("USERSPACE_REASON_ARG" in macros) != ("USERSPACE_ERRNO_ARG" in macros):
        macros = {"FPU_LOAD_ARG": macros["FPU_LOAD_ARG"]} if "FPU_LOAD_ARG" in macros else {}
    return macros | _switch_macros(types) | _wakeup_macros(types) | _exit_macros(types)


def _wakeup_macros(types: KernelTypes) -> dict[str, str]:
    """Return where sched_wakeup says who wakes."""
    task = (types.arguments("sched_wakeup") or {}).get("p")
    return {} if task is None else {"WAKEUP_TASK_ARG": str(task.slot)}


def _switch_macros(types: KernelTypes) -> dict[str, str]:
    """Return where sched_switch says who leaves and who comes; before Linux 5.18 it had no prev_state."""
    arguments = types.arguments("sched_switch") or {}
    pid = types.offset("task_struct", "pid")
    if not {"preempt", "next", "prev_state"} <= set(arguments) or pid is None or pid[1] != 4:
        return {}
    return {
        "SWITCH_NEXT_ARG": str(arguments["next"].slot),
        "SWITCH_PREEMPT_ARG": str(arguments["preempt"].slot),
        "SWITCH_STATE_ARG": str(arguments["prev_state"].slot),
        "TASK_PID_AT": str(pid[0]),
    }


def _exit_macros(types: KernelTypes) -> dict[str, str]:
    """Return where kvm_exit's reason, instruction set and vCPU are; {} if this kernel does not tell."""
    arguments = types.arguments("kvm_exit") or {}
    number = types.offset("kvm_vcpu", "vcpu_id")
    if not {"vcpu", "isa"} <= set(arguments) or number is None or number[1] != 4:
        return {}
    reason = _exit_reason(types, arguments)
    if not reason:
        return {}
    return reason | {
        "RAW_EXIT": "1",
        "EXIT_VCPU_ARG": str(arguments["vcpu"].slot),
        "EXIT_ISA_ARG": str(arguments["isa"].slot),
        "VCPU_ID_AT": str(number[0]),
    }


def _exit_reason(types: KernelTypes, arguments: dict[str, Argument]) -> dict[str, str]:
    if "exit_reason" in arguments:  # before Linux 5.16
        return {"EXIT_REASON_ARG": str(arguments["exit_reason"].slot)}
    macros = {}
    if (types.offset("vcpu_vmx", "vcpu") or (1, 0))[0] == 0:
        found = [place for path in _VMX_REASON if (place := types.offset("vcpu_vmx", *path)) and place[1] == 4]
        if found:
            macros["VMX_EXIT_REASON_AT"] = str(found[0][0])
    vmcb, code = types.offset("vcpu_svm", "vmcb"), types.offset("vmcb", "control", "exit_code")
    if vmcb and code and (types.offset("vcpu_svm", "vcpu") or (1, 0))[0] == 0:
        macros |= {"VMCB_POINTER_AT": str(vmcb[0]), "VMCB_EXIT_CODE_AT": str(code[0])}
    return macros
