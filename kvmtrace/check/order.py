"""Order and place of events: within an exit (V13), of system calls (V1), interrupts off around the guest (V3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, ENTRY, EXIT, N_CLASSES, mask_of
from kvmtrace.check.batch import EXPECTATIONS
from kvmtrace.check.findings import constant
from kvmtrace.check.follow_ups import exit_name
from kvmtrace.isa.base import RipClass
from kvmtrace.isa.shared import EMULATOR_EVENTS
from kvmtrace.model.states import FOLLOW_UPS
from kvmtrace.table.distinct import among, distinct
from kvmtrace.table.event_table import TRACE_FLAG_IRQS_NOSUPPORT, TRACE_FLAG_IRQS_OFF

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch
    from kvmtrace.isa.base import ExitExpectation

    Group = NDArray[np.intp]
    Mask = NDArray[np.bool_]

# Where both stand in one exit's segment, the first of `earlier` comes before the first of `later`.
# handle_ept_violation, npf_interception trace the fault before they decode; x86_emulate_instruction decodes before
# it executes; the LAPIC's register is traced inside the MSR access; a refused MSR access is traced before #GP is
# injected (kvm_emulate_rdmsr, kvm_emulate_wrmsr, kvm_check_and_inject_events).
ORDER: tuple[tuple[str, str], ...] = (
    ("kvm_page_fault", "kvm_emulate_insn"),
    ("kvm_emulate_insn", "kvm_mmio"),
    ("kvm_emulate_insn", "kvm_pio"),
    ("kvm_apic", "kvm_msr"),
    ("kvm_msr", "inject exception"),
)
# ... and the last of `earlier` before the first of `later`: a vCPU that injects is not halted any more
# (kvm_vcpu_halt, vcpu_enter_guest)
ORDER_LAST: tuple[tuple[str, str], ...] = (
    ("wake-up", "inject interrupt"),
    ("wake-up", "inject exception"),
)
# the steps of one call, and pairs of them that cannot be neighbours
_CALL_NAMES = ("call KVM_RUN", "call ioctl", "KVM_RUN", "vCPU ioctl", "userspace exit", "ioctl ends", "return to VMM")
_NEVER = {
    ("KVM_RUN", "KVM_RUN"),
    ("KVM_RUN", "vCPU ioctl"),
    ("vCPU ioctl", "KVM_RUN"),
    ("vCPU ioctl", "vCPU ioctl"),
    ("vCPU ioctl", "userspace exit"),
    ("ioctl ends", "ioctl ends"),
    ("ioctl ends", "userspace exit"),
    ("call KVM_RUN", "vCPU ioctl"),
    ("call ioctl", "KVM_RUN"),
    ("call ioctl", "userspace exit"),
    ("call KVM_RUN", "call KVM_RUN"),
    ("call KVM_RUN", "call ioctl"),
    ("call ioctl", "call KVM_RUN"),
    ("call ioctl", "call ioctl"),
    ("KVM_RUN", "call KVM_RUN"),
    ("KVM_RUN", "call ioctl"),
    ("vCPU ioctl", "call KVM_RUN"),
    ("vCPU ioctl", "call ioctl"),
}
_NEVER_WITH_CALLS = {
    ("userspace exit", "userspace exit"),
    ("userspace exit", "KVM_RUN"),
    ("userspace exit", "vCPU ioctl"),
    ("userspace exit", "call KVM_RUN"),
    ("userspace exit", "call ioctl"),
    ("ioctl ends", "KVM_RUN"),
    ("ioctl ends", "vCPU ioctl"),
    ("ioctl ends", "call KVM_RUN"),
    ("ioctl ends", "call ioctl"),
    ("return to VMM", "KVM_RUN"),
    ("return to VMM", "vCPU ioctl"),
    ("return to VMM", "userspace exit"),
    ("return to VMM", "ioctl ends"),
}
_CALL_KIND = np.full(N_CLASSES, -1, np.int8)
_CALL_KIND[[CLASS[name] for name in _CALL_NAMES]] = np.arange(len(_CALL_NAMES))
_NOT_BEFORE_LATE_EXIT = mask_of(*(name for name in FOLLOW_UPS if name != "kvm_msr"))
_NOT_IN_FAST_PATH = _NOT_BEFORE_LATE_EXIT
_PREPARATION = (CLASS["inject interrupt"], CLASS["inject exception"], CLASS["wake-up"], CLASS["halt poll"])
FAST_PATH_MSRS = (0x830, 0x6E0)  # x2APIC ICR, TSC deadline: handle_fastpath_set_msr_irqoff
X2APIC_EOI = 0x80B  # write-only: any access that raises no #GP is an EOI
_RUNS = (CLASS["run VMX"], CLASS["run SVM"])
_RETURNS = (CLASS["run VMX returns"], CLASS["run SVM returns"])
_INJECTIONS = ("inject interrupt", "inject exception")


def check_order(batch: Batch) -> None:
    """Check V13, V1 and V3 as the module says."""
    usable = np.flatnonzero(~batch.nested)
    for earlier, later in ORDER:
        _check_pair(batch, usable, earlier, later, last=False)
    for earlier, later in ORDER_LAST:
        _check_pair(batch, usable, earlier, later, last=True)
    _check_needs_decode(batch)
    _check_skip_order(batch)
    _check_apic_msrs(batch)
    _check_fast_mmio(batch, usable)
    _check_late_exit(batch)
    _check_calls(batch)
    _check_run_function(batch)
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
    own = {name for must in row.must for name in must.events} - {"kvm_mmio"}
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
            batch.findings.violate(
                "V13",
                at[bad],
                lambda i, bad=bad, some=some, name=name: (  # type: ignore[misc]
                    f"kvm_emulate_insn before {name} after {exit_name(batch, int(some[bad[i]]))}",
                    f"{name} without a decoded instruction",
                ),
            )


def _check_skip_order(batch: Batch) -> None:
    """Check that an instruction is decoded for skipping (SVM without NRIPS) behind what its handler traces."""
    for number, group in batch.groups.items():
        row = EXPECTATIONS[number]
        assert row is not None
        if row.rip is not RipClass.ADVANCE or row.may >= EMULATOR_EVENTS:
            continue
        for name in sorted({name for must in row.must for name in must.events} & set(FOLLOW_UPS)):
            some = group[batch.exits.has(name)[group] & batch.exits.has("kvm_emulate_insn")[group]]
            decode = batch.first_in_exit("kvm_emulate_insn", some)
            bad = np.flatnonzero(decode < batch.first_in_exit(name, some))
            batch.findings.check("V13", len(some))
            batch.findings.violate(
                "V13", decode[bad], constant(f"{name} before the instruction is skipped", "kvm_emulate_insn first")
            )


def _check_apic_msrs(batch: Batch) -> None:
    """Check V5: an x2APIC register is traced once, by its offset, whenever its MSR is accessed without #GP."""
    fields = (("kvm_msr", "ecx"), ("kvm_msr", "exception"), ("kvm_apic", "reg"))
    if not batch.recorded("kvm_apic", "kvm_msr") or not all(batch.has_field(*field) for field in fields):
        return
    segments, sequence = batch.segments, batch.sequence
    positions = segments.positions("kvm_msr")
    ecx = sequence.values("kvm_msr", "ecx", positions).astype(np.int64)
    owner = segments.of[positions]
    own = among(ecx >> 8, (8,)) & (sequence.values("kvm_msr", "exception", positions) == 0)
    own &= (segments.kind[owner] == EXIT) & np.isin(owner, batch.exits.seg[~batch.nested])
    positions, ecx, owner = positions[own], ecx[own], owner[own]
    if batch.recorded("kvm_eoi"):
        ends = (ecx == X2APIC_EOI) & (batch.segment_counts("kvm_eoi")[owner] == 0)
        batch.findings.violate("V5", positions[ends], constant("kvm_eoi for a write to the EOI register", "none"))
    counts = batch.segment_counts("kvm_apic")[owner]
    first = segments.first_in("kvm_apic")[owner]
    offset = np.full(len(positions), -1, np.int64)
    offset[first >= 0] = sequence.values("kvm_apic", "reg", first[first >= 0])
    bad = np.flatnonzero((counts != 1) | (offset != (ecx - 0x800) << 4))
    batch.findings.check("V5", len(positions))
    batch.findings.violate(
        "V5",
        positions[bad],
        lambda i: (
            f"one kvm_apic of register {int(ecx[bad[i]]) - 0x800 << 4:#x}",
            f"{counts[bad[i]]}, the first of register {offset[bad[i]]:#x}",
        ),
    )


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
    slow = np.zeros(len(segments), bool)
    slow[segments.of[_slow_msrs(batch)]] = True
    stray = ((segments.mask[inside] & _NOT_BEFORE_LATE_EXIT) != 0) | slow[inside]
    batch.findings.check("V13", len(inside))
    batch.findings.violate(
        "V13",
        segments.start[inside[stray]] + 1,
        constant("no handler's event before kvm_exit", "a follow-up of the exit in guest mode"),
    )


