"""Heuristics, reported as suspicion: window storms (H2), no progress (H3), lost wake-ups (H1, H4)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, ENTRY, EXIT, N_STEPS
from kvmtrace.check.findings import constant
from kvmtrace.check.follow_ups import exit_name
from kvmtrace.isa.exit_reasons import ISA_SVM, ISA_VMX
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch
    from kvmtrace.check.thread_events import Sequence

STORM = 64  # window exits in a row without an injection
STUCK = 256  # equal exits at one instruction in a row
ASLEEP_NS = 1_000_000_000  # an accepted interrupt wakes a halted vCPU within this time
WINDOW = {ISA_VMX: 7, ISA_SVM: 0x64}
HLT = {ISA_VMX: 12, ISA_SVM: 0x78}
# exits that the guest's instruction does not cause: repetition means nothing
ASYNCHRONOUS = {ISA_VMX: (1, 7, 8, 43, 52, 62), ISA_SVM: (0x60, 0x61, 0x62, 0x63, 0x64)}
_FIXED = (0x000, 0x100)


def _is(batch: Batch, codes: dict[int, tuple[int, ...]]) -> NDArray[np.bool_]:
    """Say which exits are of these reasons."""
    exits = batch.exits
    found = np.zeros(len(exits), bool)
    for isa, numbers in codes.items():
        if (own := exits.isa == isa).any():
            found |= own & among(exits.code, numbers)
    return found


def run_lengths(same: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Return, per element, how many Trues in a row end there."""
    number = np.arange(1, len(same) + 1)
    last_false = np.maximum.accumulate(np.where(same, 0, number))
    length: NDArray[np.intp] = number - last_false
    return length


def check_storms(batch: Batch) -> None:
    """Check H2 and H3 within a batch."""
    exits = batch.exits
    if not len(exits):
        return
    if batch.recorded("kvm_inj_virq"):
        window = _is(batch, {isa: (code,) for isa, code in WINDOW.items()})
        fruitless = window & ~exits.chain_has("inject interrupt", "inject exception")
        _report_runs(batch, "H2", _within_threads(batch, fruitless), STORM)
    if batch.has_field("kvm_exit", "guest_rip") and batch.has_field("kvm_entry", "rip"):
        _report_runs(batch, "H3", _within_threads(batch, _repeats(batch)), STUCK)


