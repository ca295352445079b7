"""The LAPIC's in-service stack, vector by vector (V11, J6).

An interrupt injected from the LAPIC is in service until its EOI; kvm_eoi names the highest one. Only what is
certain counts: that a vector came from the LAPIC is known if kvm_apic_accept_irq showed it arriving there,
and once a vector's EOI was seen it is not in service until it is injected again.
Source: kvm_get_apic_interrupt, apic_set_eoi (lapic.c)
"""

from __future__ import annotations

from collections import Counter
from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS
from kvmtrace.check.guest_levels import nestings
from kvmtrace.check.userspace_changes import setter_rows
from kvmtrace.isa.words import INTR_TYPE_EXT_INTR, decode_intr_info
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.injection import AUTO_EOI, IRR_DELIVERY_MODES
from kvmtrace.model.nesting import REFLECTS
from kvmtrace.table.distinct import among, distinct

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

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


@dataclass
class Outcome:
    """What stepping the in-service stack through an excerpt found.

    Parameters
    ----------
    n_ended, n_injected : EOIs and injections that were looked at
    wrong_ends, wrong_injections : (position, vector, what is wrong)
    """

    n_ended: int = 0
    n_injected: int = 0
    wrong_ends: list[tuple[int, int, str]] = field(default_factory=list)
    wrong_injections: list[tuple[int, int, str]] = field(default_factory=list)


def in_service(excerpt: Excerpt) -> Outcome:
    """Return what the in-service stacks of an excerpt's vCPUs say of its EOIs and injections."""
    return excerpt.once("in service", _follow_all)


def _follow_all(excerpt: Excerpt) -> Outcome:
    memory: dict[int, InService] = excerpt.remember("in service", dict)
    outcome = Outcome()
    events = _events(excerpt)
    arrivals = _arrivals(excerpt)
    # Hyper-V's SynIC may end interrupts by itself (auto-EOI): then nothing is certain
    synic = any(name.startswith(AUTO_EOI) for name in excerpt.capability.seen)
    for thread in distinct(events["thread"]):
        key = excerpt.sequence.key_of(int(thread))
        state = memory.setdefault(key, InService())
        mine = {name: column[events["thread"] == thread] for name, column in events.items()}
        lapic = arrivals.get(excerpt.vcpu_ids.get(key, -1))
        _follow(excerpt, state, mine, None if synic else lapic, outcome)
    return outcome


def _events(excerpt: Excerpt) -> dict[str, NDArray[np.int64]]:
    """Return EOIs, fresh hard injections and breaks in sequence order."""
    sequence = excerpt.sequence
    taken, taken_vectors = _taken_by_l1(excerpt)
    of_class = [excerpt.segments.positions(name) for name in ("kvm_eoi", "inject interrupt")]
    position = distinct(np.concatenate([*of_class, np.flatnonzero(sequence.broken), taken]))
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
        if excerpt.has_field("kvm_inj_virq", name):
            fresh[virqs] &= sequence.values("kvm_inj_virq", name, position[virqs]) == 0
    broken = sequence.broken[position]
    what = np.where(fresh, what, _FORGET)
    at = np.searchsorted(position, taken)
    what[at], vector[at] = _VIRQ, taken_vectors
    use = fresh | broken
    return {
        "position": position[use],
        "what": what[use],
        "vector": vector[use],
        "thread": sequence.thread[position][use].astype(np.int64),
        "broken": broken[use],
    }


def _taken_by_l1(excerpt: Excerpt) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Return where a guest hypervisor acknowledged an interrupt by an exit of its guest's, and the vectors.

    Source: nested_vmx_vmexit (vmx/nested.c): kvm_cpu_get_interrupt, without an injection
    """
    positions = excerpt.segments.positions(REFLECTS)
    names = [one.taken_field for one, _, _ in nestings(excerpt) if one.taken_field]
    fields = [name for name in names if excerpt.has_field(REFLECTS, name)]
    if not len(positions) or not fields:
        return positions[:0], np.empty(0, np.int64)
    info = decode_intr_info(excerpt.sequence.values(REFLECTS, fields[0], positions).astype(np.uint64))
    mine = info.valid & (info.type == INTR_TYPE_EXT_INTR)
    return positions[mine], info.vector[mine].astype(np.int64)


def _arrivals(excerpt: Excerpt) -> dict[int, tuple[NDArray[np.intp], NDArray[np.int64]]]:
    """Return vCPU id -> (table rows, vectors) of interrupts accepted by its LAPIC.

    Empty where two threads run vCPUs of the same id: two VMs, whose LAPICs the events do not tell apart.
    """
    table = excerpt.sequence.table
    if not all(excerpt.has_field("kvm_apic_accept_irq", name) for name in ("vec", "apicid", "dm")):
        return {}
    rows = table.rows("kvm_apic_accept_irq")
    apic = table.field("kvm_apic_accept_irq", "apicid").astype(np.int64)
    vector = table.field("kvm_apic_accept_irq", "vec").astype(np.int64)
    fixed = among(table.field("kvm_apic_accept_irq", "dm"), IRR_DELIVERY_MODES)
    rows, apic, vector = rows[fixed], apic[fixed], vector[fixed]
    order = np.argsort(apic, kind="stable")
    ids = [one for one, times in Counter(excerpt.vcpu_ids.values()).items() if times == 1]
    first, stop = (np.searchsorted(apic[order], ids, side).tolist() for side in ("left", "right"))
    return {one: (rows[order[a:b]], vector[order[a:b]]) for one, a, b in zip(ids, first, stop, strict=True)}


def _follow(
    excerpt: Excerpt,
    state: InService,
    events: dict[str, NDArray[np.int64]],
    lapic: tuple[NDArray[np.intp], NDArray[np.int64]] | None,
    outcome: Outcome,
) -> None:
    """Step one thread's ISR; an arrival counts from its row on, so a tie only makes less certain."""
    rows = excerpt.sequence.row[events["position"]]
    lapic_rows, lapic_vectors = lapic if lapic is not None else (np.empty(0, np.intp), np.empty(0, np.int64))
    arrived = np.searchsorted(lapic_rows, rows)
    setters = np.searchsorted(setter_rows(excerpt), rows)
    taken, told = 0, int(setters[0]) if len(setters) else 0
    for i, (what, vector) in enumerate(zip(events["what"].tolist(), events["vector"].tolist(), strict=True)):
        if setters[i] != told or events["broken"][i]:
            told = int(setters[i])
            state.forget()
        if taken < arrived[i]:
            state.pending.update(lapic_vectors[taken : arrived[i]].tolist())
            taken = int(arrived[i])
        wrong = None
        if what == _EOI:
            outcome.n_ended += 1
            wrong, list_of = state.end(vector), outcome.wrong_ends
        elif what == _VIRQ:
            outcome.n_injected += 1
            wrong, list_of = state.inject(vector, from_lapic=vector in state.pending), outcome.wrong_injections
        if wrong:
            list_of.append((int(events["position"][i]), vector, wrong))
            state.forget()