def _check_calls(batch: Batch) -> None:
    """Check V1: system call, probe, kvm_userspace_exit, probe, return; each once, KVM_RUN named alike.

    A probe may miss a hit (kretprobes have a limit), so its absence proves nothing; system calls are all
    recorded, unless a filter by file descriptor dropped the calls but not the returns.
    """
    sequence = batch.sequence
    calls = batch.recorded("sys_enter_ioctl", "sys_exit_ioctl") and not batch.capability.filtered
    kind = _CALL_KIND[batch.step_classes]
    position, kind = batch.steps.position[kind >= 0], kind[kind >= 0]
    before, after = kind[:-1], kind[1:]
    told = _both_ways(batch)[sequence.thread[position[1:]]] & calls
    strict = _legal_pairs(calls=True, paired=calls and _paired(batch))
    wrong = np.flatnonzero(told & ~strict[before, after] & _joined(batch, position)) + 1
    batch.findings.check("V1", len(position))
    batch.findings.violate(
        "V1",
        position[wrong],
        lambda i: (
            f"after {_CALL_NAMES[before[wrong[i] - 1]]}: the next step of the call",
            _CALL_NAMES[after[wrong[i] - 1]],
        ),
    )


def _legal_pairs(*, calls: bool, paired: bool) -> NDArray[np.bool_]:
    """Return which of _CALL_NAMES may follow which: rows before, columns after.

    Parameters
    ----------
    calls : every ioctl was recorded
    paired : and so was every return
    """
    legal = np.ones((len(_CALL_NAMES), len(_CALL_NAMES)), bool)
    for before, after in _NEVER if not calls else _NEVER | _NEVER_WITH_CALLS:
        legal[_CALL_NAMES.index(before), _CALL_NAMES.index(after)] = False
    if paired:
        legal[_CALL_NAMES.index("return to VMM"), _CALL_NAMES.index("return to VMM")] = False
    return legal


