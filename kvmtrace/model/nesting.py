"""Nested guests: which level of guest a vCPU runs, and which events say so.

To the KVM that is recorded (L0), its own guest is L1. A guest that is a hypervisor runs guests itself: L2. What those
run in turn (L3 and deeper) is L2 to this KVM, as it is L1 that it enters L2 for. A vCPU's level changes in the kernel
only, between a VM-exit and the next VM-entry, so a VM-entry and the VM-exit behind it are of one level.
"""

from __future__ import annotations

from typing import NamedTuple

UNKNOWN_LEVEL, L1, L2 = 0, 1, 2

# fmt: off
LEVELS: dict[int, str] = {
    UNKNOWN_LEVEL: "the recording does not tell: it has no nested event, or began before the first one",
    L1: "KVM's own guest; a hypervisor itself, if it has guests",
    L2: "a guest of that guest, or one that is nested deeper",
}


class LevelEvent(NamedTuple):
    """An event that tells the level: of the VM-exit that it belongs to (`tells`), or from there on."""

    event: str
    level: int
    tells: bool
    source: str
    sentence: str


LEVEL_EVENTS: tuple[LevelEvent, ...] = (
    LevelEvent("kvm_nested_vmexit", L2, True,
               "svm_handle_exit (svm/svm.c), nested_vmx_reflect_vmexit (vmx/nested.c); 6.1 and 6.12",
               "The VM-exit was taken in L2: it is traced once more before it is handled or reflected."),
    LevelEvent("kvm_nested_vmenter", L2, False,
               "enter_svm_guest_mode (svm/nested.c), nested_vmx_enter_non_root_mode (vmx/nested.c); 6.1 and 6.12",
               "L1 enters L2: by its instruction, by the return from system-management mode, or as userspace restores "
               "it."),
    LevelEvent("kvm_nested_vmrun", L2, False, "nested_svm_vmrun (svm/nested.c), nested_vmx_run (vmx/nested.c)",
               "L1 enters L2."),
    LevelEvent("kvm_nested_vmexit_inject", L1, False,
               "nested_svm_vmexit (svm/nested.c), nested_vmx_vmexit (vmx/nested.c); 6.1 and 6.12",
               "L1 goes on: it gets the exit, or another one that KVM made."),
    LevelEvent("kvm_nested_vmenter_failed", L1, False,
               "nested_vmx_reflect_vmexit (vmx/nested.c), and the macro CC; 6.1 and 6.12",
               "L2 was not entered: L1 goes on behind its instruction, or at its exit handler."),
)
# fmt: on

# tells that a VM-exit is of L2, and stands in every one
TELLS_L2 = next(row.event for row in LEVEL_EVENTS if row.tells)
ENTERS_L2: tuple[str, ...] = tuple(row.event for row in LEVEL_EVENTS if row.level == L2 and not row.tells)
ENTERS_L1: tuple[str, ...] = tuple(row.event for row in LEVEL_EVENTS if row.level == L1)
# L1 gets an exit
REFLECTS = "kvm_nested_vmexit_inject"
# traced before L1 gets an exit for an interrupt of its own: changes nothing itself
SAYS_WHY: tuple[str, ...] = ("kvm_nested_intr_vmexit",)
# traced with every entry into L2, on ISAs whose nested entries tell what L1 asked for
WITH_ENTRY = "kvm_nested_intercepts"
# leaves L2 without a word of its own where L2 was interrupted; which way it goes is its field `entering`
LEAVES_SILENTLY = "kvm_smm_transition"
# ioctls that put a vCPU into L2 or take it out; without ioctls recorded, any stay in userspace may have
LEVEL_SETTERS: tuple[str, ...] = (
    "KVM_SET_NESTED_STATE", "KVM_SET_VCPU_EVENTS", "KVM_SET_MSRS", "KVM_SET_CPUID2", "KVM_SET_SREGS",
)  # fmt: skip
# beside follow-ups, what shows that KVM did something about a VM-exit before it passed it on
DOINGS: tuple[str, ...] = (
    "inject interrupt", "inject exception", "FPU unload", "userspace exit", "FPU load",
)  # fmt: skip
# a VM-exit of L2 in which one of these stands did not go back to L2, or not at once: L2's exit tables do not apply
LEVEL_CHANGES: tuple[str, ...] = (*ENTERS_L2, *ENTERS_L1, *SAYS_WHY)
