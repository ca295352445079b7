"""Which events tell the level of guest that a vCPU runs: L1, or L2 for whatever runs in a guest of that guest.

One table for everybody who follows levels: spans, which say of each VM-exit whose it is, and the model, whose rules
hold one telling of it (of the VM-exit itself) against the other (of what changed it).
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
    LevelEvent("kvm_nested_vmrun", L2, False,
               "nested_svm_vmrun (svm/nested.c), nested_vmx_run (vmx/nested.c); before 6.0",
               "L1 enters L2."),
    LevelEvent("kvm_nested_vmexit_inject", L1, False,
               "nested_svm_vmexit (svm/nested.c), nested_vmx_vmexit (vmx/nested.c); 6.1 and 6.12",
               "L1 goes on: it gets the exit, or another one that KVM made."),
    LevelEvent("kvm_nested_vmenter_failed", L1, False,
               "nested_vmx_reflect_vmexit (vmx/nested.c), KVM_NESTED_VMENTER_CONSISTENCY_CHECK (x86.h); 6.1 and 6.12",
               "L2 was not entered: L1 goes on behind its instruction, or at its exit handler."),
)
# fmt: on

# tells that a VM-exit is of L2, and stands in every one
TELLS_L2 = next(row.event for row in LEVEL_EVENTS if row.tells)
ENTERS_L2: tuple[str, ...] = tuple(row.event for row in LEVEL_EVENTS if row.level == L2 and not row.tells)
ENTERS_L1: tuple[str, ...] = tuple(row.event for row in LEVEL_EVENTS if row.level == L1)
# L1 gets an exit
REFLECTS = "kvm_nested_vmexit_inject"
# L2 is not entered
REFUSED = "kvm_nested_vmenter_failed"
