"""H1: a halted vCPU for which an interrupt was accepted, and which sleeps on, or wakes late."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.arrivals import arrivals
from kvmtrace.check.halted_vcpus import NEEDS, halted, idle_ns, slept
from kvmtrace.check.rule import SUSPICION, Rule
from kvmtrace.check.starting_vcpus import starting
from kvmtrace.model.thresholds import threshold

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "H1",
    "lost wake-up",
    SUSPICION,
    NEEDS,
    "A halted vCPU for which an interrupt was accepted wakes up soon; one that waits after INIT starts when a start-up "
    "message arrives.",
    "kvm_vcpu_halt, kvm_vcpu_block, kvm_vcpu_wake_up (virt/kvm/kvm_main.c)",
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=12 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=1 next_comm=other next_pid=7 next_prio=120
kvm_vcpu_wakeup: ns=1000 waited=1 valid=1
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1001
kvm_exit: exit_reason=12 guest_rip=0x1001 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=1 next_comm=other next_pid=7 next_prio=120
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=236
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
kvm_exit: exit_reason=12 guest_rip=0x1001 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
sched_switch: prev_comm=vmm prev_pid=100 prev_prio=120 prev_state=1 next_comm=other next_pid=7 next_prio=120
[1] (200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=236
+2s
[1] (200) kvm_apic_accept_irq: apicid=7 dm=0 tm=0 vec=1
""",
)


@RULE.part()
def _asleep(excerpt: Excerpt, found: Found) -> None:
    known = halted(excerpt)
    if excerpt.final:
        known.report(excerpt, found, before_halt=False)


@RULE.part(
    "start-up messages",
    needs=(
        "kvm_entry.vcpu_id",
        "kvm_entry.rip",
        "kvm_fpu.load",
        "sched_switch.prev_state",
        "sys_enter_ioctl.cmd|kvm_vcpu_ioctl.cmd",
    ),
    adds=False,
    source="kvm_apic_accept_events, __apic_accept_irq (lapic.c)",
)
def _starts(excerpt: Excerpt, found: Found) -> None:
    """Check that a vCPU that waits after INIT, in KVM_RUN, enters the guest once it got a start-up message."""
    waiting = starting(excerpt)
    found.check(len(waiting.new))
    rows = np.array([row for _, row in waiting.new], np.intp)
    drafts = found.draft_rows(
        rows,
        lambda i: (
            f"vCPU {waiting.new[i][0]} starts: it waited after INIT and got a start-up message",
            "it sleeps on, until the end of the recording",
        ),
    )
    waiting.told.update(zip((vcpu for vcpu, _ in waiting.new), drafts, strict=False))
    if excerpt.final:
        found.report([one for one in waiting.never_started(excerpt) if one is not None])


@RULE.part("how late", needs=("kvm_inj_virq.vector", "kvm_inj_virq.reinjected", "sched_switch.prev_state"), adds=False)
def _late(excerpt: Excerpt, found: Found) -> None:
    """Check the time from an interrupt's arrival, while the vCPU slept, to its injection."""
    exits, sequence = excerpt.exits, excerpt.sequence
    group = slept(excerpt)
    group = group[(exits.next_kind[group] == ENTRY) & exits.has("inject interrupt")[group]]
    injected = excerpt.first_in_exit("inject interrupt", group)
    asleep = excerpt.first_in_exit("sched_switch", group)
    fresh = (sequence.values("kvm_inj_virq", "reinjected", injected) == 0) & (asleep < injected)
    group, injected, asleep = group[fresh], injected[fresh], asleep[fresh]
    arrived = arrivals(excerpt)
    if not len(group) or not len(arrived.row):
        return
    vcpu = exits.get("vcpu_id")[group].astype(np.int64)
    first = np.minimum(arrived.before(vcpu, sequence.row[asleep]), len(arrived.row) - 1)
    woke = arrived.row[first] > sequence.row[asleep]
    woke &= arrived.before(vcpu, sequence.row[injected]) > first
    woke &= arrived.plain[first] & (arrived.vector[first] == sequence.values("kvm_inj_virq", "vector", injected))
    rows, most = arrived.row[first], threshold("woken_within")
    late_ns = sequence.ts_ns[injected] - excerpt.whole.table.ts_ns[rows]
    late = [i for i in np.flatnonzero(woke & (late_ns > most)) if idle_ns(excerpt, rows[i], injected[i]) > most]
    found.check(np.count_nonzero(woke))
    found.violate(
        injected[late],
        lambda i: (
            f"vector {int(arrived.vector[first[late[i]]]):#x} injected soon after it arrived for a sleeping vCPU",
            f"{late_ns[late[i]] / 1e6:.1f} ms later, on a CPU that did nothing else",
        ),
    )
