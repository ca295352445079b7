"""How each vCPU thread was last seen, and which interrupts wait for it: for lost wake-ups (H1, H4)."""

from __future__ import annotations

from collections import Counter
from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS, EXIT, N_STEPS
from kvmtrace.check.decoding import failed_segments
from kvmtrace.check.findings import constant
from kvmtrace.isa.registry import BY_NUMBER
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.model.injection import IRR_DELIVERY_MODES
from kvmtrace.model.thresholds import threshold
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found
    from kvmtrace.check.thread_events import Sequence

TASK_INTERRUPTIBLE = 1
WAIT = "kvm_wfx_arm64"
ASLEEP_NS = threshold("wakes_within")
# what H1 and H4 look at
NEEDS = (
    "kvm_exit.exit_reason",
    "kvm_exit.isa",
    "kvm_exit.vcpu_id",
    "sched_switch",
    "kvm_apic_accept_irq.vec",
    "kvm_apic_accept_irq.apicid",
    "kvm_apic_accept_irq.dm",
    "kvm_inj_virq",
)


@dataclass
class Halted:
    """How each vCPU thread was last seen, and when interrupts arrived for it: for H1 and H4.

    Parameters
    ----------
    since : sequence.key_of a thread -> time of the HLT exit, for threads that sleep in the kernel
    arrived : vcpu_id -> (time, vector) of the first interrupt accepted since the last injection
    """

    since: dict[int, int] = field(default_factory=dict)
    arrived: dict[int, tuple[int, int]] = field(default_factory=dict)
    end_ns: int = 0

    def add(self, excerpt: Excerpt) -> bool:
        """Take note of an excerpt, the unfinished ends of its threads included."""
        whole = excerpt.whole
        if len(whole.table):
            self.end_ns = max(self.end_ns, int(whole.table.ts_ns.max()))
        self._note_arrivals(excerpt)
        for start in np.flatnonzero(whole.first):
            self._note_thread(whole, int(start))
        return True

    def _note_arrivals(self, excerpt: Excerpt) -> None:
        table = excerpt.sequence.table
        rows = table.rows("kvm_apic_accept_irq")
        apic = table.field("kvm_apic_accept_irq", "apicid").astype(np.int64)
        vector = table.field("kvm_apic_accept_irq", "vec")
        fixed = among(table.field("kvm_apic_accept_irq", "dm"), IRR_DELIVERY_MODES)
        whole = excerpt.whole
        injected = np.flatnonzero(whole.cls == CLASS["inject interrupt"])
        numbers = {whole.key_of(number): number for number in range(len(whole.tids))}
        times = Counter(excerpt.vcpu_ids.values())
        for key, vcpu in excerpt.vcpu_ids.items():
            if times[vcpu] > 1:
                continue
            mine = injected[whole.thread[injected] == numbers.get(key, -1)]
            last = int(whole.row[mine[-1]]) if len(mine) else -1
            if last >= 0:
                self.arrived.pop(vcpu, None)
            later = np.flatnonzero(fixed & (apic == vcpu) & (rows > last))
            if len(later) and vcpu not in self.arrived:
                self.arrived[vcpu] = int(table.ts_ns[rows[later[0]]]), int(vector[later[0]])

    def _note_thread(self, whole: Sequence, start: int) -> None:
        stop = int(np.searchsorted(whole.thread, whole.thread[start], "right"))
        key = whole.key_of(int(whole.thread[start]))
        steps = np.flatnonzero((whole.cls[start:stop] <= N_STEPS) & (whole.cls[start:stop] > 0))
        self.since.pop(key, None)
        if not len(steps):
            return
        position = start + int(steps[-1])
        if whole.cls[position] != EXIT or CLASS["sched_switch"] not in whole.cls[position:stop]:
            return
        at = np.array([position])
        isa = BY_NUMBER.get(int(whole.values("kvm_exit", "isa", at)[0]))
        reason = int(whole.values("kvm_exit", "exit_reason", at)[0])
        if isa is not None and isa.code(reason) in isa.codes("halt"):
            self.since[key] = int(whole.ts_ns[position])

    def report(self, excerpt: Excerpt, found: Found, *, before_halt: bool) -> None:
        """Report vCPUs that sleep on although an interrupt was accepted long before the end.

        Parameters
        ----------
        before_halt : those whose interrupt was accepted before they halted, else behind
        """
        numbers = {excerpt.sequence.key_of(number): number for number in range(len(excerpt.sequence.tids))}
        for key, since in self.since.items():
            arrival = self.arrived.get(excerpt.vcpu_ids.get(key, -1))
            if arrival is not None and (arrival[0] < since) != before_halt:
                continue
            found.check(arrival is not None or not before_halt)
            if arrival is None or self.end_ns - max(arrival[0], since) < ASLEEP_NS:
                continue
            mine = np.flatnonzero((excerpt.sequence.thread == numbers.get(key, -1)) & (excerpt.sequence.cls == EXIT))
            if len(mine):
                late = (self.end_ns - arrival[0]) / 1e9
                found.violate(
                    [int(mine[-1])],
                    constant(
                        f"a wake-up: vector {arrival[1]:#x} was accepted",
                        f"still halted {late:.1f} s later, at the end of the recording",
                    ),
                )


