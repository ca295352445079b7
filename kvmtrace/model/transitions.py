"""The transition table of KVM_RUN: one row per edge, every edge of the model in this one place.

A row says: in `state`, `event` leads to `next`. `guard` names a condition (GUARDS) that must hold as well;
`only` names a trait of the recorded kernel (TRAITS), found in the recording itself, without which the row
does not exist. What no row allows is a violation. Events that were not recorded, or that the recorder may
have missed, are stepped over silently by the checker.
"""

from __future__ import annotations

from typing import NamedTuple

from kvmtrace.isa.registry import ISAS
from kvmtrace.model.states import LATE_EXIT, RETURN_STEPS, RUN_STEPS


class Transition(NamedTuple):
    """One edge; see the module docstring."""

    state: str
    event: str
    next: str
    source: str
    sentence: str
    guard: str = ""
    only: str = ""


# conditions on a single step, evaluated for the few rows that need them
# fmt: off
GUARDS: dict[str, str] = {
    "entry_failed": "the next kvm_userspace_exit says KVM_EXIT_FAIL_ENTRY: VMLAUNCH or VMRESUME itself "
                    "failed",
    "nested_entry_failed": "kvm_nested_vmenter_failed with an error of the processor follows kvm_entry: L1 goes on",
    "early_error": "errno is negative: KVM_RUN failed before it loaded the FPU",
    "init_reset": "an INIT reached this vCPU: kvm_vcpu_reset puts and loads the FPU on hosts with MPX",
    "other_ioctl": "the thread's last call was another ioctl than KVM_RUN",
    "fastpath_exit": "the exit before was handled by fast path (MSR write, preemption timer)",
}

# traits of a kernel, detected in the recording
TRAITS: dict[str, str] = {
    "exit_irqs_on": "kvm_exit is traced with interrupts on, after the run function returned "
                    f"({LATE_EXIT})",
    "exit_irqs_off": "kvm_exit is traced with interrupts off, inside the run function",
    "entry_in_run": "kvm_entry is traced inside the run function (since 5.15)",
    "entry_before_run": "kvm_entry is traced before the run function is called (5.10)",
    "refused_nested_entries": "entries of nested guests failed (kvm_nested_vmenter_failed): some without kvm_exit, "
                              "where that is traced inside the run function",
    "old_fastpath": "fast-path re-entry stays inside vmx_vcpu_run and traces no kvm_entry (5.10)",
}
# fmt: on

_RUN = "kvm_arch_vcpu_ioctl_run (x86.c)"
_LOOP = "vcpu_run, vcpu_enter_guest (x86.c)"
_INJECT = "kvm_check_and_inject_events (x86.c)"
_IOCTL = "kvm_vcpu_ioctl (virt/kvm/kvm_main.c)"
_SYSCALL = "ksys_ioctl (fs/ioctl.c)"
_VENDOR = "vmx_vcpu_run (vmx/vmx.c), svm_vcpu_run (svm/svm.c)"
_RUNNING = tuple(isa for isa in ISAS if isa.name in RUN_STEPS)
_HALT = "vcpu_block (x86.c), kvm_vcpu_halt (virt/kvm/kvm_main.c)"
_NEW = "entry_in_run"
_REFUSED = "refused_nested_entries"


def _from_loop(event: str, next_state: str, source: str, sentence: str, only: str = "") -> tuple[Transition, ...]:
    """Return the same edge from every state in which the run loop may be."""
    return tuple(
        Transition(state, event, next_state, source, sentence, only=only)
        for state in ("loaded", "woken", "injecting", "exited", "handling")
    )


