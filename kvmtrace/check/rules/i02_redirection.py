"""I2: a pin of the IOAPIC follows its redirection entry, which holds what the guest wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.deliveries import sent, vcpus_in_words
from kvmtrace.check.destinations import line_levels
from kvmtrace.check.doubts import report_when_certain
from kvmtrace.check.findings import constant
from kvmtrace.check.interrupt_log import interrupt_log
from kvmtrace.check.lines import line_pins
from kvmtrace.check.redirection import redirection
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.model.interrupts import ENTRY_LEVEL, ENTRY_MASKED, ENTRY_REMOTE_IRR

if TYPE_CHECKING:
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found

RULE = Rule(
    "I2",
    "redirection entries",
    VIOLATION,
    ("kvm_ioapic_set_irq.e", "kvm_ioapic_set_irq.pin", "kvm_ioapic_set_irq.coalesced"),
    "A pin of the IOAPIC has the entry that the guest wrote, until it is written again, and sends nothing while it is "
    "masked or waits for an EOI.",
    "ioapic_set_irq, ioapic_service, ioapic_write_indirect (ioapic.c)",
    "an entry that was wrong from its first use on, if the guest wrote it before the recording began",
    places=lambda excerpt: len(interrupt_log(excerpt).of_kind("kvm_ioapic_set_irq")),
    blames_handler=False,
    healthy="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
(200) sys_enter_ioctl: fd: 0x5, cmd: 0xc008ae67, arg: 0x0
(200) kvm_set_irq: gsi 4 level 1 source 0
(200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=36
(200) kvm_ioapic_set_irq: pin 4 dst 0 vec 36 (Fixed|physical|edge)
(200) kvm_set_irq: gsi 4 level 0 source 0
(200) kvm_ioapic_set_irq: pin 4 dst 0 vec 36 (Fixed|physical|edge)
(200) sys_exit_ioctl: 0x0
kvm_inj_virq: vector=0x24 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
""",
    broken="""
kvm_fpu: load=1
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
(200) sys_enter_ioctl: fd: 0x5, cmd: 0xc008ae67, arg: 0x0
(200) kvm_set_irq: gsi 4 level 1 source 0
(200) kvm_apic_accept_irq: apicid=0 dm=0 tm=0 vec=36
(200) kvm_ioapic_set_irq: pin 4 dst 0 vec 36 (Fixed|physical|edge|masked)
(200) sys_exit_ioctl: 0x0
kvm_inj_virq: vector=0x24 soft=0 reinjected=0
kvm_entry: vcpu_id=0 rip=0x1000
kvm_exit: exit_reason=1 guest_rip=0x1000 isa=1 info1=0x0 info2=0x0 intr_info=0x800000ec vcpu_id=0
""",
)


@RULE.part("held back", needs=("kvm_apic_accept_irq.apicid", "kvm_exit.vcpu_id"))
def _held_back(excerpt: Excerpt, found: Found) -> None:
    """Check that a masked pin, and one that waits for an EOI, sends nothing."""
    log, what = interrupt_log(excerpt), sent(excerpt)
    at = np.flatnonzero(log.is_kind(what.entry, "kvm_ioapic_set_irq") & what.known)
    bits = log.values("kvm_ioapic_set_irq", "e", what.entry[at])
    masked = bits & ENTRY_MASKED != 0
    waits = (bits & ENTRY_LEVEL != 0) & (bits & ENTRY_REMOTE_IRR != 0)
    bad = at[(masked | waits) & (what.to[at] != 0)]
    found.check(len(at))
    found.violate_rows(
        log.row[what.entry[bad]],
        lambda i: (
            "nothing sent by a pin that is masked, or whose interrupt was not ended",
            f"vector {int(what.vector[bad[i]]):#x} accepted by {vcpus_in_words(int(what.to[bad[i]]))}",
        ),
    )


@RULE.part("entries", needs=("sys_enter_ioctl.cmd", "kvm_mmio.gpa", "kvm_mmio.val", "kvm_mmio.type"), adds=False)
def _entries(excerpt: Excerpt, found: Found) -> None:
    """Check that an entry holds what was written to it, and nothing else than at its last use."""
    state = redirection(excerpt)
    found.check(state.n_judged, state.n_unknown)
    report_when_certain(excerpt, found, "entries", state.wrong)


@RULE.part("lines", needs=("kvm_set_irq.gsi", "kvm_set_irq.level", "sys_enter_ioctl.cmd"), adds=False)
def _lines(excerpt: Excerpt, found: Found) -> None:
    """Check that a line leads to the pins that it led to before, until the routes are set anew."""
    pins = line_pins(excerpt)
    found.check(pins.n_judged, pins.n_unknown)
    report_when_certain(excerpt, found, "lines", pins.wrong)


@RULE.part("one change", needs=("kvm_set_irq", "sys_enter_ioctl.cmd"), adds=False)
def _once(excerpt: Excerpt, found: Found) -> None:
    """Check that a change of a line changes one pin of the IOAPIC, once: a line has at most one there."""
    log = interrupt_log(excerpt)
    pins = log.of_kind("kvm_ioapic_set_irq")
    before = log.before[pins]
    again = log.is_kind(before, "kvm_ioapic_set_irq")
    # all pins of a chip that is set as a whole change behind one call
    head = np.where(again, log.before[np.maximum(before, 0)] if len(pins) else before, before)
    bad = again & log.is_kind(head, "kvm_set_irq", "kvm_pic_set_irq") & log.whole(head, pins)
    found.violate_rows(
        log.row[pins[bad]], constant("kvm_set_irq before each change of a pin", "another change of a pin")
    )


@RULE.part("raised", needs=("kvm_set_irq.level", "kvm_apic_accept_irq.apicid", "kvm_exit.vcpu_id"), adds=False)
def _raised(excerpt: Excerpt, found: Found) -> None:
    """Check that a pin that is lowered sends nothing, where one source drives it."""
    log, what = interrupt_log(excerpt), sent(excerpt)
    at = np.flatnonzero(log.is_kind(what.entry, "kvm_ioapic_set_irq") & what.known & ~what.level)
    low = line_levels(excerpt, what.entry[at]) == 0
    bad = at[low & (what.to[at] != 0)]
    found.violate_rows(log.row[what.entry[bad]], constant("nothing sent by a lowered line", "an interrupt accepted"))
