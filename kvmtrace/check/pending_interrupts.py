"""Interrupts between acceptance and injection, vector by vector of each vCPU: each acceptance is taken once.

Several acceptances of one vector may be taken as one (they merge in the IRR), but nothing is taken that was not
accepted. kvm_apic_accept_irq is traced before the vector is set: a second acceptance may still belong behind an
injection that is traced later, so that only what cannot be explained so is wrong.
Source: __apic_accept_irq, kvm_apic_has_interrupt, kvm_get_apic_interrupt (lapic.c), kvm_cpu_get_interrupt (irq.c)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.check.alphabet import CLASS
from kvmtrace.check.doubts import Doubt
from kvmtrace.check.interrupt_log import NONE, acceptances, interrupt_log
from kvmtrace.check.routing_changes import all_are_recorded, ioctl_rows, known_senders, routing_changes
from kvmtrace.check.vcpu_owners import NOBODY, vcpu_owners
from kvmtrace.model.injection import IRR_DELIVERY_MODES
from kvmtrace.model.interrupts import PENDING_SETTERS, SENDERS
from kvmtrace.model.nesting import LEVEL_EVENTS
from kvmtrace.model.thresholds import threshold
from kvmtrace.model.wake_ups import HARDWARE_DELIVERY
from kvmtrace.table.distinct import among
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt

    Rows = NDArray[np.intp]
    Numbers = NDArray[np.int64]

_NOTHING, ACCEPTED, TAKEN, _UNKNOWN = range(4)
_VECTORS = 256
# interrupts that reach the guest, or leave the IRR, without kvm_inj_virq: by hardware, or as an exit of a nested guest
UNTRACED_DELIVERY = frozenset(HARDWARE_DELIVERY) | frozenset(row.event for row in LEVEL_EVENTS)
NEVER = np.iinfo(np.int64).max
_HISTORY = 3  # events of a vector that are kept from table to table


@dataclass
class Pending:
    """What is known of the vCPUs' accepted and injected vectors.

    Parameters
    ----------
    history : vCPU << 8 | vector -> (what, time) of its latest events since knowledge began
    raised_ns : time at which each pin of a PIC was last raised; chips share the numbers
    accepted_ns : by vector, when any LAPIC accepted it for the first time
    restored : userspace wrote a LAPIC, or queued an interrupt: what is pending is not all accepted here
    inner, outer : vectors that vCPUs' own threads sent, and that devices did
    n_judged, n_unknown : injections of this excerpt
    repeated : taken although nothing was accepted since they were taken before
    events : acceptances and injections of this excerpt, by vector; None where nothing is known of them
    """

    history: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    raised_ns: NDArray[np.int64] = field(default_factory=lambda: np.full(8, -1, np.int64))
    accepted_ns: NDArray[np.int64] = field(default_factory=lambda: np.full(_VECTORS, NEVER, np.int64))
    restored: bool = False
    inner: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(_VECTORS, bool))
    outer: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(_VECTORS, bool))
    n_judged: int = 0
    n_unknown: int = 0
    repeated: list[Doubt] = field(default_factory=list)
    events: Events | None = None

    def add(self, excerpt: Excerpt) -> bool:
        """Follow the vectors through an excerpt's new rows."""
        self.n_judged, self.n_unknown, self.repeated, self.events = 0, 0, [], None
        events = _events(excerpt)
        unknowable = vcpu_owners(excerpt).ambiguous or not excerpt.capability.seen.isdisjoint(UNTRACED_DELIVERY)
        if unknowable:
            self.history.clear()
            self.n_unknown = int(np.count_nonzero(events.what == TAKEN))
            return True
        self._note_senders(excerpt)
        events = events.behind(self.history).sorted()
        self._judge(excerpt, events)
        self.events = events
        self._remember(events, int(forgets(excerpt).size))
        return True

    def _note_senders(self, excerpt: Excerpt) -> None:
        """Note which vectors come from the vCPUs' own threads alone."""
        log, accepted = interrupt_log(excerpt), acceptances(excerpt)
        tids = log.table.tid[log.row[accepted.entry]].astype(np.int64)
        own = (vcpu_owners(excerpt).vcpus(tids) != NOBODY) & log.own()[accepted.entry]
        own &= (accepted.sender == NONE) | log.is_kind(accepted.sender, "kvm_apic_ipi")
        self.inner[accepted.vector[own]] = True
        self.outer[accepted.vector[~own]] = True
        self.restored |= len(ioctl_rows(excerpt, PENDING_SETTERS)) > 0
        np.minimum.at(self.accepted_ns, accepted.vector, log.table.ts_ns[log.row[accepted.entry]])

    def _judge(self, excerpt: Excerpt, events: Events) -> None:
        taken = np.flatnonzero((events.what == TAKEN) & (events.row >= 0))
        first, second, third = (events.before(taken, steps) for steps in (1, 2, 3))
        vector = events.key[taken] & 0xFF
        known = first != _UNKNOWN
        never = ~known & self._is_whole(excerpt)
        recorded = excerpt.capability.recorded
        if not all_are_recorded(excerpt) or "kvm_pic_set_irq" not in recorded:
            # of vectors that vCPUs' own threads send, and no device does, all is known
            known &= self.inner[vector] & ~self.outer[vector] & recorded.issuperset(SENDERS)
        known |= never
        self.n_judged, self.n_unknown = int(np.count_nonzero(known)), int(np.count_nonzero(~known))
        wrong = known & (first == TAKEN) & ((second == TAKEN) | (second == ACCEPTED) & (third != ACCEPTED))
        # clocks of CPUs may differ: what is traced just behind may have come before
        following = np.minimum(taken + 1, len(events.key) - 1)
        soon = events.ts_ns[following] - events.ts_ns[taken] < threshold("clocks_differ")
        wrong &= ~((following > taken) & (events.key[following] == events.key[taken]) & soon)
        # the first of its vector: nobody ever accepted it
        wrong |= never & (self.accepted_ns[vector] > events.ts_ns[taken] + threshold("clocks_differ"))
        pic_ns = self._raise(excerpt)
        for i in np.flatnonzero(wrong).tolist():
            at, since = int(taken[i]), 0 if never[i] else int(events.ts_ns[max(taken[i] - 2, 0)])
            raised = pic_ns[int(vector[i]) & 7]
            if len(raised) and raised[max(np.searchsorted(raised, events.ts_ns[at], "right") - 1, 0)] >= since:
                continue
            self.repeated.append(
                Doubt(
                    int(events.row[at]),
                    since if never[i] else int(events.ts_ns[at - 1]),
                    int(events.ts_ns[at]),
                    f"vector {int(vector[i]):#x} accepted by vCPU {int(events.key[at]) >> 8} since "
                    + ("the VM was made" if never[i] else "its last injection"),
                    "none was accepted, and no pin of a PIC was raised",
                )
            )

    def _is_whole(self, excerpt: Excerpt) -> bool:
        """Say whether all that this VM ever accepted is recorded: it was made here, and nobody restored a state."""
        whole = known_senders(excerpt).created and all_are_recorded(excerpt) and not self.restored
        return whole and "kvm_pic_set_irq" in excerpt.capability.recorded

    def _raise(self, excerpt: Excerpt) -> list[Numbers]:
        """Return when each pin of a PIC was raised, ascending: by number, and any of them for the spurious one."""
        log = interrupt_log(excerpt)
        entry = log.of_kind("kvm_pic_set_irq")
        before = log.before[entry]
        line = log.is_kind(before, "kvm_set_irq")
        up = np.ones(len(entry), bool)
        up[line] = log.values("kvm_set_irq", "level", before[line]) != 0
        pin = log.values("kvm_pic_set_irq", "pin", entry) & 7
        # a level-triggered pin stays raised
        up |= log.values("kvm_pic_set_irq", "elcr", entry) >> pin & 1 != 0
        times = log.table.ts_ns[log.row[entry]]
        found = []
        for number in range(8):
            mine = np.sort(times[up & (pin == number) if number < 7 else np.ones(len(pin), bool)])
            found.append(np.append(self.raised_ns[number : number + 1], mine))
            self.raised_ns[number] = found[-1][-1]
        return found

    def _remember(self, events: Events, epoch: int) -> None:
        """Keep the latest events of each vector, of the time since knowledge began."""
        latest = events.epoch == epoch
        if epoch:
            self.history.clear()
        key, what, ts_ns = events.key[latest], events.what[latest], events.ts_ns[latest]
        if not len(key):
            return
        ends = np.append(np.flatnonzero(key[1:] != key[:-1]) + 1, len(key))
        begins = np.append(0, ends[:-1])
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
            kept = slice(max(begin, end - _HISTORY), end)
            self.history[int(key[begin])] = tuple(zip(what[kept].tolist(), ts_ns[kept].tolist(), strict=True))