# fmt: off
TRANSITIONS: tuple[Transition, ...] = (
    # into KVM_RUN
    Transition("user", "call KVM_RUN", "run_called", _SYSCALL, "The VMM calls KVM_RUN."),
    Transition("run_called", "KVM_RUN", "run_called", _IOCTL, "KVM takes the request."),
    Transition("run_called", "FPU load", "loaded", _RUN, "vcpu_load, then the guest's FPU is loaded."),
    Transition("run_called", "userspace exit", "left", _RUN, "KVM_RUN fails before the FPU is loaded.",
               "early_error"),
    Transition("run_called", "ioctl ends", "returned", _IOCTL,
               "KVM_RUN fails at once (wrong mm, bad argument, killed): no KVM event."),
    Transition("run_called", "return to VMM", "user", _IOCTL, "KVM_RUN fails at once: no KVM event."),

    # the run loop
    *_from_loop("halt poll", "woken", _HALT, "A halted vCPU polled for work; the interval is adapted."),
    *_from_loop("wake-up", "woken", _HALT, "A halted vCPU was woken, or found work while polling."),
    *_from_loop("inject exception", "injecting", _INJECT, "A pending or interrupted exception is injected."),
    *_from_loop("inject interrupt", "injecting", _INJECT, "A pending or interrupted interrupt is injected."),
    *(row for step in RUN_STEPS.values()
      for row in _from_loop(step, "switching_in", _LOOP, "Interrupts go off and the world switch begins.", _NEW)),
    *_from_loop("FPU unload", "unloaded", _RUN, "The loop ends: signal, userspace exit or error."),

    # the world switch and the guest
    *_from_loop("VM-entry", "guest", _VENDOR, "The world switch (not probed) is done up to VM-entry."),
    Transition("switching_in", "VM-entry", "guest", _VENDOR, "First action of the run function."),
    *(Transition("guest", step, "guest", "vcpu_enter_guest (x86.c, 5.10)",
                 "kvm_entry is traced by the caller, just before.", only="entry_before_run")
      for step in RUN_STEPS.values()),
    Transition("guest", "VM-exit", "exited", _VENDOR, "The guest was left; reason and qualification are "
                                                      "read."),
    *(Transition("guest", RETURN_STEPS[isa.name], "switched_out", isa.run_source,
                 "The run function returns first; the handler traces kvm_exit.", only="exit_irqs_on")
      for isa in _RUNNING),
    Transition("switched_out", "VM-exit", "exited", "svm_handle_exit (svm/svm.c), vmx_handle_exit (vmx/vmx.c)",
               "kvm_exit is traced with interrupts on.", only="exit_irqs_on"),
    *(Transition("exited", RETURN_STEPS[isa.name], "handling", isa.run_source,
                 "The world switch is over (kvm_exit traced inside).", only="exit_irqs_off") for isa in _RUNNING),
    Transition("exited", "VM-exit", "exited", "vmx_vcpu_run (vmx/vmx.c, 5.10)",
               "Fast-path re-entry inside the run function.", "fastpath_exit", "old_fastpath"),
    *(Transition("switching_in", RETURN_STEPS[isa.name], "handling", isa.run_source,
                 "Guest state is invalid (emulation_required): no entry; KVM emulates instead.", only="exit_irqs_off")
      for isa in _RUNNING if isa.emulates_real_mode),
    *(Transition("guest", RETURN_STEPS[isa.name], "handling", isa.run_source,
                 "VMLAUNCH or VMRESUME failed (VMfail): no kvm_exit.", "entry_failed", "exit_irqs_off")
      for isa in _RUNNING if isa.early_exit_field),
    Transition("guest", "FPU unload", "unloaded", "vmx_vcpu_run (vmx/vmx.c)",
               "VM-entry failed (VMfail): no kvm_exit, KVM_EXIT_FAIL_ENTRY follows.", "entry_failed"),

    Transition("guest", "userspace exit", "left", "vmx_vcpu_run (vmx/vmx.c)",
               "VM-entry failed (VMfail), FPU not recorded.", "entry_failed"),

    # a nested guest (L2) whose entry the processor refuses: no kvm_exit, L1 goes on behind its instruction
    *(Transition("guest", RETURN_STEPS[isa.name], "handling", isa.run_source,
                 "The processor refused to enter L2 (VMfail): no kvm_exit.", "nested_entry_failed", _REFUSED)
      for isa in _RUNNING if isa.early_exit_field),
    *(Transition("guest", step, state, "nested_vmx_reflect_vmexit (vmx/nested.c)",
                 "The processor refused to enter L2 (VMfail): L1 goes on.", "nested_entry_failed", _REFUSED)
      for step, state in (("inject interrupt", "injecting"), ("inject exception", "injecting"),
                          ("VM-entry", "guest"), ("FPU unload", "unloaded"))),

    # out of KVM_RUN
    Transition("unloaded", "userspace exit", "left", _IOCTL, "KVM_RUN reports its result."),
    Transition("unloaded", "FPU load", "loaded", "kvm_vcpu_reset (x86.c)",
               "INIT on a host with MPX puts and loads the FPU within KVM_RUN.", "init_reset"),
    Transition("left", "ioctl ends", "returned", _IOCTL, "The ioctl returns the traced errno."),
    Transition("left", "return to VMM", "user", _SYSCALL, "Back in the VMM (return not probed)."),
    Transition("returned", "return to VMM", "user", _SYSCALL, "Back in the VMM."),

    # other ioctls of the thread
    Transition("user", "call ioctl", "ioctl", _SYSCALL, "The VMM sets up or inspects VM or vCPU."),
    Transition("ioctl", "vCPU ioctl", "ioctl", _IOCTL, "KVM takes the request."),
    Transition("ioctl", "FPU load", "loaded", "kvm_arch_vcpu_ioctl_get_mpstate (x86.c)",
               "KVM_GET_MP_STATE loads and puts the FPU on hosts with MPX."),
    Transition("unloaded", "ioctl ends", "returned", "kvm_arch_vcpu_ioctl_get_mpstate (x86.c)",
               "KVM_GET_MP_STATE is over.", "other_ioctl"),
    Transition("unloaded", "return to VMM", "user", "kvm_arch_vcpu_ioctl_get_mpstate (x86.c)",
               "KVM_GET_MP_STATE is over.", "other_ioctl"),
    Transition("ioctl", "ioctl ends", "returned", _IOCTL, "The request is done."),
    Transition("ioctl", "return to VMM", "user", _SYSCALL, "The request is done."),
)
# fmt: on

# States in which the thread itself may trace follow-ups of a VM-exit. In "guest" and "switched_out" that
# needs a kernel which traces kvm_exit late.
FOLLOW_UP_STATES: frozenset[str] = frozenset({"unknown", "loaded", "woken", "injecting", "exited", "handling"})
LATE_EXIT_STATES: frozenset[str] = frozenset({"guest", "switched_out"})
# the only event that KVM itself traces between kvm_entry and kvm_exit, where that is with interrupts off
GUEST_EVENTS: frozenset[str] = frozenset({"kvm_wait_lapic_expire"})