def halted(excerpt: Excerpt) -> Halted:
    """Return what is known of the vCPU threads of a recording up to the end of this excerpt."""
    memory = excerpt.remember("halted", Halted)
    excerpt.once("halted", memory.add)
    return memory


def _slept(excerpt: Excerpt) -> NDArray[np.intp]:
    """Return the HLT exits whose thread went to sleep in the kernel and goes on."""
    exits, segments = excerpt.exits, excerpt.segments
    if not excerpt.of_kind("halt").any():
        return np.empty(0, np.intp)
    halted = excerpt.of_kind("halt") & ~excerpt.nested & ~failed_segments(excerpt)[exits.seg]
    group = np.flatnonzero(halted & (exits.next_kind != 0) & exits.has("sched_switch"))
    asleep = np.zeros(len(segments), bool)
    asleep[segments.of[sleeps(excerpt)]] = True
    group = group[asleep[exits.seg[group]]]
    found: NDArray[np.intp] = group[~_yields(excerpt, group)]
    return found


def sleeps(excerpt: Excerpt) -> NDArray[np.intp]:
    """Return the positions of the switches with which threads went to sleep."""
    switches = excerpt.segments.positions("sched_switch")
    states = excerpt.sequence.values("sched_switch", "prev_state", switches).astype(np.int64) & 0xFF
    found: NDArray[np.intp] = switches[states == TASK_INTERRUPTIBLE]
    return found


def _yields(excerpt: Excerpt, group: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Say which exits did not halt the vCPU, or may not have: WFE only yields, and shares its exit reason with WFI.

    Such a vCPU may sleep as any may that another one stops (kvm_vcpu_sleep, arm64's arm.c).
    """
    shared = excerpt.of_isa(lambda isa: WAIT in isa.follow_ups)[group]
    if not shared.any() or excerpt.capability.missing((f"{WAIT}.is_wfe",)):
        return shared
    position = excerpt.first_in_exit(WAIT, group)
    told = position >= 0
    shared[told] &= excerpt.sequence.values(WAIT, "is_wfe", position[told]) != 0
    return shared


def slept(excerpt: Excerpt) -> NDArray[np.intp]:
    """Return the HLT exits whose thread went to sleep in the kernel and goes on."""
    return excerpt.once("slept", _slept)


def idle_ns(excerpt: Excerpt, arrival: np.intp, injected: np.intp) -> int:
    """Return how long before its injection the vCPU's CPU was last seen at other work, not longer than it waited."""
    sequence, table = excerpt.sequence, excerpt.whole.table
    row = int(sequence.row[injected])
    between = slice(int(arrival), row)
    others = (table.cpu[between] == sequence.cpu[injected]) & (table.tid[between] != table.tid[row])
    busy_until = int(table.ts_ns[between][others].max()) if others.any() else int(table.ts_ns[arrival])
    return int(sequence.ts_ns[injected]) - busy_until