@dataclass(frozen=True, eq=False)
class Events:
    """Acceptances and fresh injections; those of earlier tables have rows below 0.

    Parameters
    ----------
    key : int64, vCPU << 8 | vector
    row, what, ts_ns : int64
    epoch : how often knowledge ended before
    entry : of acceptances, in the log; NONE of others
    """

    key: Numbers
    row: Numbers
    what: Numbers
    ts_ns: Numbers
    epoch: Numbers
    entry: Numbers

    def behind(self, history: dict[int, tuple[tuple[int, int], ...]]) -> Events:
        """Return these events behind those that are known of their vectors."""
        keys = set(self.key.tolist()) & history.keys() if len(history) else set()
        old = [(key, i - _HISTORY, *one) for key in keys for i, one in enumerate(history[key])]
        if not old:
            return self
        key, row, what, ts_ns = (np.array(column, np.int64) for column in zip(*old, strict=True))
        nothing = np.zeros(len(old), np.int64)
        columns = (key, row, what, ts_ns, nothing, nothing + NONE)
        mine = (self.key, self.row, self.what, self.ts_ns, self.epoch, self.entry)
        return Events(*(np.concatenate(pair) for pair in zip(columns, mine, strict=True)))

    def sorted(self) -> Events:
        """Return them by vector, in their order."""
        order = np.lexsort((self.row, self.key))
        return Events(
            self.key[order], self.row[order], self.what[order], self.ts_ns[order], self.epoch[order], self.entry[order]
        )

    def before(self, at: Rows, steps: int) -> Numbers:
        """Return what happened to the same vector so many events before, _UNKNOWN if that is not known."""
        other = np.maximum(at - steps, 0)
        same = (at >= steps) & (self.key[other] == self.key[at]) & (self.epoch[other] == self.epoch[at])
        return np.where(same, self.what[other], _UNKNOWN)


