"""N1: an exit of L2 is traced twice, and both events say the same."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import EXIT, mask_of
from kvmtrace.check.findings import constant
from kvmtrace.check.rip_continuity import rip_unwound
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.model.nesting import DOINGS, LEVEL_CHANGES, TELLS_L2, WITH_ENTRY
from kvmtrace.model.states import FOLLOW_UPS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Describe, Found

RULE = Rule(
    "N1",
    "L2's exit told twice",
    VIOLATION,
    ("kvm_nested_vmexit", "kvm_exit"),
    "A VM-exit of L2 is traced as kvm_exit, and before anything is done about it as kvm_nested_vmexit, with the same "
    "reason, RIP and information.",
    "svm_handle_exit (svm/svm.c), nested_vmx_reflect_vmexit (vmx/nested.c)",
    places=TELLS_L2,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=10 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 error_code=0x0 vcpu_id=0
kvm_nested_vmexit: exit_reason=10 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 error_code=0x0 vcpu_id=0
kvm_nested_vmexit_inject: exit_code=10 exit_info1=0x0 exit_info2=0x0 exit_int_info=0x0 exit_int_info_err=0 isa=1
kvm_entry: vcpu_id=0 rip=0x2000
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=10 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit: exit_reason=10 guest_rip=0x1007 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_nested_vmexit_inject: exit_code=10 exit_info1=0x0 exit_info2=0x0 exit_int_info=0x0 exit_int_info_err=0 isa=1
kvm_entry: vcpu_id=0 rip=0x2000
""",
)
# what the exit's handler, or its reflection, traces: L2's exit is told before
_DOINGS = mask_of(*FOLLOW_UPS, *LEVEL_CHANGES, WITH_ENTRY, *DOINGS)


@RULE.part("where it stands")
def _place(excerpt: Excerpt, found: Found) -> None:
    segments, sequence = excerpt.segments, excerpt.sequence
    positions = segments.positions(TELLS_L2)
    if not len(positions):
        return
    owner = segments.of[positions]
    found.check(len(positions))
    inside = segments.kind[owner] == EXIT
    stray = ~inside & (segments.kind[owner] != 0)
    found.violate(positions[stray], constant("kvm_nested_vmexit behind its kvm_exit", "elsewhere"))
    again = np.zeros(len(positions), bool)
    again[1:] = owner[1:] == owner[:-1]
    found.violate(positions[again], constant("one kvm_nested_vmexit for one kvm_exit", "a second"))
    doing = np.append(0, np.cumsum(_DOINGS >> sequence.cls.astype(np.uint64) & np.uint64(1)))
    late = inside & ~again & (doing[positions] != doing[segments.start[owner] + 1])
    found.violate(positions[late], constant("kvm_nested_vmexit before the exit is handled or reflected", "behind"))


def _check_field(excerpt: Excerpt, found: Found, *, name: str) -> None:
    exits = excerpt.exits
    group = np.flatnonzero(exits.has(TELLS_L2))
    if not len(group):
        return
    if name == "guest_rip":  # KVM may move RIP between the two, to have a soft event delivered again
        group = group[~rip_unwound(excerpt)[group]]
    again = excerpt.first_in_exit(TELLS_L2, group)
    told = excerpt.sequence.values(TELLS_L2, name, again).astype(np.uint64)
    own = exits.get(name)[group]
    bits = np.uint64(0xFFFFFFFF) if name == "exit_reason" else ~np.uint64(0)
    bad = np.flatnonzero((told ^ own) & bits)
    found.check(len(group))
    found.violate(again[bad], _describe(name, own[bad], told[bad]))


def _describe(name: str, own: NDArray[np.uint64], told: NDArray[np.uint64]) -> Describe:
    return lambda i: (f"{name} {int(own[i]):#x}, as kvm_exit says", f"{int(told[i]):#x}")


for _name in ("exit_reason", "guest_rip", "info1", "info2", "intr_info", "error_code", "vcpu_id"):
    RULE.part(f"its {_name}", needs=(f"kvm_nested_vmexit.{_name}", f"kvm_exit.{_name}"), adds=False)(
        partial(_check_field, name=_name)
    )
