"""Event injection: what was interrupted is repeated (V9, J3), what is repeated has a cause (V10, J4, J2, J5).

Few exits interrupt a delivery, so these rules look at single exits and injections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, ENTRY, EXIT
from kvmtrace.check.findings import constant
from kvmtrace.check.follow_ups import exit_name
from kvmtrace.check.userspace_changes import may_have_changed
from kvmtrace.isa.exit_reasons import ISA_SVM, ISA_VMX

if TYPE_CHECKING:
    from kvmtrace.check.batch import Batch

# interruption types (SDM "Format of Interruption Information", APM "EXITINTINFO")
EXTERNAL, NMI, HARD_EXCEPTION, SOFT_INTERRUPT, PRIVILEGED_SOFT, SOFT_EXCEPTION = 0, 2, 3, 4, 5, 6
INTERRUPTS = (EXTERNAL, SOFT_INTERRUPT)
EXCEPTIONS = (HARD_EXCEPTION, PRIVILEGED_SOFT, SOFT_EXCEPTION)
TASK_SWITCH = {1: 9, 2: 0x7D}
RESET_RIPS = (0xFFF0, 0x0)
SMI_RIP = 0x8000
_VIRQ, _EXCEPTION = CLASS["inject interrupt"], CLASS["inject exception"]


@dataclass(frozen=True)
class Injection:
    """A kvm_inj_virq or kvm_inj_exception at a sequence position."""

    position: int
    is_interrupt: bool
    vector: int
    repeated: bool


class InjectionTable:
    """All injections of a batch, by position."""

    def __init__(self, batch: Batch) -> None:
        sequence = batch.sequence
        self.position = np.flatnonzero((sequence.cls == _VIRQ) | (sequence.cls == _EXCEPTION))
        self.is_interrupt = sequence.cls[self.position] == _VIRQ
        self.vector = np.full(len(self.position), -1, np.int64)
        self.repeated = np.zeros(len(self.position), bool)
        self.told = True  # the recording says whether an injection is a repetition
        for kind, vectors, mine in (
            ("kvm_inj_virq", ("vector", "irq"), self.is_interrupt),
            ("kvm_inj_exception", ("exception",), ~self.is_interrupt),
        ):
            at = self.position[mine]
            if not len(at):
                continue
            name = next((n for n in vectors if batch.has_field(kind, n)), None)
            if name is None:
                self.told = False
                continue
            self.vector[mine] = sequence.values(kind, name, at).astype(np.int64)
            if batch.has_field(kind, "reinjected"):
                self.repeated[mine] = sequence.values(kind, "reinjected", at) != 0
            else:
                self.told = False

    def between(self, first: int, last: int) -> list[Injection]:
        """Return the injections at sequence positions first..last, exclusive."""
        low, high = np.searchsorted(self.position, (first, last))
        return [
            Injection(int(self.position[i]), bool(self.is_interrupt[i]), int(self.vector[i]), bool(self.repeated[i]))
            for i in range(low, high)
        ]


def check_injection(batch: Batch) -> None:
    """Check V9 with J3, V10, J4, J2 and J5."""
    if not batch.recorded("kvm_exit", "kvm_entry"):
        return
    injections = InjectionTable(batch)
    _check_repeated_delivery(batch, injections)
    if injections.told:
        _check_causes(batch, injections)
        _check_order(batch, injections)
    _check_entered_vector(batch, injections)


def _check_repeated_delivery(batch: Batch, injections: InjectionTable) -> None:
    exits, segments = batch.exits, batch.segments
    number = np.flatnonzero((exits.vectoring != 0) & ~batch.nested)
    entry = segments.resume[exits.seg[number]]
    batch.findings.check("V9", 0, np.count_nonzero(entry < 0))
    number, entry = number[entry >= 0], entry[entry >= 0]
    if not len(number):
        return
    first, last = exits.start[number], segments.start[entry]
    changed = may_have_changed(batch, first, last)
    for i, exit_number in enumerate(number):
        info = int(exits.vectoring[exit_number])
        kind = info >> 8 & 7
        recorded = batch.recorded("kvm_inj_virq" if kind in INTERRUPTS else "kvm_inj_exception")
        if kind not in (*INTERRUPTS, *EXCEPTIONS) or not recorded or changed[i]:
            batch.findings.check("V9", 0, 1)
            continue
        found = injections.between(int(first[i]), int(last[i]))
        batch.findings.check("V9", 1)
        if _repeats(found, info, told=injections.told):
            continue
        if _legally_lost(batch, int(exit_number), info, found):
            batch.findings.check("J3", 1)
            continue
        name = "kvm_inj_virq" if kind in INTERRUPTS else "kvm_inj_exception"
        expected = (
            f"{name} of vector {info & 0xFF:#x} [reinjected]: {exit_name(batch, int(exit_number))} "
            f"interrupted its delivery ({info:#x})"
        )
        observed = "VM-entry after " + (", ".join(_words(one) for one in found) or "no injection")
        batch.findings.violate("V9", [int(last[i])], constant(expected, observed))


def _words(injection: Injection) -> str:
    kind = "kvm_inj_virq" if injection.is_interrupt else "kvm_inj_exception"
    return f"{kind} {injection.vector:#x}" + (" [reinjected]" if injection.repeated else "")


def _repeats(found: list[Injection], info: int, *, told: bool) -> bool:
    """Say whether the interrupted event is among the injections."""
    interrupt = info >> 8 & 7 in INTERRUPTS
    return any(
        one.is_interrupt == interrupt and one.vector in (info & 0xFF, -1) and (one.repeated or not told)
        for one in found
    )


def _legally_lost(batch: Batch, number: int, info: int, found: list[Injection]) -> bool:
    """Say whether the event may disappear: new exception, emulation, reset, task switch, SMM (J3)."""
    exits = batch.exits
    kind, vector, isa = info >> 8 & 7, info & 0xFF, int(exits.isa[number])
    if exits.chain_has("kvm_smm_transition")[number] or int(exits.code[number]) == TASK_SWITCH.get(isa):
        return True
    if int(exits.later_rip[number]) in (*RESET_RIPS, SMI_RIP):
        return True
    emulated = bool(exits.chain_has("kvm_emulate_insn")[number])
    replaced = any(not injection.is_interrupt for injection in found)
    soft_on_svm = isa == ISA_SVM and (kind == SOFT_INTERRUPT or vector in (3, 4))
    # kernels before 6.0 re-execute INT3 and INTO on SVM; a soft event whose skip fails is dropped
    return replaced or (emulated and kind in EXCEPTIONS) or soft_on_svm


def _check_causes(batch: Batch, injections: InjectionTable) -> None:
    """Check V10 and J4: [reinjected] needs an interrupted delivery, a cancelled entry, or userspace."""
    segments, exits, sequence = batch.segments, batch.exits, batch.sequence
    for i in np.flatnonzero(injections.repeated) if len(exits) else ():
        position = int(injections.position[i])
        rule = "V10" if injections.is_interrupt[i] else "J4"
        number = int(np.searchsorted(exits.start, position)) - 1
        same_thread = number >= 0 and sequence.thread[exits.start[number]] == sequence.thread[position]
        direct = same_thread and segments.of[position] == exits.seg[number]
        broken = sequence.broken[exits.start[number] + 1 : position + 1].any() or batch.nested[number]
        if not direct or broken or not _tells_vectoring(batch, number):
            batch.findings.check(rule, 0, 1)  # userspace between, or the recording begins here
            continue
        batch.findings.check(rule, 1)
        vector, interrupt = int(injections.vector[i]), bool(injections.is_interrupt[i])
        info = int(exits.vectoring[number])
        kinds = INTERRUPTS if interrupt else EXCEPTIONS
        caused = info != 0 and info >> 8 & 7 in kinds and info & 0xFF == vector
        earlier = injections.between(int(exits.start[number]), position)
        caused |= any(one.is_interrupt == interrupt and one.vector == vector for one in earlier)
        # an injected exception that meets another becomes #DF, injected anew by the next pass
        caused |= not interrupt and bool(exits.has("kvm_smm_transition")[number])
        if caused:
            continue
        expected = (
            f"no repetition of vector {vector:#x}: {exit_name(batch, number)} "
            + (f"interrupted {info:#x}" if info else "interrupted no delivery")
            + ", and no entry "
            "was cancelled"
        )
        batch.findings.violate(rule, [position], constant(expected, f"injection of {vector:#x} [reinjected]"))


def _tells_vectoring(batch: Batch, number: int) -> bool:
    """Say whether kvm_exit was recorded with the field that holds the interrupted delivery."""
    field = {ISA_SVM: "intr_info", ISA_VMX: "info2"}.get(int(batch.exits.isa[number]))
    return field is not None and batch.has_field("kvm_exit", field)


def _check_order(batch: Batch, injections: InjectionTable) -> None:
    """Check J2: between two entries at most one fresh event, and none after another injection."""
    segments = batch.segments
    fresh = np.flatnonzero(~injections.repeated)
    at = injections.position[fresh]
    previous = injections.position[np.maximum(fresh - 1, 0)]
    together = (fresh > 0) & (segments.of[previous] == segments.of[at])
    together &= segments.kind[segments.of[at]] == EXIT
    number = np.searchsorted(batch.exits.seg, segments.of[at])
    number = np.minimum(number, max(len(batch.exits) - 1, 0))
    quiet = ~(batch.exits.has("kvm_smm_transition") | batch.nested)
    broken = np.append(0, np.cumsum(batch.sequence.broken))
    whole = broken[at + 1] == broken[previous + 1]
    wrong = np.flatnonzero(together & whole & (quiet[number] if len(quiet) else False))
    batch.findings.check("J2", len(fresh))
    batch.findings.violate(
        "J2",
        at[wrong],
        lambda i: (
            "a fresh event only as the first injection before an entry",
            f"vector {int(injections.vector[fresh[wrong[i]]]):#x} after another injection",
        ),
    )


def _check_entered_vector(batch: Batch, injections: InjectionTable) -> None:
    """Check J5 on kernels whose kvm_entry tells the injected event."""
    if not batch.has_field("kvm_entry", "intr_info"):
        return
    segments = batch.segments
    entries = np.flatnonzero(segments.kind == ENTRY)
    info = batch.sequence.values("kvm_entry", "intr_info", segments.start[entries]).astype(np.int64)
    valid = (info & 1 << 31 != 0) & (info >> 8 & 7 != NMI)
    before = np.searchsorted(injections.position, segments.start[entries]) - 1
    known = valid & (before >= 0)
    owner = segments.of[injections.position[np.maximum(before, 0)]] if len(injections.position) else entries
    known &= (owner == entries - 1) & segments.linked[np.maximum(entries - 1, 0)]
    vector = injections.vector[np.maximum(before, 0)] if len(injections.position) else info
    wrong = np.flatnonzero(known & (vector != info & 0xFF))
    batch.findings.check("J5", np.count_nonzero(known))
    batch.findings.violate(
        "J5",
        segments.start[entries[wrong]],
        lambda i: (f"vector {int(vector[wrong[i]]):#x}, injected last", f"vector {int(info[wrong[i]]) & 0xFF:#x}"),
    )
