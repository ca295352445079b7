"""Order and place of events: within an exit (V13), of system calls (V1), interrupts off around the guest (V3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.compare.alphabet import CLASS, ENTRY, EXIT, USERSPACE, mask_of
from kvmtrace.compare.batch import EXPECTATIONS
from kvmtrace.compare.findings import constant
from kvmtrace.compare.follow_ups import exit_name
from kvmtrace.events.table import TRACE_FLAG_IRQS_NOSUPPORT, TRACE_FLAG_IRQS_OFF
from kvmtrace.model.exits_any import EMULATOR_EVENTS
from kvmtrace.model.states import FOLLOW_UPS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.compare.batch import Batch
    from kvmtrace.model.expectation import ExitExpectation

    Group = NDArray[np.intp]
    Mask = NDArray[np.bool_]

# Where both stand in one exit's segment, the first of `earlier` comes before the first of `later`.
# handle_ept_violation, npf_interception trace the fault before they decode; x86_emulate_instruction decodes before
# it executes; the LAPIC's register is traced inside the MSR access; a refused MSR access is traced before #GP is
# injected (kvm_emulate_rdmsr, kvm_emulate_wrmsr, kvm_check_and_inject_events).
ORDER: tuple[tuple[str, str], ...] = (
    ("kvm_page_fault", "kvm_emulate_insn"),
    ("kvm_emulate_insn", "kvm_mmio"),
    ("kvm_apic", "kvm_msr"),
    ("kvm_msr", "inject exception"),
)
# ... and the last of `earlier` before the first of `later`: a vCPU that injects is not halted any more
# (kvm_vcpu_halt, vcpu_enter_guest)
ORDER_LAST: tuple[tuple[str, str], ...] = (
    ("wake-up", "inject interrupt"),
    ("wake-up", "inject exception"),
)
_NOT_BEFORE_LATE_EXIT = mask_of(*(name for name in FOLLOW_UPS if name != "kvm_msr"))
_INJECTIONS = ("inject interrupt", "inject exception")


def check_order(batch: Batch) -> None:
    """Check V13, V1 and V3 as the module says."""
    usable = np.flatnonzero(~batch.nested)
    for earlier, later in ORDER:
        _check_pair(batch, usable, earlier, later, last=False)
    for earlier, later in ORDER_LAST:
        _check_pair(batch, usable, earlier, later, last=True)
    _check_needs_decode(batch)
    _check_fast_mmio(batch, usable)
    _check_late_exit(batch)
    _check_system_calls(batch)
    _check_irq_flags(batch)


def _last_in(batch: Batch, name: str) -> NDArray[np.intp]:
    """Return, per segment, the position of its last event of a class, or -1."""
    found = np.full(len(batch.segments), -1, np.intp)
    positions = batch.segments.positions(name)
    found[batch.segments.of[positions]] = positions  # later assignments win
    return found


def _check_pair(batch: Batch, usable: Group, earlier: str, later: str, *, last: bool) -> None:
    group = usable[batch.exits.has(earlier)[usable] & batch.exits.has(later)[usable]]
    if not len(group):
        return
    second = batch.first_in_exit(later, group)
    first = _last_in(batch, earlier)[batch.exits.seg[group]] if last else batch.first_in_exit(earlier, group)
    bad = np.flatnonzero(first > second)
    if earlier == "kvm_emulate_insn":  # a soft event's injection pass decodes, too: after everything else
        bad = bad[~batch.exits.has(*_INJECTIONS)[group[bad]]]
    batch.findings.check("V13", len(group))
    batch.findings.violate("V13", second[bad], constant(f"{earlier} before {later}", f"{later} first"))


def _decoded_only(row: ExitExpectation) -> list[str]:
    """Return the events that this exit can trace by emulating an instruction only."""
    own = {name for must in row.must for name in must.events}
    return sorted((row.may & EMULATOR_EVENTS) - own - {"kvm_emulate_insn"})


def _check_needs_decode(batch: Batch) -> None:
    """Check that what the emulator alone could trace stands behind a kvm_emulate_insn."""
    if not batch.recorded("kvm_emulate_insn"):
        return
    decoded = batch.segments.first_in("kvm_emulate_insn")
    for number, group in batch.groups.items():
        row = EXPECTATIONS[number]
        assert row is not None
        for name in _decoded_only(row):
            some = group[batch.exits.has(name)[group]]
            if not len(some):
                continue
            at = batch.first_in_exit(name, some)
            decode = decoded[batch.exits.seg[some]]
            bad = np.flatnonzero((decode < 0) | (decode > at))
            batch.findings.check("V13", len(some))
            batch.findings.violate("V13", at[bad], lambda i, bad=bad, some=some, name=name: (  # type: ignore[misc]
                f"kvm_emulate_insn before {name} after {exit_name(batch, int(some[bad[i]]))}",
                f"{name} without a decoded instruction"))


def _check_fast_mmio(batch: Batch, usable: Group) -> None:
    """Check that an MMIO write taken by an ioeventfd (kvm_fast_mmio) is not emulated as well."""
    group = usable[batch.exits.has("kvm_fast_mmio")[usable]]
    bad = group[batch.exits.has("kvm_mmio")[group]]
    batch.findings.check("V13", len(group))
    batch.findings.violate("V13", batch.exits.start[bad], constant("kvm_fast_mmio or kvm_mmio", "both"))


def _check_late_exit(batch: Batch) -> None:
    """Check what lies between kvm_entry and a kvm_exit that is traced late (SVM before 6.5).

    From svm_vcpu_run to svm_handle_exit only the x2APIC fast path (svm_exit_handlers_fastpath) is a follow-up.
    """
    if batch.capability.exit_irqs_off is not False:
        return
    segments = batch.segments
    inside = np.flatnonzero((segments.kind == ENTRY) & (segments.next_kind == EXIT))
    stray = (segments.mask[inside] & _NOT_BEFORE_LATE_EXIT) != 0
    batch.findings.check("V13", len(inside))
    batch.findings.violate("V13", segments.start[inside[stray]] + 1, constant(
        "no handler's event before kvm_exit", "a follow-up of the exit in guest mode"))


def _check_system_calls(batch: Batch) -> None:
    """Check V1: a thread is in at most one ioctl, and KVM_RUN is what kvm_userspace_exit ends."""
    if not batch.recorded("sys_enter_ioctl", "sys_exit_ioctl"):
        return
    sequence = batch.sequence
    bits = mask_of("call KVM_RUN", "call ioctl", "return to VMM", "userspace exit")
    position = np.flatnonzero((bits >> sequence.cls.astype(np.uint64)) & np.uint64(1) == 1)
    cls = sequence.cls[position]
    calls = (cls == CLASS["call KVM_RUN"]) | (cls == CLASS["call ioctl"])
    joined = _joined(batch, position)
    twice = np.flatnonzero(calls[1:] & calls[:-1] & joined) + 1
    batch.findings.check("V1", np.count_nonzero(calls))
    batch.findings.violate("V1", position[twice], constant("the thread's ioctl to return first", "another ioctl"))
    wrong = np.flatnonzero((cls[1:] == USERSPACE) & (cls[:-1] == CLASS["call ioctl"]) & joined) + 1
    batch.findings.violate("V1", position[wrong], constant("kvm_userspace_exit in KVM_RUN only", "another ioctl"))
    back = cls == CLASS["return to VMM"]
    returns = np.flatnonzero(back[1:] & back[:-1] & joined) + 1
    if not batch.capability.filtered and _paired(batch):
        batch.findings.violate("V1", position[returns], constant("an ioctl before it returns", "a second return"))


def _paired(batch: Batch) -> bool:
    """Say whether calls and returns were recorded alike: a filter by file descriptor can drop calls only."""
    calls = len(batch.segments.positions("call KVM_RUN")) + len(batch.segments.positions("call ioctl"))
    returns = len(batch.segments.positions("return to VMM"))
    return abs(calls - returns) <= 2 + len(np.unique(batch.sequence.thread))


def _joined(batch: Batch, position: NDArray[np.intp]) -> Mask:
    """Say whether nothing was lost between each of these positions and the one before it."""
    sequence = batch.sequence
    breaks = np.cumsum(sequence.broken | sequence.first)[position]
    found: Mask = breaks[1:] == breaks[:-1]
    return found


def _check_irq_flags(batch: Batch) -> None:
    """Check V3: interrupts are off at kvm_entry, and at kvm_exit where the kernel traces it so."""
    table = batch.sequence.table
    flags = table.irq_flags[batch.sequence.row]
    for cls, wanted in ((ENTRY, True), (EXIT, batch.capability.exit_irqs_off is True)):
        position = np.flatnonzero(batch.sequence.cls == cls)
        off = (flags[position] & TRACE_FLAG_IRQS_OFF) != 0
        told = len(position) and not (flags[position] & TRACE_FLAG_IRQS_NOSUPPORT).any()
        if not wanted or not told or np.mean(off) < 0.5:  # text traces may lack the column
            continue
        name = "kvm_entry" if cls == ENTRY else "kvm_exit"
        batch.findings.check("V3", len(position))
        batch.findings.violate("V3", position[~off], constant(f"{name} with interrupts off", "interrupts on"))

