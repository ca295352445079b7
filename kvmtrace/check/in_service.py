"""The LAPIC's in-service stack, vector by vector (V11, J6).

An interrupt injected from the LAPIC is in service until its EOI; kvm_eoi names the highest one. Only what is
certain counts: that a vector came from the LAPIC is known if kvm_apic_accept_irq showed it arriving there,
and once a vector's EOI was seen it is not in service until it is injected again.
Source: kvm_get_apic_interrupt, apic_set_eoi (lapic.c)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS
from kvmtrace.check.userspace_changes import setter_rows
from kvmtrace.table.distinct import among, distinct

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.batch import Batch

_FIXED = (0x000, 0x100)  # delivery modes that end in the IRR: fixed, lowest priority (mode << 8)
_EOI, _VIRQ, _FORGET = 0, 1, 2


@dataclass
class InService:
    """What is known of one vCPU's ISR.

    Parameters
    ----------
    certain : vectors that are in service for sure
    ended : vectors that are not in service for sure
    pending : vectors seen arriving at the LAPIC, not injected since
    injected : vectors injected since anything is known
    least : lowest vector that the LAPIC had injected since then; 256 for none
    """

    certain: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    pending: set[int] = field(default_factory=set)
    injected: set[int] = field(default_factory=set)
    least: int = 256

    def forget(self) -> None:
        """Drop what was known."""
        self.certain.clear()
        self.ended.clear()
        self.pending.clear()
        self.injected.clear()
        self.least = 256

    def inject(self, vector: int, *, from_lapic: bool) -> str | None:
        """Take a fresh injection; return what is wrong with its priority, if anything."""
        self.ended.discard(vector)
        self.pending.discard(vector)
        self.injected.add(vector)
        if not from_lapic:
            return None
        self.least = min(self.least, vector)
        top = max(self.certain, default=-1)
        wrong = top >> 4 >= vector >> 4
        self.certain.add(vector)
        return f"vector {vector:#x} while {top:#x} is in service" if wrong else None

    def end(self, vector: int) -> str | None:
        """Take an EOI; return what should have ended, if that is certain and different."""
        top = max(self.certain, default=-1)
        if vector < 0:
            wrong = f"vector {top:#x} in service" if top >= 0 else None
            self.certain.clear()
            return wrong
        wrong = None
        if vector < top:
            wrong = f"EOI of {top:#x}, the highest in service"
        elif vector in self.ended:
            wrong = f"no EOI of {vector:#x}: it ended before and was not injected since"
        elif vector not in self.injected and self.least >> 4 <= vector >> 4:
            # had it been in service all the time, its class would have held back what was injected
            wrong = f"no EOI of {vector:#x}: it was not injected, nor in service when {self.least:#x} was"
        self.certain.discard(vector)
        self.ended.add(vector)
        return wrong


def check_in_service(batch: Batch, memory: dict[int, InService]) -> None:
    """Check V11 and J6.

    Parameters
    ----------
    memory : thread id -> what is known, kept from part to part
    """
    if not batch.recorded("kvm_eoi", "kvm_inj_virq") or not batch.has_field("kvm_inj_virq", "vector"):
        return
    events = _events(batch)
    arrivals = _arrivals(batch)
    # Hyper-V's SynIC may end interrupts by itself (auto-EOI): then nothing is certain
    synic = any(name.startswith("kvm_hv_synic") for name in batch.capability.seen)
    for thread in distinct(events["thread"]):
        tid = int(batch.sequence.tids[thread])
        state = memory.setdefault(tid, InService())
        mine = {name: column[events["thread"] == thread] for name, column in events.items()}
        lapic = arrivals.get(batch.findings.vcpu_ids.get(tid, -1))
        _follow(batch, state, mine, None if synic else lapic)


def _events(batch: Batch) -> dict[str, NDArray[np.int64]]:
    """Return EOIs, fresh hard injections and breaks in sequence order."""
    sequence = batch.sequence
    position = np.flatnonzero(
        (sequence.cls == CLASS["kvm_eoi"]) | (sequence.cls == CLASS["inject interrupt"]) | sequence.broken
    )
    what = np.where(
        sequence.cls[position] == CLASS["kvm_eoi"],
        _EOI,
        np.where(sequence.cls[position] == CLASS["inject interrupt"], _VIRQ, _FORGET),
    )
    vector = np.zeros(len(position), np.int64)
    eois, virqs = what == _EOI, what == _VIRQ
    vector[eois] = sequence.values("kvm_eoi", "vector", position[eois]).astype(np.int32)
    vector[virqs] = sequence.values("kvm_inj_virq", "vector", position[virqs]).astype(np.int64)
    fresh = np.ones(len(position), bool)
    for name in ("soft", "reinjected"):
        if batch.has_field("kvm_inj_virq", name):
            fresh[virqs] &= sequence.values("kvm_inj_virq", name, position[virqs]) == 0
    broken = sequence.broken[position]
    what = np.where(fresh, what, _FORGET)
    use = fresh | broken
    return {
        "position": position[use],
        "what": what[use],
        "vector": vector[use],
        "thread": sequence.thread[position][use].astype(np.int64),
        "broken": broken[use],
    }


def _arrivals(batch: Batch) -> dict[int, tuple[NDArray[np.intp], NDArray[np.int64]]]:
    """Return vCPU id -> (table rows, vectors) of interrupts accepted by its LAPIC.

    Empty where two threads run vCPUs of the same id: two VMs, whose LAPICs the events do not tell apart.
    """
    table = batch.sequence.table
    ids = list(batch.findings.vcpu_ids.values())
    if not table.has("kvm_apic_accept_irq", "vec"):
        return {}
    rows = table.rows("kvm_apic_accept_irq")
    apic = table.field("kvm_apic_accept_irq", "apicid").astype(np.int64)
    vector = table.field("kvm_apic_accept_irq", "vec").astype(np.int64)
    fixed = among(table.field("kvm_apic_accept_irq", "dm"), _FIXED)
    return {
        one: (rows[fixed & (apic == one)], vector[fixed & (apic == one)]) for one in set(ids) if ids.count(one) == 1
    }


def _follow(
    batch: Batch,
    state: InService,
    events: dict[str, NDArray[np.int64]],
    lapic: tuple[NDArray[np.intp], NDArray[np.int64]] | None,
) -> None:
    """Step one thread's ISR; an arrival counts from its row on, so a tie only makes less certain."""
    rows = batch.sequence.row[events["position"]]
    lapic_rows, lapic_vectors = lapic if lapic is not None else (np.empty(0, np.intp), np.empty(0, np.int64))
    arrived = np.searchsorted(lapic_rows, rows)
    setters = np.searchsorted(setter_rows(batch), rows)
    taken, told = 0, int(setters[0]) if len(setters) else 0
    n_eoi = n_virq = 0
    for i, (what, vector) in enumerate(zip(events["what"].tolist(), events["vector"].tolist(), strict=True)):
        if setters[i] != told or events["broken"][i]:
            told = int(setters[i])
            state.forget()
        if taken < arrived[i]:
            state.pending.update(lapic_vectors[taken : arrived[i]].tolist())
            taken = int(arrived[i])
        wrong, rule = None, "V11"
        if what == _EOI:
            n_eoi += 1
            wrong = state.end(vector)
        elif what == _VIRQ:
            n_virq += 1
            rule, wrong = "J6", state.inject(vector, from_lapic=vector in state.pending)
        if wrong:
            _report(batch, rule, int(events["position"][i]), (wrong, vector))
            state.forget()
    batch.findings.check("V11", n_eoi)
    batch.findings.check("J6", n_virq)


def _report(batch: Batch, rule: str, position: int, what: tuple[str, int]) -> None:
    wrong, vector = what
    if rule == "V11":
        batch.findings.violate(rule, [position], lambda _: (wrong, f"kvm_eoi vector {vector}"))
    else:
        batch.findings.violate(
            rule, [position], lambda _: ("a higher priority class than every vector in service", wrong)
        )
