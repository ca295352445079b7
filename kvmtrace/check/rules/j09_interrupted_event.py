"""J9: the interrupt whose delivery a VM-exit interrupted is the one that was injected at the entry before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import ENTRY
from kvmtrace.check.injected_events import VIRQ_VECTOR, injections_of
from kvmtrace.check.observability import VECTORING
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.isa.words import INTR_TYPE_EXT_INTR, decode_intr_info
from kvmtrace.table.distinct import distinct

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

# what shows whether interrupts end, or are delivered, without KVM
HARDWARE = "kvm_eoi|kvm_apicv_accept_irq"
RULE = Rule(
    "J9",
    "interrupted event was injected",
    VIOLATION,
    ("kvm_exit.exit_reason", "kvm_exit.isa", VECTORING, "kvm_entry", VIRQ_VECTOR, HARDWARE),
    "An interrupt whose delivery a VM-exit interrupted was injected at the VM-entry before it: hosts' interrupts leave "
    "guest mode, so that nobody else delivers one.",
    "vmx_inject_irq, svm_inject_irq; __vmx_complete_interrupts, svm_complete_interrupts",
    "interrupts that the processor delivers by itself (APICv, AVIC), and exceptions, which the guest may raise",
    blames_handler=False,
    healthy="""
kvm_inj_virq: vector=0x40 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: rw=1 reg=0xb0 val=0x0
kvm_eoi: apicid=0 vector=64
kvm_msr: write=1 ecx=80b data=0x0 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=48 guest_rip=0x1000 isa=1 info1=0x181 info2=0x80000030 intr_info=0x0 vcpu_id=0
kvm_page_fault: vcpu_id=0 guest_rip=0x1000 fault_address=0x200000 error_code=0x181
kvm_inj_virq: vector=0x30 soft=0 reinjected=1
kvm_entry: vcpu_id=0 rip=0x1000
""",
    broken="""
kvm_inj_virq: vector=0x40 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=32 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x0 vcpu_id=0
kvm_apic: rw=1 reg=0xb0 val=0x0
kvm_eoi: apicid=0 vector=64
kvm_msr: write=1 ecx=80b data=0x0 exception=0
kvm_entry: vcpu_id=0 rip=0x1002
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
kvm_inj_virq: vector=0x30 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=48 guest_rip=0x1000 isa=1 info1=0x181 info2=0x80000032 intr_info=0x0 vcpu_id=0
kvm_page_fault: vcpu_id=0 guest_rip=0x1000 fault_address=0x200000 error_code=0x181
kvm_inj_virq: vector=0x32 soft=0 reinjected=1
kvm_entry: vcpu_id=0 rip=0x1000
""",
)


@RULE.part(places=lambda excerpt: len(_interrupted(excerpt)))
def _injected(excerpt: Excerpt, found: Found) -> None:
    exits, segments = excerpt.exits, excerpt.segments
    group = _interrupted(excerpt)
    by_kvm = _delivered_by_kvm(excerpt)
    expected = np.array([_injected_at(excerpt, int(exits.seg[number]) - 1) for number in group], np.int64)
    known = by_kvm[group] & (expected >= 0)
    vector = (exits.vectoring[group] & np.uint64(0xFF)).astype(np.int64)
    at = np.flatnonzero(known & (vector != expected))
    found.check(np.count_nonzero(known), np.count_nonzero(~known))
    found.violate(
        segments.start[exits.seg[group[at]]],
        lambda i: (
            f"the delivery of vector {int(expected[at[i]]):#x}, injected at the entry before",
            f"vector {int(vector[at[i]]):#x} interrupted",
        ),
    )


def _interrupted(excerpt: Excerpt) -> NDArray[np.intp]:
    """Return the exits that interrupted the delivery of an interrupt, and whose VM-entry is here."""
    return excerpt.once("interrupted interrupts", _find_interrupted)


def _find_interrupted(excerpt: Excerpt) -> NDArray[np.intp]:
    exits, segments = excerpt.exits, excerpt.segments
    info = decode_intr_info(exits.vectoring)
    chosen = info.valid & (info.type == INTR_TYPE_EXT_INTR) & ~excerpt.nested & (exits.seg > 0)
    before = np.maximum(exits.seg - 1, 0)
    chosen &= segments.linked[before] & (segments.kind[before] == ENTRY)
    return np.flatnonzero(chosen)


def _injected_at(excerpt: Excerpt, entry: int) -> int:
    """Return the vector of the interrupt that was injected last before a VM-entry, -1 if that is not known."""
    segments, injections = excerpt.segments, injections_of(excerpt)
    if entry < 1 or not segments.linked[entry - 1]:
        return -1
    start = int(segments.start[entry])
    last = int(np.searchsorted(injections.position, start)) - 1
    if last < 0 or segments.of[injections.position[last]] != entry - 1 or not injections.is_interrupt[last]:
        return -1
    position = injections.position[last : last + 1]
    soft = excerpt.values_or("kvm_inj_virq", "soft", position, 0)[0]
    return -1 if soft else int(injections.vector[last])


def _delivered_by_kvm(excerpt: Excerpt) -> NDArray[np.bool_]:
    """Say of each exit whether no hardware delivers interrupts to its vCPU.

    Its LAPIC was seen to end interrupts in KVM, or the recording shows what KVM hands to hardware, and that is nothing.
    """
    recorded = excerpt.recorded("kvm_apicv_accept_irq")
    if recorded and "kvm_apicv_accept_irq" not in excerpt.capability.seen:
        return np.ones(len(excerpt.exits), bool)
    seen: set[int] = excerpt.remember("vCPUs whose interrupts end in KVM", set)
    sequence = excerpt.sequence
    threads = distinct(sequence.thread[excerpt.segments.positions("kvm_eoi")]).tolist()
    seen.update(sequence.key_of(thread) for thread in threads)
    known = np.array([sequence.key_of(thread) in seen for thread in range(len(sequence.tids))], bool)
    told: NDArray[np.bool_] = known[excerpt.thread] if len(known) else np.zeros(len(excerpt.thread), bool)
    return told
