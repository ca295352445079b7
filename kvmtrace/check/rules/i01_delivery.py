"""I1: what is sent is accepted as it was sent, by the vCPUs that it was sent to, once by each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.deliveries import ALL, OTHERS, SELF, in_words, mode_name, sent, vcpus_in_words
from kvmtrace.check.destinations import destinations
from kvmtrace.check.doubts import report_when_certain
from kvmtrace.check.findings import constant
from kvmtrace.check.interrupt_log import count_senders, interrupt_log
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.kvm.apic import APIC_ICR, APIC_ICR2
from kvmtrace.table.distinct import within

if TYPE_CHECKING:
    from kvmtrace.check.deliveries import Sent
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found


RULE = Rule(
    "I1",
    "interrupts arrive as sent",
    VIOLATION,
    (
        "kvm_apic_accept_irq.apicid",
        "kvm_apic_accept_irq.vec",
        "kvm_apic_accept_irq.dm",
        "kvm_apic_accept_irq.tm",
        "kvm_exit.vcpu_id",
    ),
    "An IPI, a message or a pin's interrupt is accepted with its vector, mode and trigger, once, by the vCPUs that its "
    "destination stands for.",
    "kvm_irq_delivery_to_apic (irq_comm.c), kvm_apic_match_dest, __apic_accept_irq (lapic.c)",
    "that a destination stands for the wrong vCPUs from its first use on",
    places=count_senders,
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic_ipi: dst 1 vec 33 (Fixed|physical|assert|edge|dst)
kvm_apic_accept_irq: apicid=1 dm=0 tm=0 vec=33
kvm_apic: rw=1 reg=768 val=0x100004021
kvm_msr: write=1 ecx=830 data=0x100004021 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=32 guest_rip=0x1002 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic_ipi: dst 0 vec 33 (Fixed|physical|de-assert|edge|self)
kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=33
kvm_apic: rw=1 reg=768 val=0x40021
kvm_msr: write=1 ecx=830 data=0x40021 exception=0
kvm_inj_virq: vector=0x21 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1004
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic_ipi: dst 1 vec 33 (Fixed|physical|assert|edge|dst)
kvm_apic_accept_irq: apicid=1 dm=0 tm=0 vec=32
kvm_apic: rw=1 reg=768 val=0x100004021
kvm_msr: write=1 ecx=830 data=0x100004021 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
""",
)


@RULE.part("vector, mode and trigger")
def _as_sent(excerpt: Excerpt, found: Found) -> None:
    """Check that whoever accepts an interrupt accepts it as it was sent, and once."""
    log, what = interrupt_log(excerpt), sent(excerpt)
    found.check(np.count_nonzero(what.known), np.count_nonzero(~what.known))
    wrong = what.wrong
    found.violate_rows(
        log.row[[entry for entry, _, _ in wrong]] if wrong else np.empty(0, np.intp),
        lambda i: (_sent_in_words(what, wrong[i][1]), f"{in_words(excerpt, wrong[i][0])} {wrong[i][2]}"),
    )


def _sent_in_words(what: Sent, number: int) -> str:
    vector, mode = int(what.vector[number]), mode_name(int(what.mode[number]))
    return f"vector {vector:#x} ({mode}, {'level' if what.level[number] else 'edge'}) accepted once by each, as sent"


@RULE.part("shorthands", needs=("kvm_apic_ipi.icr_low",), adds=False)
def _shorthands(excerpt: Excerpt, found: Found) -> None:
    """Check that the sender itself accepts what it sends to itself or to all, and not what it sends to the others."""
    log, what = interrupt_log(excerpt), sent(excerpt)
    judged = what.known & (what.shorthand != 0) & (what.own >= 0)
    to_itself = what.to >> np.maximum(what.own, 0) & 1 != 0
    alone = what.to == 1 << np.maximum(what.own, 0)
    bad = (what.shorthand == SELF) & ~alone
    bad |= (what.shorthand == OTHERS) & to_itself
    bad |= (what.shorthand == ALL) & ~to_itself & ~what.to_one()
    at = np.flatnonzero(judged & bad)
    meant = {SELF: "the sender alone", ALL: "all vCPUs, the sender too", OTHERS: "all but the sender"}
    found.violate_rows(
        log.row[what.entry[at]],
        lambda i: (
            f"an IPI to {meant[int(what.shorthand[at[i]])]}, vCPU {int(what.own[at[i]])}",
            f"accepted by {vcpus_in_words(int(what.to[at[i]]))}",
        ),
    )


