"""Interrupts of whatever thread, in the order in which each thread sent and accepted them.

A *lane* of this log is a thread outside interrupt context, or what interrupted it. An excerpt's log holds the rows that
are new in its table; what is cut off at the beginning or end of a lane there is not judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.model.interrupts import FOLLOWED_EVENTS, LINE_EVENTS, PARTING_EVENTS, SENDERS
from kvmtrace.table.distinct import distinct
from kvmtrace.table.event_table import LOST_EVENTS, TRACE_FLAG_HARDIRQ, TRACE_FLAG_NMI, TRACE_FLAG_SOFTIRQ

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.table.event_table import EventTable

    Rows = NDArray[np.intp]
    Flags = NDArray[np.bool_]

ACCEPT = "kvm_apic_accept_irq"
LOGGED: tuple[str, ...] = (ACCEPT, *SENDERS, *PARTING_EVENTS)
NUMBER: dict[str, int] = {kind: number for number, kind in enumerate(LOGGED, 1)}
# looked for by kind: interrupts, registers of the LAPIC, what else is written; the others part what is beside them
ASKED_FOR = frozenset({ACCEPT, *SENDERS, *LINE_EVENTS, *FOLLOWED_EVENTS})
NONE = -1


@dataclass(frozen=True, eq=False)
class InterruptLog:
    """The log, lane by lane, each in its order.

    Parameters
    ----------
    recorded : events whose absence means that they did not happen
    row : intp, row of the table
    code : uint8, NUMBER of the kind
    lane : int64
    before, behind : intp, the nearest entry of the lane that is no acceptance, NONE where the lane ends first
    """

    table: EventTable
    recorded: frozenset[str]
    row: Rows
    code: NDArray[np.uint8]
    lane: NDArray[np.int64]
    before: Rows
    behind: Rows

    def of_kind(self, kind: str) -> Rows:
        """Return the entries of a kind, one of ASKED_FOR."""
        assert kind in ASKED_FOR, kind
        return np.flatnonzero(self.code == NUMBER[kind])

    def is_kind(self, entries: Rows, *kinds: str) -> Flags:
        """Say which of these entries, NONE among them perhaps, are of one of these kinds."""
        found = np.zeros(len(entries), bool)
        codes = self.code[entries] if len(self.code) else np.zeros(len(entries), np.uint8)
        for kind in kinds:
            found |= (entries >= 0) & (codes == NUMBER[kind])
        return found

    def values(self, kind: str, field: str, entries: Rows) -> NDArray[np.int64]:
        """Return a field of entries that are all of a kind; zeros if it was not recorded."""
        if not self.table.has(kind, field):
            return np.zeros(len(entries), np.int64)
        own = self.table.position_in_kind[self.row[entries]]
        found: NDArray[Any] = self.table.field(kind, field).take(own)
        return found.astype(np.int64)

    def tells(self, kind: str) -> bool:
        """Say whether a sender's events say what they send."""
        row = SENDERS[kind]
        return self.recorded.issuperset(row.beside) and all(self.table.has(kind, field) for field in row.fields)

    def lines(self, entries: Rows) -> Rows:
        """Return the kvm_set_irq behind which each pin's change stands, a PIC's pin between perhaps; else NONE."""
        line = self.before[entries]
        pic = self.is_kind(line, "kvm_pic_set_irq")
        line[pic] = self.before[line[pic]]
        return np.where(self.is_kind(line, "kvm_set_irq"), line, NONE)

    def accepted_before(self, entries: Rows) -> Flags:
        """Say which entries stand right behind an acceptance of their lane."""
        found: Flags = (entries > 0) & (self.code[entries - 1] == NUMBER[ACCEPT])
        found &= self.lane[entries - 1] == self.lane[entries]
        return found

    def own(self) -> Flags:
        """Say which entries a thread traced outside interrupt context."""
        found: Flags = self.lane & 3 == 0
        return found

    def whole(self, first: Rows, last: Rows) -> Flags:
        """Say between which entries of a lane, NONE among them perhaps, nothing was lost: on one CPU, without a gap."""
        known = (first >= 0) & (last >= 0)
        if not len(self.row):
            return known
        since, until = self.row[first], self.row[last]
        cpu = self.table.cpu
        known &= cpu[since] == cpu[until]
        lost = self.table.rows(LOST_EVENTS) if LOST_EVENTS in self.table.kind_index else since[:0]
        for one in distinct(cpu[lost]):
            here = lost[cpu[lost] == one]
            known &= ~((cpu[since] == one) & (np.searchsorted(here, since) != np.searchsorted(here, until)))
        return known


