"""The order of events: within one VM-exit, of the steps of a system call, and around the run function.

Everything that a rule says about "before" and "after" stands here, beside the transition table: the checks look it
up. Names are those of states.py: steps by their own name, other events as the kernel names them.
"""

from __future__ import annotations

from typing import NamedTuple

from kvmtrace.model import states
from kvmtrace.model.nesting import NESTED_EVENTS
from kvmtrace.model.states import FOLLOW_UPS


class Order(NamedTuple):
    """Where both stand in one exit's segment, `earlier` comes before `later`.

    `last`: the last of `earlier` before the first of `later`, else the first of both.
    """

    earlier: str
    later: str
    source: str
    last: bool = False


# fmt: off
ORDER: tuple[Order, ...] = (
    Order("kvm_page_fault", "kvm_emulate_insn", "handle_ept_violation, npf_interception: traced before the decode"),
    Order("kvm_emulate_insn", "kvm_mmio", "x86_emulate_instruction decodes before it executes"),
    Order("kvm_emulate_insn", "kvm_pio", "x86_emulate_instruction decodes before it executes"),
    Order("kvm_apic", "kvm_msr", "kvm_set_msr_common: the register is traced inside the MSR access"),
    Order("kvm_msr", "inject exception", "kvm_emulate_rdmsr, kvm_emulate_wrmsr: a refused access is traced first"),
    Order("wake-up", "inject interrupt", "kvm_vcpu_halt, vcpu_enter_guest: who injects is not halted", True),
    Order("wake-up", "inject exception", "kvm_vcpu_halt, vcpu_enter_guest: who injects is not halted", True),
)
# fmt: on

# the steps of one call of an ioctl: system call, probe, result, probe's return, return
CALL_STEPS: tuple[str, ...] = (
    "call KVM_RUN",
    "call ioctl",
    "KVM_RUN",
    "vCPU ioctl",
    "userspace exit",
    "ioctl ends",
    "return to VMM",
)

# ... and after each of them those that cannot be its next step, where all calls and returns were recorded (a probe may
# miss a hit: that nothing stands between proves nothing). Source: kvm_vcpu_ioctl (virt/kvm/kvm_main.c)
# fmt: off
NEVER_NEXT: dict[str, frozenset[str]] = {
    "call KVM_RUN": frozenset({"vCPU ioctl", "call KVM_RUN", "call ioctl"}),
    "call ioctl": frozenset({"KVM_RUN", "userspace exit", "call KVM_RUN", "call ioctl"}),
    "KVM_RUN": frozenset({"KVM_RUN", "vCPU ioctl", "call KVM_RUN", "call ioctl"}),
    "vCPU ioctl": frozenset({"KVM_RUN", "vCPU ioctl", "userspace exit", "call KVM_RUN", "call ioctl"}),
    "userspace exit": frozenset({"userspace exit", "KVM_RUN", "vCPU ioctl", "call KVM_RUN", "call ioctl"}),
    "ioctl ends": frozenset({"ioctl ends", "userspace exit", "KVM_RUN", "vCPU ioctl", "call KVM_RUN", "call ioctl"}),
    "return to VMM": frozenset({"KVM_RUN", "vCPU ioctl", "userspace exit", "ioctl ends"}),
}
# fmt: on
# a second return is wrong only if no call was dropped: a filter by file descriptor drops calls, not returns
NEVER_NEXT_IF_PAIRED: dict[str, frozenset[str]] = {"return to VMM": frozenset({"return to VMM"})}

# steps of the run loop: between two world switches, never inside the run function
PREPARATION: tuple[str, ...] = ("inject interrupt", "inject exception", "wake-up", "halt poll")
RUN_STEPS: tuple[str, ...] = tuple(states.RUN_STEPS.values())
RETURN_STEPS: tuple[str, ...] = tuple(states.RETURN_STEPS.values())

# what the fast path traces inside the run function (svm_exit_handlers_fastpath, handle_fastpath_set_msr_irqoff),
# before a kvm_exit that is traced late, or between kvm_exit and the function's return: of all follow-ups only these
FAST_PATH_EVENTS: frozenset[str] = frozenset({"kvm_msr"})
NOT_ON_FAST_PATH: frozenset[str] = frozenset({*FOLLOW_UPS, *NESTED_EVENTS}) - FAST_PATH_EVENTS
FAST_PATH_MSRS: dict[int, str] = {0x830: "x2APIC ICR", 0x6E0: "TSC deadline"}  # writes only

# of one MMIO write either the in-kernel fast path is traced or the emulator; it is taken before a page fault is traced
EXCLUSIVE: tuple[tuple[str, str], ...] = (("kvm_fast_mmio", "kvm_mmio"), ("kvm_fast_mmio", "kvm_page_fault"))

# steps of the thread's next call: a return behind one of them is not that of the userspace exit before (V12)
STEPS_OF_A_NEW_CALL: tuple[str, ...] = ("call ioctl", "call KVM_RUN", "KVM_RUN", "vCPU ioctl", "FPU load")

# a KVM_RUN as its tracepoints bracket it: kvm_fpu directly behind kvm_userspace_exit, and never before it, is that of a
# kernel before 4.15, which loads the guest's FPU on demand (vcpu_put); it is not judged
FPU_BRACKET: tuple[str, ...] = ("kvm_entry", "kvm_exit", "kvm_userspace_exit", "kvm_fpu")
