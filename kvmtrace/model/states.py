"""States and events of KVM_RUN, as the reference model names them.

A state is what a vCPU thread is doing; it follows from the last *step* (an event that changes the state),
whatever came before. That property, which a test asserts of the transition table, is what lets the checker
look up whole columns at once.
"""

from __future__ import annotations

from kvmtrace.isa.registry import ISAS, run_functions, union
from kvmtrace.lazy_dataclass import dataclass

LATE_EXIT = ", ".join(isa.late_exit for isa in ISAS if isa.late_exit)

KVM_RUN = 0xAE80  # _IO(KVMIO, 0x80), include/uapi/linux/kvm.h


@dataclass(frozen=True)
class State:
    """A state of a vCPU thread: `where` is KVM's function, `sentence` says what happens there."""

    name: str
    where: str
    sentence: str


# fmt: off
STATES: dict[str, State] = {state.name: state for state in (
    State("unknown", "-", "The recording does not say: it has just begun, or events were lost."),
    State("user", "the VMM", "The thread runs the VMM, outside any ioctl."),
    State("ioctl", "kvm_vcpu_ioctl or another", "The thread is in an ioctl other than KVM_RUN."),
    State("run_called", "kvm_vcpu_ioctl (virt/kvm/kvm_main.c)", "KVM_RUN was called; the vCPU is being "
                                                                "locked."),
    State("loaded", "kvm_arch_vcpu_ioctl_run (x86.c)",
          "vCPU and guest FPU are loaded; pending I/O is completed, then the run loop begins."),
    State("woken", "vcpu_block, kvm_vcpu_halt", "A halted vCPU has polled, slept or woken up."),
    State("injecting", "kvm_check_and_inject_events (x86.c)",
          "An exception or interrupt is put into the entry's injection fields."),
    State("switching_in", "vmx_vcpu_run, svm_vcpu_run",
          "Interrupts are off; host state is saved and guest state loaded."),
    State("guest", "the guest", "From kvm_entry to kvm_exit: VM-entry, guest mode, VM-exit."),
    State("switched_out", "svm_vcpu_run has returned",
          f"Host state is restored, kvm_exit is not traced yet ({LATE_EXIT})."),
    State("exited", "vmx_vcpu_run, vmx_handle_exit, svm_handle_exit",
          "The VM-exit is recorded; the handler of its reason runs."),
    State("handling", "vmx_handle_exit, svm_handle_exit",
          "The vendor's run function has returned; the handler runs or has run."),
    State("unloaded", "kvm_arch_vcpu_ioctl_run (x86.c)", "The guest FPU is put away; KVM_RUN is about to "
                                                         "return."),
    State("left", "kvm_vcpu_ioctl (virt/kvm/kvm_main.c)", "kvm_userspace_exit is traced; the ioctl returns."),
    State("returned", "kvm_vcpu_ioctl has returned", "The system call is on its way out."),
)}
# fmt: on


@dataclass(frozen=True)
class ModelEvent:
    """A letter of the model's alphabet.

    Parameters
    ----------
    name : str, ours
    kind : str, tracepoint or probe
    condition : (field, value) that selects among the kind's events; ("", 0) for all;
        ("cmd!=", value) for all others
    optional : bool, recorded by a probe or system-call tracer that may miss it: its absence proves nothing
    sentence : str
    """

    name: str
    kind: str
    condition: tuple[str, int] = ("", 0)
    optional: bool = False
    sentence: str = ""


# name of the step -> probe event, for each ISA whose run function can be probed
_RUNNING = tuple(isa for isa in ISAS if isa.run_function)
RUN_STEPS: dict[str, str] = {isa.name: f"run {isa.name.upper()}" for isa in _RUNNING}
RETURN_STEPS: dict[str, str] = {name: f"{step} returns" for name, step in RUN_STEPS.items()}
_RUNS = {RUN_STEPS[isa.name]: isa.run_function for isa in _RUNNING}
_RETURNS = {RETURN_STEPS[isa.name]: f"{isa.run_function}_return" for isa in _RUNNING}

