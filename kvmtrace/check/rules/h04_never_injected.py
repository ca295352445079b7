"""H4: an interrupt that was accepted before the vCPU halted, and is never injected."""

from __future__ import annotations

from errno import EINTR
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import USERSPACE
from kvmtrace.check.arrivals import arrivals
from kvmtrace.check.exit_conditions import userspace_fields
from kvmtrace.check.halted_vcpus import NEEDS, halted, idle_ns, slept
from kvmtrace.check.rule import SUSPICION, Rule
from kvmtrace.model.thresholds import threshold

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "H4",
    "accepted but never injected",
    SUSPICION,
    NEEDS,
    "An interrupt that the LAPIC accepted is injected: the vCPU does not halt, and stay halted, with it, until the "
    "recording ends or a signal ends KVM_RUN.",
    "kvm_apic_accept_events, kvm_check_and_inject_events (x86.c)",
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=12 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=1 next_comm=other next_pid=7 next_prio=120
kvm_vcpu_wakeup: ns=1000 waited=1 valid=1
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1001
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=236
kvm_exit: exit_reason=12 guest_rip=0x1001 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=1 next_comm=other next_pid=7 next_prio=120
[1] (200) kvm_apic_accept_irq: apicid=7 dm=0 tm=0 vec=1
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=12 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=1 next_comm=other next_pid=7 next_prio=120
kvm_vcpu_wakeup: ns=1000 waited=1 valid=1
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1001
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=236
kvm_exit: exit_reason=12 guest_rip=0x1001 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=1 next_comm=other next_pid=7 next_prio=120
+2s
[1] (200) kvm_apic_accept_irq: apicid=7 dm=0 tm=0 vec=1
""",
)


@RULE.part()
def _waiting(excerpt: Excerpt, found: Found) -> None:
    known = halted(excerpt)
    if excerpt.final:
        known.report(excerpt, found, before_halt=True)


@RULE.part(
    "until a signal",
    needs=("kvm_userspace_exit.errno", "sched_switch.prev_state"),
    adds=False,
)
def _until_signal(excerpt: Excerpt, found: Found) -> None:
    """Check that no interrupt arrived long before a signal ended the sleep of a halted vCPU."""
    exits, sequence, segments = excerpt.exits, excerpt.sequence, excerpt.segments
    group = _left_by_signal(excerpt)
    arrived = arrivals(excerpt)
    found.check(len(group))
    if not len(group) or not len(arrived.row):
        return
    leaves = segments.start[exits.seg[group] + 1]
    asleep = excerpt.first_in_exit("sched_switch", group)
    vcpu = exits.get("vcpu_id")[group].astype(np.int64)
    first = np.minimum(arrived.before(vcpu, sequence.row[asleep]), len(arrived.row) - 1)
    waits = (arrived.row[first] > sequence.row[asleep]) & (arrived.before(vcpu, sequence.row[leaves]) > first)
    waits &= arrived.plain[first]
    most = threshold("woken_within")
    late_ns = sequence.ts_ns[leaves] - excerpt.whole.table.ts_ns[arrived.row[first]]
    late = [
        i
        for i in np.flatnonzero(waits & (late_ns > most)).tolist()
        if idle_ns(excerpt, arrived.row[first[i]], leaves[i]) > most
    ]
    found.violate(
        leaves[late],
        lambda i: (
            f"vector {int(arrived.vector[first[late[i]]]):#x} injected: it arrived for a sleeping vCPU",
            f"still halted {late_ns[late[i]] / 1e6:.1f} ms later, when a signal ended KVM_RUN",
        ),
    )


def _left_by_signal(excerpt: Excerpt) -> NDArray[np.intp]:
    """Return the HLT exits whose sleep ended with -EINTR, nothing injected."""
    exits = excerpt.exits
    group = slept(excerpt)
    group = group[(exits.next_kind[group] == USERSPACE) & ~exits.has("inject interrupt", "inject exception")[group]]
    leaves, _, errno = userspace_fields(excerpt, group)
    found: NDArray[np.intp] = group[leaves & (errno == -EINTR)]
    return found