def interrupt_log(excerpt: Excerpt) -> InterruptLog:
    """Return the log of an excerpt's table (made once)."""
    return excerpt.once("interrupt log", _interrupt_log)


def count_senders(excerpt: Excerpt) -> int:
    """Count what an excerpt is the first to hold of what was sent."""
    table, first = excerpt.whole.table, excerpt.whole.n_parked
    return sum(int(np.count_nonzero(table.rows(kind) >= first)) for kind in SENDERS if kind in table.kind_index)


def _interrupt_log(excerpt: Excerpt) -> InterruptLog:
    table, first = excerpt.whole.table, excerpt.whole.n_parked
    numbers = np.zeros(max(len(table.kinds), 1), np.uint8)
    for kind, number in NUMBER.items():
        if kind in table.kind_index:
            numbers[table.kind_index[kind]] = number
    # what is written long before the first interrupt counts, too
    recorded = excerpt.capability.recorded
    wanted = not recorded.isdisjoint((ACCEPT, *SENDERS)) and any(
        kind in table.kind_index and len(rows := table.rows(kind)) and rows[-1] >= first for kind in ASKED_FOR
    )
    code = numbers.take(table.kind[first:]) if wanted else np.zeros(0, np.uint8)
    row = np.flatnonzero(code)
    code, row = code[row], row + first
    lane = _lanes(table, row)
    order = np.argsort(lane, kind="stable")
    row, code, lane = row[order], code[order], lane[order]
    before, behind = _others(code, lane)
    return InterruptLog(table, recorded, row, code, lane, before, behind)


def _lanes(table: EventTable, row: Rows) -> NDArray[np.int64]:
    """Return what names the lane of each row; the CPUs' idle threads share the id 0."""
    flags, tid = table.irq_flags[row], table.tid[row].astype(np.int64)
    context = np.where(flags & (TRACE_FLAG_HARDIRQ | TRACE_FLAG_NMI) != 0, 2, flags & TRACE_FLAG_SOFTIRQ != 0)
    found: NDArray[np.int64] = np.where(tid > 0, tid, -1 - table.cpu[row].astype(np.int64)) << 2 | context
    return found


def _others(code: NDArray[np.uint8], lane: NDArray[np.int64]) -> tuple[Rows, Rows]:
    """Return, for each entry, the nearest other one of its lane, before and behind, that is no acceptance."""
    n = len(code)
    number, other = np.arange(n), code != NUMBER[ACCEPT]
    last = np.maximum.accumulate(np.where(other, number, NONE))
    following = np.minimum.accumulate(np.where(other, number, n)[::-1])[::-1]
    before, behind = np.append(NONE, last)[:n], np.append(following, n)[1:]
    before = np.where((before >= 0) & (lane[before] == lane), before, NONE)
    behind[behind == n] = NONE
    behind = np.where((behind >= 0) & (lane[behind] == lane), behind, NONE)
    return before, behind


@dataclass(frozen=True, eq=False)
class Acceptances:
    """What LAPICs accepted, in the log's order.

    Parameters
    ----------
    entry : intp, in the log
    vcpu, vector : int64
    mode : int64, delivery mode 0..7
    level : bool, level-triggered
    sender : intp, entry of what it was sent by; NONE if that is not among SENDERS, or not known
    """

    entry: Rows
    vcpu: NDArray[np.int64]
    vector: NDArray[np.int64]
    mode: NDArray[np.int64]
    level: Flags
    sender: Rows


def acceptances(excerpt: Excerpt) -> Acceptances:
    """Return what the LAPICs accepted, and by whom it was sent (made once)."""
    return excerpt.once("acceptances", _acceptances)


def _acceptances(excerpt: Excerpt) -> Acceptances:
    log = interrupt_log(excerpt)
    entry = log.of_kind(ACCEPT)
    before, behind = log.before[entry], log.behind[entry]
    sender = np.full(len(entry), NONE)
    for kind, row in SENDERS.items():
        if not log.tells(kind):
            continue
        near = behind if row.after else before
        mine = log.is_kind(near, kind)
        # a pin's acceptances stand behind the change of the line: what an IPI or a message sent is theirs
        if row.after:
            mine &= ~log.is_kind(before, *(kind for kind, other in SENDERS.items() if not other.after))
        sender[mine] = near[mine]
    return Acceptances(
        entry,
        log.values(ACCEPT, "apicid", entry),
        log.values(ACCEPT, "vec", entry),
        log.values(ACCEPT, "dm", entry) >> 8 & 7,
        log.values(ACCEPT, "tm", entry) != 0,
        sender,
    )