def forgets(excerpt: Excerpt) -> Rows:
    """Return the rows, ascending, at which what is known of the LAPICs ends."""
    return excerpt.once("forgotten LAPICs", _find_forgets)


def _find_forgets(excerpt: Excerpt) -> Rows:
    table = excerpt.whole.table
    lost = table.rows(LOST_EVENTS) if LOST_EVENTS in table.kind_index else np.empty(0, np.intp)
    return np.sort(np.append(routing_changes(excerpt).begin, lost[lost >= excerpt.whole.n_parked]))


def _events(excerpt: Excerpt) -> Events:
    log, accepted, whole = interrupt_log(excerpt), acceptances(excerpt), excerpt.whole
    table = whole.table
    plain = np.flatnonzero(among(accepted.mode << 8, IRR_DELIVERY_MODES))
    at = np.flatnonzero(whole.cls == CLASS["inject interrupt"])
    at = at[whole.row[at] >= whole.n_parked]
    fresh = (whole.values("kvm_inj_virq", "reinjected", at) == 0) & (whole.values("kvm_inj_virq", "soft", at) == 0)
    at = at[fresh]
    vcpu = vcpu_owners(excerpt).vcpus(table.tid[whole.row[at]].astype(np.int64))
    at, vcpu = at[vcpu != NOBODY], vcpu[vcpu != NOBODY]
    taken = vcpu << 8 | whole.values("kvm_inj_virq", "vector", at).astype(np.int64) & 0xFF
    row = np.append(log.row[accepted.entry[plain]], whole.row[at]).astype(np.int64)
    return Events(
        np.append(accepted.vcpu[plain] << 8 | accepted.vector[plain], taken),
        row,
        np.repeat(np.array([ACCEPTED, TAKEN]), [len(plain), len(at)]),
        table.ts_ns[row],
        np.searchsorted(forgets(excerpt), row, "right").astype(np.int64),
        np.append(accepted.entry[plain], np.full(len(at), NONE)).astype(np.int64),
    )


def pending_interrupts(excerpt: Excerpt) -> Pending:
    """Return what following the vectors of an excerpt found."""
    memory = excerpt.remember("pending interrupts", Pending)
    excerpt.once("pending interrupts", memory.add)
    return memory