def _both_ways(batch: Batch) -> Mask:
    """Say of which threads calls and returns were recorded; a recorder may trace those of its target only."""
    sequence = batch.sequence
    n_threads = len(sequence.tids)
    calls = among(sequence.cls, (CLASS["call KVM_RUN"], CLASS["call ioctl"]))
    n_calls = np.bincount(sequence.thread[calls], minlength=n_threads)
    n_returns = np.bincount(sequence.thread[sequence.cls == CLASS["return to VMM"]], minlength=n_threads)
    found: Mask = (n_calls > 0) & (n_returns > 0) & (np.abs(n_calls - n_returns) <= 2)
    return found


def _paired(batch: Batch) -> bool:
    """Say whether calls and returns were recorded alike: a filter by file descriptor can drop calls only."""
    calls = len(batch.segments.positions("call KVM_RUN")) + len(batch.segments.positions("call ioctl"))
    returns = len(batch.segments.positions("return to VMM"))
    return abs(calls - returns) <= 2 + len(distinct(batch.sequence.thread))


def _check_run_function(batch: Batch) -> None:
    """Check V2: what the run function traces, between its probe and its return.

    kvm_entry is the first thing it does; behind kvm_exit only the fast path (an MSR write, a timer) runs in it.
    """
    if "entry_in_run" not in batch.capability.traits or not batch.recorded("kvm_entry"):
        return
    steps, classes = batch.steps.position, batch.step_classes
    before, after = classes[:-1], classes[1:]
    joined = _joined(batch, steps)
    apart = steps[1:] > steps[:-1] + 1
    is_run, is_return = among(classes, _RUNS), among(classes, _RETURNS)
    runs, returns = is_run[:-1], is_return[1:]
    late = np.flatnonzero(runs & (after == ENTRY) & joined & apart)
    twice = np.flatnonzero(is_return[:-1] & returns & joined)
    batch.findings.check("V2", np.count_nonzero(runs | returns))
    batch.findings.violate(
        "V2", steps[late] + 1, constant("kvm_entry, first thing in the run function", "another event")
    )
    batch.findings.violate("V2", steps[twice + 1], constant("the run function returns once", "a second return"))
    again = np.flatnonzero(runs & is_run[1:] & joined & ~apart)
    batch.findings.violate("V2", steps[again + 1], constant("kvm_entry, or a return", "a second call"))
    # run function, something else, kvm_entry: no way back into the run function was seen in between
    between = np.flatnonzero(
        runs[:-1] & (among(after, _PREPARATION) | returns)[:-1] & (after[1:] == ENTRY) & joined[:-1] & joined[1:]
    )
    batch.findings.violate(
        "V2",
        steps[between + 1],
        constant("kvm_entry, first thing in the run function", "another event, and kvm_entry behind it"),
    )
    _check_fast_path(batch, steps, np.flatnonzero((before == EXIT) & returns & joined & apart))


