"""H7: a halted vCPU that goes on although nothing woke it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.arrivals import arrivals
from kvmtrace.check.excerpt import owed_events
from kvmtrace.check.findings import constant
from kvmtrace.check.halted_vcpus import WAIT
from kvmtrace.check.rule import SUSPICION, RowPart, Rule
from kvmtrace.model.wake_ups import HARDWARE_DELIVERY, WAKES_FROM_HLT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found
    from kvmtrace.isa.base import ExitRow

    Group = NDArray[np.intp]


RULE = Rule(
    "H7",
    "HLT left without cause",
    SUSPICION,
    ("kvm_exit.exit_reason", "kvm_exit.isa"),
    "A vCPU that halted in the kernel goes on only for an interrupt, an exception, an NMI, SMI, INIT or SIPI, or "
    "another vCPU's kick; WFI blocks the vCPU until it is woken up.",
    "kvm_vcpu_check_block (virt/kvm/kvm_main.c), kvm_vcpu_has_events (x86.c)",
    "events that hardware delivers (APICv, AVIC); the vGIC's interrupts; WFIT past its deadline looks like a fault",
    places=lambda excerpt: len(_resumed(excerpt)),
    blames_handler=False,
    healthy="""
(200) kvm_inj_exception: exception=13 has_error=1 error_code=0x0 reinjected=0
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=12 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=S ==> next_comm=swapper/0 next_pid=0 next_prio=120
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=48
kvm_vcpu_wakeup: ns=900 waited=1 valid=1
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1001
kvm_exit: exit_reason=10 guest_rip=0x1001 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: func=0 index=0 rax=0 rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x1003
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=12 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=S ==> next_comm=swapper/0 next_pid=0 next_prio=120
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=48
kvm_vcpu_wakeup: ns=900 waited=1 valid=1
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1001
kvm_exit: exit_reason=10 guest_rip=0x1001 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: func=0 index=0 rax=0 rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x1003
kvm_exit: exit_reason=31 guest_rip=0x1003 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_msr: write=0 ecx=123 data=0x0 exception=1
kvm_inj_exception: exception=13 has_error=1 error_code=0x0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1003
kvm_exit: exit_reason=12 guest_rip=0x1003 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=S ==> next_comm=swapper/0 next_pid=0 next_prio=120
kvm_vcpu_wakeup: ns=900 waited=1 valid=1
kvm_entry: vcpu_id=0 rip=0x1004
kvm_exit: exit_reason=10 guest_rip=0x1004 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_cpuid: func=0 index=0 rax=0 rbx=0 rcx=0 rdx=0 found=1 used_max_basic=0
kvm_entry: vcpu_id=0 rip=0x1006
""",
)


def _resumed(excerpt: Excerpt) -> Group:
    """Return the HLT exits whose vCPU goes on without having left to userspace."""
    exits = excerpt.exits
    group: Group = np.flatnonzero(excerpt.of_kind("halt") & ~excerpt.nested & (exits.next_kind == ENTRY))
    return group


@RULE.part(
    needs=(
        "kvm_exit.vcpu_id",
        "kvm_exit.guest_rip",
        "kvm_entry.rip",
        "kvm_inj_virq",
        "kvm_inj_exception",
        "kvm_apic_accept_irq.apicid",
        "kvm_apic_accept_irq.dm",
        "kvm_apic_accept_irq.vec",
    )
)
def _cause(excerpt: Excerpt, found: Found) -> None:
    exits, whole = excerpt.exits, _resumed(excerpt)
    seen = excerpt.capability.seen
    if "kvm_inj_virq" not in seen or not seen.isdisjoint(HARDWARE_DELIVERY):
        found.check(0, len(whole))
        return
    group = whole[~exits.has(*WAKES_FROM_HLT)[whole]]
    arrived, known = _others_arrived(excerpt, group)
    group, known = group[~arrived], known[~arrived]
    # what the next exit says is needed: an interrupt that the guest cannot take yet has a window opened for it
    after = np.minimum(np.searchsorted(exits.seg, exits.seg[group] + 2), len(exits) - 1)
    told = known & (exits.seg[after] == exits.seg[group] + 2)
    window = told & excerpt.of_kind("interrupt_window")[after]
    window &= exits.get("guest_rip")[after] == exits.resume_rip[group]
    bad = group[told & ~window]
    unknown = np.count_nonzero(~told)
    found.check(len(whole) - unknown, unknown)
    found.violate(
        excerpt.segments.start[exits.seg[bad] + 1],
        lambda i: (
            f"an interrupt, exception, NMI, SMI, INIT, SIPI or kick after {excerpt.exit_name(bad[i])}",
            "VM-entry without any",
        ),
    )


def _others_arrived(excerpt: Excerpt, group: Group) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Say for which exits anything but a plain interrupt arrived since the vCPU halted the time before.

    Returns
    -------
    (arrived, known) : known is False where that time lies in an earlier table, whose arrivals are not at hand
    """
    exits, sequence, arrived = excerpt.exits, excerpt.sequence, arrivals(excerpt)
    others = np.append(0, np.cumsum(~arrived.plain))
    vcpu = exits.get("vcpu_id")[group].astype(np.int64)
    until = sequence.row[excerpt.segments.start[exits.seg[group] + 1]]
    halts = np.flatnonzero(excerpt.of_kind("halt"))
    before = np.searchsorted(halts, group) - 1
    last = halts[np.maximum(before, 0)]
    same = (before >= 0) & (excerpt.thread[last] == excerpt.thread[group])
    since = np.where(same, sequence.row[exits.start[last]], 0)
    found: NDArray[np.bool_] = others[arrived.before(vcpu, until)] != others[arrived.before(vcpu, since)]
    return found, same & (since >= excerpt.whole.n_parked)


@RULE.each_row
def _of_row(row: ExitRow) -> Iterator[RowPart]:
    if WAIT in owed_events(row):
        source = "kvm_handle_wfx (handle_exit.c), kvm_vcpu_halt (virt/kvm/kvm_main.c)"
        yield RowPart("WFI", (f"{WAIT}.is_wfe", "kvm_vcpu_wakeup"), _blocks, source=source)


def _blocks(excerpt: Excerpt, group: Group, found: Found) -> None:
    """Check that WFI waits: kvm_vcpu_halt tells of it, however short it was."""
    exits = excerpt.exits
    group = group[exits.next_kind[group] == ENTRY]
    position = excerpt.first_in_exit(WAIT, group)
    group, position = group[position >= 0], position[position >= 0]
    waits = excerpt.sequence.values(WAIT, "is_wfe", position) == 0
    found.check(np.count_nonzero(waits))
    found.violate(
        position[waits & ~exits.has("wake-up")[group]],
        constant("kvm_vcpu_wakeup behind WFI, which blocks the vCPU", "VM-entry without it"),
    )
