"""V3: in guest mode the thread is neither scheduled nor moved; interrupts are off around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY, EXIT
from kvmtrace.check.findings import constant
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.model.states import LATE_EXIT, RETURN_STEPS
from kvmtrace.table.event_table import TRACE_FLAG_IRQS_NOSUPPORT, TRACE_FLAG_IRQS_OFF

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "V3",
    "no scheduling in guest mode",
    VIOLATION,
    ("kvm_entry", "kvm_exit"),
    "From kvm_entry to kvm_exit interrupts are off: the vCPU thread neither sleeps nor changes its CPU. Kernels that "
    f"trace kvm_exit with interrupts on ({LATE_EXIT}) guarantee this only up to the VM-exit.",
    "vcpu_enter_guest (x86.c): local_irq_disable before run, local_irq_enable after handle_exit_irqoff",
    "what happens between VM-exit and kvm_exit where the kernel traces kvm_exit with interrupts on, and the return of "
    "the run function was not recorded",
    places="VM-entry",
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
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=0 next_comm=other next_pid=7 next_prio=120
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_entry: vcpu_id=0 rip=0x1000
""",
)


def _end(excerpt: Excerpt) -> str:
    return "kvm_exit" if excerpt.capability.exit_irqs_off is True else "return of the run function"


def _stays(excerpt: Excerpt) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the stays in guest mode, and the position of the event that ends each with interrupts still off.

    That event is kvm_exit; where the kernel traces it with interrupts on, or does not tell, the return of the run
    function; -1 if that was not recorded.
    """
    segments = excerpt.segments
    inside = np.flatnonzero((segments.kind == ENTRY) & (segments.next_kind == EXIT))
    if excerpt.capability.exit_irqs_off is True:
        return inside, segments.stop[inside]
    last = np.full(len(inside), -1, np.intp)
    for step in RETURN_STEPS.values():
        last = np.maximum(last, segments.first_in(step)[inside])
    return inside, last


@RULE.part("the CPU in guest mode")
def _one_cpu(excerpt: Excerpt, found: Found) -> None:
    inside, last = excerpt.once("stays in guest mode", _stays)
    segments, cpu = excerpt.segments, excerpt.sequence.cpu
    start, stop = segments.start[inside[last >= 0]], last[last >= 0]
    at = np.flatnonzero((cpu[start] != cpu[stop]) & ~_switched(excerpt)[last >= 0]) if len(start) else start
    found.check(len(start), len(inside) - len(start))
    found.violate(
        stop[at],
        lambda i: (
            f"{_end(excerpt)} on CPU {cpu[start[at[i]]]}, without scheduling since kvm_entry",
            f"{_end(excerpt)} on CPU {cpu[stop[at[i]]]}",
        ),
    )


def _switched(excerpt: Excerpt) -> NDArray[np.bool_]:
    """Say in which stays in guest mode, of known end, the thread was scheduled."""
    inside, last = excerpt.once("stays in guest mode", _stays)
    first = excerpt.segments.first_in("sched_switch")[inside]
    found: NDArray[np.bool_] = (first >= 0) & (first < last)
    return found


@RULE.part("scheduling in guest mode", needs=("sched_switch",), adds=False)
def _unscheduled(excerpt: Excerpt, found: Found) -> None:
    inside = excerpt.once("stays in guest mode", _stays)[0]
    inside, segments, cpu = inside[_switched(excerpt)], excerpt.segments, excerpt.sequence.cpu
    found.violate(
        segments.first_in("sched_switch")[inside],
        lambda i: (
            f"{_end(excerpt)} on CPU {cpu[segments.start[inside[i]]]}, without scheduling since kvm_entry",
            "sched_switch in guest mode",
        ),
    )


@RULE.part("sleep before a late kvm_exit", needs=("sched_switch.prev_state",), adds=False)
def _awake(excerpt: Excerpt, found: Found) -> None:
    """Check that a thread whose kvm_exit is traced late is preempted before it at most, and never sleeps."""
    if excerpt.capability.exit_irqs_off is not False:
        return
    segments = excerpt.segments
    inside = (segments.kind == ENTRY) & (segments.next_kind == EXIT)
    switches = segments.positions("sched_switch")
    switches = switches[inside[segments.of[switches]]]
    state = excerpt.sequence.values("sched_switch", "prev_state", switches).astype(np.int64) & 0xFF
    found.check(np.count_nonzero(inside))
    found.violate(
        switches[state != 0], constant("preempted at most: from kvm_entry to kvm_exit KVM does not wait", "asleep")
    )


@RULE.part("interrupts off at kvm_entry", needs=("irq_flags",))
def _off_at_entry(excerpt: Excerpt, found: Found) -> None:
    _check_flags(excerpt, found, "kvm_entry", ENTRY)


@RULE.part("interrupts off at kvm_exit", needs=("irq_flags",), places="VM-exit")
def _off_at_exit(excerpt: Excerpt, found: Found) -> None:
    if excerpt.capability.exit_irqs_off is True:  # as the kernel traces it
        _check_flags(excerpt, found, "kvm_exit", EXIT)


def _check_flags(excerpt: Excerpt, found: Found, name: str, cls: int) -> None:
    sequence = excerpt.sequence
    position = np.flatnonzero((sequence.cls == cls) & ~sequence.repeated)
    flags = sequence.table.irq_flags[sequence.row[position]]
    off = (flags & TRACE_FLAG_IRQS_OFF) != 0
    if not len(position):
        return
    told = off.any() or (sequence.table.irq_flags & TRACE_FLAG_IRQS_OFF).any()
    if (flags & TRACE_FLAG_IRQS_NOSUPPORT).any() or not told:  # text traces may lack the column
        found.check(0, len(position))
        return
    found.check(len(position))
    found.violate(position[~off], constant(f"{name} with interrupts off", "interrupts on"))