def _check_fast_path(batch: Batch, steps: NDArray[np.intp], inside: NDArray[np.intp]) -> None:
    """Check V2: between kvm_exit and the return of the run function stands only what the fast path traces.

    Parameters
    ----------
    inside : numbers of the steps kvm_exit that other events than steps follow before the return
    """
    if not len(inside):
        return
    sequence = batch.sequence
    strays = _NOT_IN_FAST_PATH >> sequence.cls.astype(np.uint64) & np.uint64(1)
    strays[_slow_msrs(batch)] = 1
    total = np.append(0, np.cumsum(strays))
    bad = inside[total[steps[inside + 1]] > total[steps[inside]]]
    batch.findings.violate(
        "V2",
        steps[bad + 1],
        constant("the run function returns before the exit's handler runs", "a handler's event before the return"),
    )


def _slow_msrs(batch: Batch) -> NDArray[np.intp]:
    """Return the positions of kvm_msr events that no fast path traces."""
    positions = batch.segments.positions("kvm_msr")
    if not (batch.has_field("kvm_msr", "ecx") and batch.has_field("kvm_msr", "write")):
        return positions[:0]
    fast = among(batch.sequence.values("kvm_msr", "ecx", positions), FAST_PATH_MSRS)
    slow: NDArray[np.intp] = positions[~fast | (batch.sequence.values("kvm_msr", "write", positions) == 0)]
    return slow


def _joined(batch: Batch, position: NDArray[np.intp]) -> Mask:
    """Say whether nothing was lost between each of these positions and the one before it."""
    found = np.ones(max(len(position) - 1, 0), bool)
    behind = np.searchsorted(position, batch.sequence.begins)  # the first of them that stands behind each break
    found[behind[(behind > 0) & (behind < len(position))] - 1] = False
    return found


def _check_irq_flags(batch: Batch) -> None:
    """Check V3: interrupts are off at kvm_entry, and at kvm_exit where the kernel traces it so."""
    table = batch.sequence.table
    flags = table.irq_flags[batch.sequence.row]
    for cls, wanted in ((ENTRY, True), (EXIT, batch.capability.exit_irqs_off is True)):
        position = np.flatnonzero((batch.sequence.cls == cls) & ~batch.sequence.repeated)
        off = (flags[position] & TRACE_FLAG_IRQS_OFF) != 0
        told = len(position) and not (flags[position] & TRACE_FLAG_IRQS_NOSUPPORT).any()
        if wanted and not told:
            batch.findings.check("V3", 0, len(position))
        if not wanted or not told or np.mean(off) < 0.5:  # text traces may lack the column
            continue
        name = "kvm_entry" if cls == ENTRY else "kvm_exit"
        batch.findings.check("V3", len(position))
        batch.findings.violate("V3", position[~off], constant(f"{name} with interrupts off", "interrupts on"))