@RULE.part("one of several", adds=False)
def _one_of_several(excerpt: Excerpt, found: Found) -> None:
    """Check that of several vCPUs one accepts a lowest-priority interrupt; to all of them it goes as a fixed one."""
    log, what = interrupt_log(excerpt), sent(excerpt)
    several = what.to & (what.to - 1) != 0
    one_id = ~what.logical & (what.shorthand == 0) & (what.destination & 0xFF != 0xFF)
    one_id &= ~log.is_kind(what.entry, "kvm_msi_set_irq")
    lowest = what.to_one() & (what.logical | (what.shorthand != 0))
    at = np.flatnonzero(what.known & several & (one_id | lowest))
    found.violate_rows(
        log.row[what.entry[at]],
        lambda i: ("one vCPU that accepts it", f"accepted by {vcpus_in_words(int(what.to[at[i]]))}"),
    )


@RULE.part("destinations", needs=("kvm_apic.reg", "kvm_apic.rw", "kvm_msr.ecx", "kvm_msr.write"), adds=False)
def _destinations(excerpt: Excerpt, found: Found) -> None:
    """Check that a destination stands for the vCPUs that it stood for before."""
    learned = destinations(excerpt)
    found.check(learned.n_judged, learned.n_unknown)
    report_when_certain(excerpt, found, "destinations", learned.wrong)


@RULE.part(
    "what the ICR says", needs=("kvm_apic.reg", "kvm_apic.rw", "kvm_apic.val", "kvm_apic_ipi.dest_id"), adds=False
)
def _icr(excerpt: Excerpt, found: Found) -> None:
    """Check that an IPI goes where the guest wrote that it shall go: high half of x2APIC's ICR, or xAPIC's ICR2."""
    log, what = interrupt_log(excerpt), sent(excerpt)
    entry = what.entry[log.is_kind(what.entry, "kvm_apic_ipi")]
    writes = log.of_kind("kvm_apic")
    writes = writes[log.values("kvm_apic", "rw", writes) == 1]
    register, value = log.values("kvm_apic", "reg", writes), log.values("kvm_apic", "val", writes)
    meant = np.full(len(entry), -1, np.int64)
    icr, high = writes[register == APIC_ICR], writes[register == APIC_ICR2]
    behind, before = log.behind[entry], log.before[entry]
    x2apic = within(behind, icr) & ~within(before, icr)
    meant[x2apic] = value[np.searchsorted(writes, behind[x2apic])] >> 32 & 0xFFFFFFFF
    xapic = np.flatnonzero(within(before, icr) & ~x2apic)
    latest = np.searchsorted(high, entry[xapic]) - 1
    told = latest >= 0
    told[told] = log.lane[high[latest[told]]] == log.lane[entry[xapic[told]]]
    told[told] = log.whole(high[latest[told]], entry[xapic[told]])
    meant[xapic[told]] = value[np.searchsorted(writes, high[latest[told]])] >> 24 & 0xFF
    sent_to = log.values("kvm_apic_ipi", "dest_id", entry) & 0xFFFFFFFF
    at = np.flatnonzero((meant >= 0) & (meant != sent_to))
    found.check(np.count_nonzero(meant >= 0), np.count_nonzero(meant < 0))
    found.violate_rows(
        log.row[entry[at]],
        lambda i: (f"an IPI to {int(meant[at[i]]):#x}, as the guest wrote", f"to {int(sent_to[at[i]]):#x}"),
    )


@RULE.part("writes of the ICR", needs=("kvm_apic.reg", "kvm_apic.rw", "kvm_apic_ipi"), adds=False)
def _writes(excerpt: Excerpt, found: Found) -> None:
    """Check that each write of the ICR sends an IPI: behind it (xAPIC), or before it (x2APIC)."""
    log = interrupt_log(excerpt)
    writes = log.of_kind("kvm_apic")
    icr = (log.values("kvm_apic", "rw", writes) == 1) & (log.values("kvm_apic", "reg", writes) == APIC_ICR)
    writes = writes[icr]
    before, behind = log.before[writes], log.behind[writes]
    known = log.whole(before, behind)
    sends = log.is_kind(before, "kvm_apic_ipi") | log.is_kind(behind, "kvm_apic_ipi")
    found.check(np.count_nonzero(known), np.count_nonzero(~known))
    found.violate_rows(log.row[writes[known & ~sends]], constant("kvm_apic_ipi beside a write of the ICR", "none"))
