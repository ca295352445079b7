"""Nested guests: which level of guest a vCPU runs, and which events say so.

To the KVM that is recorded (L0), its own guest is L1. A guest that is a hypervisor runs guests itself: L2. What those
run in turn (L3 and deeper) is L2 to this KVM, as it is L1 that it enters L2 for. A vCPU's level changes in the kernel
only, between a VM-exit and the next VM-entry, so a VM-entry and the VM-exit behind it are of one level.
"""

from __future__ import annotations

from kvmtrace.kvm.nested_events import (
    ENTERS_L1,
    ENTERS_L2,
    L1,
    L2,
    LEVEL_EVENTS,
    LEVELS,
    REFLECTS,
    REFUSED,
    TELLS_L2,
    UNKNOWN_LEVEL,
)

# the model's words for levels are those of everybody who follows them
__all__ = [
    "DOINGS", "ENTERS_L1", "ENTERS_L2", "L1", "L2", "LEAVES_SILENTLY", "LEVELS", "LEVEL_CHANGES", "LEVEL_EVENTS",
    "LEVEL_SETTERS", "NESTED_EVENTS", "REFLECTS", "REFUSED", "SAYS_WHY", "TELLS_L2", "UNKNOWN_LEVEL", "WITH_ENTRY",
]  # fmt: skip
# traced before L1 gets an exit for an interrupt of its own: changes nothing itself
SAYS_WHY: tuple[str, ...] = ("kvm_nested_intr_vmexit",)
# traced with every entry into L2, on ISAs whose nested entries tell what L1 asked for
WITH_ENTRY = "kvm_nested_intercepts"
# leaves L2 without a word of its own where L2 was interrupted; which way it goes is its field `entering`
LEAVES_SILENTLY = "kvm_smm_transition"
# ioctls that put a vCPU into L2 or take it out, and where KVM does that (6.1 and 6.12); without ioctls recorded, any
# stay in userspace may have
LEVEL_SETTERS: dict[str, str] = {
    "KVM_SET_NESTED_STATE": "svm_set_nested_state (svm/nested.c), vmx_set_nested_state (vmx/nested.c)",
    "KVM_SET_VCPU_EVENTS": "kvm_vcpu_ioctl_x86_set_vcpu_events, kvm_leave_nested (x86.c)",
    "KVM_SET_MSRS": "svm_set_efer (svm/svm.c), vmx_set_msr (vmx/vmx.c)",
    "KVM_SET_SREGS": "svm_set_efer (svm/svm.c)",
}
# beside follow-ups, what shows that KVM did something about a VM-exit before it passed it on
DOINGS: tuple[str, ...] = (
    "inject interrupt", "inject exception", "FPU unload", "userspace exit", "FPU load",
)  # fmt: skip
# a VM-exit of L2 in which one of these stands did not go back to L2, or not at once: L2's exit tables do not apply
LEVEL_CHANGES: tuple[str, ...] = (*ENTERS_L2, *ENTERS_L1, *SAYS_WHY)
# all of them: the exit's handler traces them, or the run loop, never the run function
NESTED_EVENTS: tuple[str, ...] = (TELLS_L2, *LEVEL_CHANGES, WITH_ENTRY)
