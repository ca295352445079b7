"""V2: kvm_entry and kvm_exit alternate, in the run function, on one vCPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, ENTRY, EXIT
from kvmtrace.check.fast_path import OFF_FAST_PATH, slow_msrs
from kvmtrace.check.findings import constant
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.check.vcpu_identity import vcpu_ids
from kvmtrace.check.wrong_steps import check_steps, joined
from kvmtrace.isa.registry import run_functions
from kvmtrace.model.ordering import PREPARATION, RETURN_STEPS, RUN_STEPS
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "V2",
    "entry and exit alternate",
    VIOLATION,
    ("kvm_entry", "kvm_exit"),
    "kvm_entry and kvm_exit of a vCPU alternate; only a VM-entry that failed outright (KVM_EXIT_FAIL_ENTRY) has no "
    "kvm_exit, and only kernels before 5.15 re-enter by fast path without kvm_entry.",
    "vcpu_enter_guest (x86.c), vmx_vcpu_run (vmx/vmx.c), svm_vcpu_run (svm/svm.c)",
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_entry: vcpu_id=0 rip=0x1000
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_entry: vcpu_id=0 rip=0x1000
""",
)


@RULE.part("steps", local=True)
def _steps(excerpt: Excerpt, found: Found) -> None:
    check_steps(excerpt, found, of_guest_mode=True)


@RULE.part("the vCPU of entry and exit", needs=("kvm_entry.vcpu_id", "kvm_exit.vcpu_id"), adds=False, local=True)
def _one_vcpu(excerpt: Excerpt, found: Found) -> None:
    segments, ids = excerpt.segments, vcpu_ids(excerpt)
    for kind, following in ((ENTRY, EXIT), (EXIT, ENTRY)):
        first = np.flatnonzero((segments.kind == kind) & (segments.next_kind == following))
        first = first[ids[first] != ids[first + 1]]
        found.violate(
            segments.start[first + 1],
            lambda i, first=first: (  # type: ignore[misc]
                f"vCPU {ids[first[i]]}, which this thread runs",
                f"vCPU {ids[first[i] + 1]}",
            ),
        )


def _any(classes: NDArray[np.uint8], names: Iterable[str]) -> NDArray[np.bool_]:
    return among(classes, [CLASS[name] for name in names])


@RULE.part(
    "the run function",
    needs=("|".join((*run_functions(), *run_functions("_return"))),),
    adds=False,
    local=True,
)
def _run_function(excerpt: Excerpt, found: Found) -> None:
    """Check that kvm_entry is the first thing the run function does, and that it is called and returns in turn."""
    if "entry_in_run" not in excerpt.capability.traits:
        return
    steps, classes = excerpt.steps.position, excerpt.step_classes
    after, together = classes[1:], joined(excerpt, steps)
    apart = steps[1:] > steps[:-1] + 1
    is_run, is_return = _any(classes, RUN_STEPS), _any(classes, RETURN_STEPS)
    runs, returns = is_run[:-1], is_return[1:]
    found.check(np.count_nonzero((runs | returns) & ~excerpt.sequence.first[steps[1:]]))
    late = np.flatnonzero(runs & (after == ENTRY) & together & apart)
    found.violate(steps[late] + 1, constant("kvm_entry, first thing in the run function", "another event"))
    twice = np.flatnonzero(is_return[:-1] & returns & together)
    found.violate(steps[twice + 1], constant("the run function returns once", "a second return"))
    again = np.flatnonzero(runs & is_run[1:] & together & ~apart)
    found.violate(steps[again + 1], constant("kvm_entry, or a return", "a second call"))
    # run function, something else, kvm_entry: no way back into the run function was seen in between
    odd = (_any(after, PREPARATION) | returns)[:-1] & (after[1:] == ENTRY)
    between = np.flatnonzero(runs[:-1] & odd & together[:-1] & together[1:])
    found.violate(
        steps[between + 1],
        constant("kvm_entry, first thing in the run function", "another event, and kvm_entry behind it"),
    )


@RULE.part(
    "the fast path in the run function",
    needs=("|".join(run_functions("_return")), "kvm_msr.ecx", "kvm_msr.write"),
    adds=False,
    local=True,
)
def _fast_path(excerpt: Excerpt, found: Found) -> None:
    """Check that between kvm_exit and the return of the run function stands only what the fast path traces."""
    if "entry_in_run" not in excerpt.capability.traits:
        return
    steps, classes = excerpt.steps.position, excerpt.step_classes
    returns = _any(classes, RETURN_STEPS)[1:]
    apart = steps[1:] > steps[:-1] + 1
    inside = np.flatnonzero((classes[:-1] == EXIT) & returns & joined(excerpt, steps) & apart)
    if not len(inside):
        return
    strays = OFF_FAST_PATH >> excerpt.sequence.cls.astype(np.uint64) & np.uint64(1)
    strays[slow_msrs(excerpt)] = 1
    total = np.append(0, np.cumsum(strays))
    bad = inside[total[steps[inside + 1]] > total[steps[inside]]]
    found.violate(
        steps[bad + 1],
        constant("the run function returns before the exit's handler runs", "a handler's event before the return"),
    )