def _within_threads(batch: Batch, same: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Clear the first exit of each thread, so that no run spans two."""
    first = np.ones(len(same), bool)
    first[1:] = batch.thread[1:] != batch.thread[:-1]
    inside: NDArray[np.bool_] = same & ~first
    return inside


def _repeats(batch: Batch) -> NDArray[np.bool_]:
    """Say which exits equal the one before, which resumed at the same RIP without doing anything."""
    exits = batch.exits
    rip = exits.get("guest_rip")
    same = np.zeros(len(exits), bool)
    stays = (exits.next_kind == ENTRY) & (exits.resume_rip == rip)
    if not stays.any():
        return same
    same[1:] = (exits.raw[1:] == exits.raw[:-1]) & (rip[1:] == rip[:-1])
    for name in ("info1", "info2"):
        value = exits.get(name)
        same[1:] &= value[1:] == value[:-1]
    address = _fault_addresses(batch)
    same[1:] &= address[1:] == address[:-1]
    stays &= ~exits.has("kvm_pio", "kvm_mmio", "inject interrupt", "inject exception")
    same[1:] &= stays[:-1]
    return same & ~_is(batch, ASYNCHRONOUS) & ~batch.nested


def _fault_addresses(batch: Batch) -> NDArray[np.uint64]:
    """Return the faulting address of each exit, else 0; REP instructions fault page after page at one RIP."""
    exits = batch.exits
    address = np.zeros(len(exits), np.uint64)
    if not batch.recorded("kvm_page_fault") or not batch.has_field("kvm_page_fault", "fault_address"):
        address[:] = np.arange(len(exits))  # never equal
        return address
    position = batch.first_in_exit("kvm_page_fault", np.arange(len(exits)))
    there = position >= 0
    address[there] = batch.sequence.values("kvm_page_fault", "fault_address", position[there])
    return address


def _report_runs(batch: Batch, rule: str, same: NDArray[np.bool_], limit: int) -> None:
    """Report each run of at least `limit` once, where it reaches the limit."""
    reached = np.flatnonzero(run_lengths(same) == limit)
    batch.findings.check(rule, len(same))
    rip = batch.exits.get("guest_rip")
    batch.findings.violate(
        rule,
        batch.exits.start[reached],
        lambda i: (
            f"fewer than {limit} in a row",
            f"{limit} times {exit_name(batch, int(reached[i]))} at rip {int(rip[reached[i]]):#x}",
        ),
    )


@dataclass
class Halted:
    """How each vCPU thread was last seen, and when interrupts arrived for it: for H1 and H4.

    Parameters
    ----------
    since : tid -> time of the HLT exit, for threads that sleep in the kernel
    arrived : vcpu_id -> (time, vector) of the first interrupt accepted since the last injection
    """

    since: dict[int, int] = field(default_factory=dict)
    arrived: dict[int, tuple[int, int]] = field(default_factory=dict)
    end_ns: int = 0

    def add(self, batch: Batch, whole: Sequence) -> None:
        """Take note of a batch; `whole` includes the unfinished ends of its threads."""
        table = whole.table
        if len(table):
            self.end_ns = max(self.end_ns, int(table.ts_ns.max()))
        self._note_arrivals(batch)
        for start in np.flatnonzero(whole.first):
            self._note_thread(whole, int(start))

    def _note_arrivals(self, batch: Batch) -> None:
        table = batch.sequence.table
        if not table.has("kvm_apic_accept_irq", "vec") or not batch.recorded("kvm_inj_virq"):
            return
        rows = table.rows("kvm_apic_accept_irq")
        apic = table.field("kvm_apic_accept_irq", "apicid").astype(np.int64)
        vector = table.field("kvm_apic_accept_irq", "vec")
        fixed = among(table.field("kvm_apic_accept_irq", "dm"), _FIXED)
        injected = np.sort(table.rows("kvm_inj_virq"))
        ids = list(batch.findings.vcpu_ids.values())
        for tid, vcpu in batch.findings.vcpu_ids.items():
            if ids.count(vcpu) > 1:
                continue
            mine = injected[table.tid[injected] == tid]
            last = int(mine[-1]) if len(mine) else -1
            if last >= 0:
                self.arrived.pop(vcpu, None)
            later = np.flatnonzero(fixed & (apic == vcpu) & (rows > last))
            if len(later) and vcpu not in self.arrived:
                self.arrived[vcpu] = int(table.ts_ns[rows[later[0]]]), int(vector[later[0]])

    def _note_thread(self, whole: Sequence, start: int) -> None:
        stop = int(np.searchsorted(whole.thread, whole.thread[start], "right"))
        tid = int(whole.tids[whole.thread[start]])
        steps = np.flatnonzero((whole.cls[start:stop] <= N_STEPS) & (whole.cls[start:stop] > 0))
        self.since.pop(tid, None)
        if not len(steps):
            return
        position = start + int(steps[-1])
        if whole.cls[position] != EXIT or CLASS["sched_switch"] not in whole.cls[position:stop]:
            return
        at = np.array([position])
        isa = int(whole.values("kvm_exit", "isa", at)[0])
        if int(whole.values("kvm_exit", "exit_reason", at)[0]) == HLT.get(isa):
            self.since[tid] = int(whole.ts_ns[position])

    def report(self, batch: Batch) -> None:
        """Report vCPUs that sleep on although an interrupt was accepted long before the end (H1, H4)."""
        for tid, since in self.since.items():
            batch.findings.check("H1", 1)
            arrival = self.arrived.get(batch.findings.vcpu_ids.get(tid, -1))
            if arrival is None or self.end_ns - max(arrival[0], since) < ASLEEP_NS:
                continue
            rule = "H1" if arrival[0] >= since else "H4"
            number = int(np.searchsorted(batch.sequence.tids, tid))
            mine = np.flatnonzero((batch.sequence.thread == number) & (batch.sequence.cls == EXIT))
            if len(mine):
                late = (self.end_ns - arrival[0]) / 1e9
                batch.findings.violate(
                    rule,
                    [int(mine[-1])],
                    constant(
                        f"a wake-up: vector {arrival[1]:#x} was accepted",
                        f"still halted {late:.1f} s later, at the end of the recording",
                    ),
                )