# steps: events that change the state
# fmt: off
STEPS: dict[str, ModelEvent] = {event.name: event for event in (
    ModelEvent("call KVM_RUN", "sys_enter_ioctl", ("cmd", KVM_RUN), True, "the VMM calls KVM_RUN"),
    ModelEvent("call ioctl", "sys_enter_ioctl", ("cmd!=", KVM_RUN), True, "the VMM calls another ioctl"),
    ModelEvent("KVM_RUN", "kvm_vcpu_ioctl", ("cmd", KVM_RUN), True, "kvm_vcpu_ioctl begins KVM_RUN"),
    ModelEvent("vCPU ioctl", "kvm_vcpu_ioctl", ("cmd!=", KVM_RUN), True, "kvm_vcpu_ioctl begins another "
                                                                         "request"),
    ModelEvent("FPU load", "kvm_fpu", ("load", 1), False, "the guest's FPU registers are loaded"),
    ModelEvent("FPU unload", "kvm_fpu", ("load", 0), False, "the host's FPU registers are restored"),
    ModelEvent("inject interrupt", "kvm_inj_virq", sentence="an interrupt is put into the entry fields"),
    ModelEvent("inject exception", "kvm_inj_exception", sentence="an exception is put into the entry fields"),
    ModelEvent("halt poll", "kvm_halt_poll_ns", sentence="the halt-polling interval was adapted"),
    ModelEvent("wake-up", "kvm_vcpu_wakeup", sentence="a halted vCPU goes on"),
    *(ModelEvent(name, kind, optional=True, sentence="the world switch begins") for name, kind in _RUNS.items()),
    ModelEvent("VM-entry", "kvm_entry", sentence="last trace before the guest runs"),
    ModelEvent("VM-exit", "kvm_exit", sentence="first trace after the guest ran"),
    *(ModelEvent(name, kind, optional=True, sentence="the world switch is over") for name, kind in _RETURNS.items()),
    ModelEvent("userspace exit", "kvm_userspace_exit", sentence="KVM_RUN hands over to the VMM"),
    ModelEvent("ioctl ends", "kvm_vcpu_ioctl_return", optional=True, sentence="kvm_vcpu_ioctl returns"),
    ModelEvent("return to VMM", "sys_exit_ioctl", optional=True, sentence="the system call returns"),
)}
# fmt: on

# What the handlers of VM-exits trace on the guest's behalf. They appear between VM-exit and the next
# VM-entry, or complete I/O after "loaded"; each exit row says which of them it owes or allows (V4, V13).
FOLLOW_UPS: tuple[str, ...] = union(lambda isa: isa.follow_ups)

# Consequences that may follow any exit, or come from the run loop: looked at by other rules, never forbidden.
BYSTANDERS: tuple[str, ...] = union(lambda isa: isa.bystanders)

# the parts of the lifecycle, for the account of what a recording did not show: steps, and follow-ups of VM-exits
# fmt: off
LIFECYCLE_PARTS: dict[str, tuple[str, ...]] = {
    "system calls": ("call KVM_RUN", "call ioctl", "return to VMM"),
    "KVM_RUN": ("KVM_RUN", "FPU load", "FPU unload", "userspace exit", "ioctl ends"),
    "world switch": (*RUN_STEPS.values(), *RETURN_STEPS.values()),
    "guest mode": ("VM-entry", "VM-exit"),
    "event injection": ("inject interrupt", "inject exception"),
    "halt and wake-up": ("halt poll", "wake-up"),
}
# fmt: on

# where a probe was not recorded, the recorded event that lies nearest to it
STAND_INS: dict[str, str] = {
    **dict.fromkeys(run_functions(), "kvm_entry"),
    "kvm_vcpu_ioctl": "sys_enter_ioctl",
    **dict.fromkeys(run_functions("_return"), "kvm_exit"),
}


# a thread that traces one of these is a vCPU thread
VCPU_EVENTS: tuple[str, ...] = (
    "kvm_entry",
    "kvm_exit",
    "kvm_userspace_exit",
    "kvm_fpu",
    *run_functions(),
)
# who faults on what another thread takes away meanwhile comes back at once, until that thread has done it (H3)
REMAPPING_EVENTS = ("kvm_unmap_hva_range", "kvm_set_spte_hva")
REMAPPING_IOCTLS = ("KVM_SET_USER_MEMORY_REGION", "KVM_SET_USER_MEMORY_REGION2")
# what shows that an exit got something done, although the guest continues at the same instruction (H3); so does the
# injection of a fresh event
PROGRESS_EVENTS: tuple[str, ...] = ("kvm_pio", "kvm_mmio")
# what only a LAPIC in the kernel traces (V7)
LAPIC_EVENTS: tuple[str, ...] = ("kvm_apic", "kvm_eoi", "kvm_pv_eoi", "kvm_hv_timer_state")
