"""Who had the CPU while a vCPU waited for one: from context switches, in consecutive tables.

A vCPU waits from the switch that takes it off its CPU runnable to the switch that puts it on one again: on the CPU that
it left. A sleeping vCPU waits from the interrupt that KVM accepts for it: on the CPU that it comes back on.

What ran there meanwhile is told by the switches of that CPU. Where they do not join (a target's recording has only its
own) nobody knows who ran, and that is said.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.table.distinct import distinct

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable

    Ints = NDArray[np.int64]

NOBODY_KNOWS = -1  # who ran
IDLE = 0  # the swapper: nobody
MOST_ROWS = 500_000  # of switches kept while a vCPU waits; what it waits longer for is not attributed
TASK_STATE_MASK = 0xFF  # prev_state without TASK_REPORT_MAX ("R+"), include/linux/sched.h
NEEDED = ("prev_pid", "next_pid", "prev_state", "next_comm")
AWAY_RUNNABLE, AWAY_ASLEEP, IN = range(3)
OF_KVM = ("kvm_entry", "kvm_exit", "kvm_userspace_exit", "kvm_fpu")
ORDER_BITS = 40  # of a row's place in a key
CARRIED, CARRIED_ACCEPT, FIRST_ROW = 0, 1, 2  # places before those of a table's rows
PER_OCTAVE = 32  # buckets of a histogram: 1.1 % from a value to the middle of its bucket
N_BUCKETS = 63 * PER_OCTAVE


@dataclass
class Stolen:
    """What one thread ran while one vCPU thread waited."""

    ns: int = 0
    count: int = 0
    longest_ns: int = 0


@dataclass
class Waited:
    """How long a vCPU thread waited for a CPU, and from an interrupt's acceptance to guest mode."""

    preempted_ns: int = 0
    preemptions: int = 0
    to_cpu_ns: int = 0
    to_entry_ns: int = 0
    to_entry_max_ns: int = 0
    to_entry: Ints = field(default_factory=lambda: np.zeros(N_BUCKETS, np.int64))


@dataclass
class _Columns:
    """Rows as columns of equal length."""

    def take(self, rows: Any) -> Any:
        """Return these rows."""
        return type(self)(*(column[rows] for column in vars(self).values()))

    def then(self, other: Any) -> Any:
        """Return these rows, and then others."""
        return type(self)(*map(np.concatenate, zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass
class Switches(_Columns):
    """Context switches in recorded order; `comm` is of `next`."""

    ts_ns: Ints
    cpu: Ints
    prev: Ints
    next: Ints
    runnable: NDArray[np.bool_]
    comm: NDArray[Any]

    @classmethod
    def of(cls, table: EventTable) -> Switches:
        """Return those of a table."""
        rows = table.rows("sched_switch")
        state = table.field("sched_switch", "prev_state").astype(np.int64)
        return cls(
            table.ts_ns[rows],
            table.cpu[rows].astype(np.int64),
            table.field("sched_switch", "prev_pid").astype(np.int64),
            table.field("sched_switch", "next_pid").astype(np.int64),
            state & TASK_STATE_MASK == 0,
            table.field("sched_switch", "next_comm"),
        )


@dataclass
class Moves(_Columns):
    """A vCPU thread leaves its CPU (AWAY_*) or comes onto one (IN); by thread, then order."""

    tid: Ints
    order: Ints
    ts_ns: Ints
    what: Ints
    cpu: Ints


@dataclass
class Waits(_Columns):
    """Waits that have ended: whose, from when to when, on which CPU."""

    tid: Ints
    begin_ns: Ints
    end_ns: Ints
    cpu: Ints


class CpuWaits:
    """Collects, per waiting vCPU thread and thread that ran instead, for how long.

    Attributes
    ----------
    stolen : (tid of the vCPU, tid that ran) -> Stolen
    comms : tid that ran -> its name
    waited : tid of the vCPU -> Waited
    """

    def __init__(self) -> None:
        self.stolen: dict[tuple[int, int], Stolen] = {}
        self.comms: dict[int, str] = {}
        self.waited: dict[int, Waited] = {}
        self._switches: Switches | None = None  # that a wait which is under way may need
        self._moves: Moves | None = None  # the latest of each thread
        self._accepted: dict[int, int] = {}  # tid of a vCPU that sleeps -> when its interrupt was accepted
        self._entering: dict[int, int] = {}  # tid of a vCPU that was woken, and is not in guest mode -> the same
        self._begun: set[int] = set()  # threads that have done something of KVM

    def feed(self, table: EventTable, tids: list[int], apics: Mapping[int, int]) -> None:
        """Take in the next table.

        Parameters
        ----------
        tids : the vCPU threads known so far
        apics : APIC id -> tid of the vCPU, of those that only one VM has
        """
        if not len(table) or not all(table.has("sched_switch", name) for name in NEEDED):
            return
        begins = self._begins(table, tids)
        new, known = Switches.of(table), np.array(sorted(self._begun), np.int64)
        switches = new if self._switches is None else self._switches.then(new)
        moves = self._moves_of(new, table, known, begins)
        key = _key(known, moves.tid, moves.order)
        waits = self._preemptions(moves).then(self._wake_ups(table, known, moves, key, apics))
        self._attribute(waits, switches, int(table.ts_ns.max()))
        self._keep(switches, moves)

    def _begins(self, table: EventTable, tids: list[int]) -> dict[int, int]:
        """Return the first row of KVM of each thread that had none before: what it did till then was no vCPU's."""
        new = [tid for tid in tids if tid not in self._begun]
        begins: dict[int, int] = {}
        for event in OF_KVM if new else ():
            rows = table.rows(event)
            own = table.tid[rows]
            for tid in new:
                first = rows[own == tid][:1]
                if len(first):
                    begins[tid] = min(int(first[0]), begins.get(tid, int(first[0])))
        self._begun |= begins.keys()
        return begins

    def _moves_of(self, new: Switches, table: EventTable, known: Ints, begins: Mapping[int, int]) -> Moves:
        """Return what the vCPU threads did since each began, the latest of each from before first."""
        rows = table.rows("sched_switch").astype(np.int64) * 2 + FIRST_ROW
        away, on = np.isin(new.prev, known), np.isin(new.next, known)
        what = np.where(new.runnable[away], AWAY_RUNNABLE, AWAY_ASLEEP).astype(np.int64)
        left = Moves(new.prev[away], rows[away], new.ts_ns[away], what, new.cpu[away])
        came = Moves(new.next[on], rows[on] + 1, new.ts_ns[on], np.full(int(on.sum()), IN, np.int64), new.cpu[on])
        moves: Moves = left.then(came)
        for tid, row in begins.items():
            moves = moves.take((moves.tid != tid) | (moves.order >= row * 2 + FIRST_ROW))
        if self._moves is not None:
            moves = self._moves.then(moves)
        ordered: Moves = moves.take(np.lexsort((moves.order, moves.tid)))
        return ordered

    def _preemptions(self, moves: Moves) -> Waits:
        at = _pairs(moves, AWAY_RUNNABLE)
        waits = Waits(moves.tid[at], moves.ts_ns[at], moves.ts_ns[at + 1], moves.cpu[at])
        for tid, ns, count in _sums(waits.tid, waits.end_ns - waits.begin_ns):
            own = self.waited.setdefault(tid, Waited())
            own.preempted_ns += ns
            own.preemptions += count
        return waits

    def _wake_ups(self, table: EventTable, known: Ints, moves: Moves, key: Ints, apics: Mapping[int, int]) -> Waits:
        """Return the waits of sleeping vCPUs for which an interrupt was accepted; note what is under way."""
        accept_key, accept_ns = self._acceptances(table, known, apics)
        at = _pairs(moves, AWAY_ASLEEP)
        first = np.searchsorted(accept_key, key[at])
        woken = (first < len(accept_key)) & (np.append(accept_key, 0)[np.minimum(first, len(accept_key))] < key[at + 1])
        at, accepted = at[woken], accept_ns[first[woken]]
        waits = Waits(moves.tid[at], accepted, moves.ts_ns[at + 1], moves.cpu[at + 1])
        for tid, ns, _ in _sums(waits.tid, waits.end_ns - waits.begin_ns):
            self.waited.setdefault(tid, Waited()).to_cpu_ns += ns
        self._enter(table, known, key, at + 1, (waits.tid, accepted))
        self._accepted = {}
        last = np.flatnonzero(np.append(moves.tid[1:] != moves.tid[:-1], True)) if len(moves.tid) else at[:0]
        for row in last[moves.what[last] == AWAY_ASLEEP].tolist():
            place = int(np.searchsorted(accept_key, key[row]))
            if place < len(accept_key) and accept_key[place] >> ORDER_BITS == key[row] >> ORDER_BITS:
                self._accepted[int(moves.tid[row])] = int(accept_ns[place])
        return waits

    def _acceptances(self, table: EventTable, known: Ints, apics: Mapping[int, int]) -> tuple[Ints, Ints]:
        """Return key and time of each interrupt that was accepted for a vCPU, by key."""
        carried = np.array(sorted(self._accepted.items()), np.int64).reshape(-1, 2)
        tid, order, ts_ns = carried[:, 0], np.full(len(carried), CARRIED_ACCEPT), carried[:, 1]
        if apics and table.count("kvm_apic_accept_irq") and table.has("kvm_apic_accept_irq", "apicid"):
            ids = np.array(sorted(apics), np.int64)
            asked = table.field("kvm_apic_accept_irq", "apicid").astype(np.int64)
            rows = table.rows("kvm_apic_accept_irq")
            place = np.minimum(np.searchsorted(ids, asked), len(ids) - 1)
            found = ids[place] == asked
            tid = np.concatenate([tid, np.array([apics[one] for one in ids.tolist()], np.int64)[place[found]]])
            order = np.concatenate([order, rows[found] * 2 + FIRST_ROW])
            ts_ns = np.concatenate([ts_ns, table.ts_ns[rows[found]]])
        key = _key(known, tid, order)
        by_key = np.argsort(key, kind="stable")
        return key[by_key], ts_ns[by_key]

    def _enter(self, table: EventTable, known: Ints, key: Ints, came: Ints, begun: tuple[Ints, Ints]) -> None:
        """Find the VM-entry behind each wake-up, before the thread leaves its CPU again.

        Parameters
        ----------
        key : of all moves
        came : those by which woken threads came onto a CPU
        begun : their threads, and when their interrupts were accepted
        """
        before = np.array(sorted(self._entering.items()), np.int64).reshape(-1, 2)
        self._entering = {}
        tid, begin_ns = np.concatenate([before[:, 0], begun[0]]), np.concatenate([before[:, 1], begun[1]])
        if not len(tid):
            return
        begin = np.concatenate([_key(known, before[:, 0], np.full(len(before), CARRIED)), key[came]])
        after = np.searchsorted(key, begin, "right")
        left = np.append(key, np.iinfo(np.int64).max)[after]
        rows = table.rows("kvm_entry")
        rows = rows[np.isin(table.tid[rows], tid)]
        entry_key = _key(known, table.tid[rows].astype(np.int64), rows * 2 + FIRST_ROW)
        by_key = np.argsort(entry_key, kind="stable")
        entry_key, entry_ns = np.append(entry_key[by_key], np.iinfo(np.int64).max), table.ts_ns[rows[by_key]]
        place = np.searchsorted(entry_key, begin)
        own_end = ((begin >> ORDER_BITS) + 1) << ORDER_BITS
        entered = entry_key[place] < np.minimum(left, own_end)
        if entered.any():
            self._note_entries(tid[entered], np.maximum(entry_ns[place[entered]] - begin_ns[entered], 0))
        waits_on = ~entered & (left >= own_end)
        self._entering = dict(zip(tid[waits_on].tolist(), begin_ns[waits_on].tolist(), strict=True))

    def _note_entries(self, tids: Ints, ns: Ints) -> None:
        buckets = np.minimum(np.log2(np.maximum(ns, 1)) * PER_OCTAVE, N_BUCKETS - 1).astype(np.int64)
        for tid in distinct(tids).tolist():
            own, mine = self.waited.setdefault(tid, Waited()), tids == tid
            own.to_entry_ns += int(ns[mine].sum())
            own.to_entry_max_ns = max(own.to_entry_max_ns, int(ns[mine].max()))
            own.to_entry += np.bincount(buckets[mine], minlength=N_BUCKETS)

    def _attribute(self, waits: Waits, switches: Switches, end_ns: int) -> None:
        """Add what ran during each wait."""
        for cpu in distinct(waits.cpu).tolist():
            mine, here = waits.take(waits.cpu == cpu), switches.take(switches.cpu == cpu)
            wait, ran, ns = overlaps(mine, here, end_ns)
            pairs, which = np.unique(mine.tid[wait] << 32 | (ran + 1), return_inverse=True)
            which = which.reshape(-1)
            total = np.bincount(which, ns, len(pairs)).astype(np.int64)
            count = np.bincount(which, minlength=len(pairs))
            longest = np.zeros(len(pairs), np.int64)
            np.maximum.at(longest, which, ns)
            rows = (pairs.tolist(), total.tolist(), count.tolist(), longest.tolist())
            for pair, own_ns, times, most in zip(*rows, strict=True):
                one = self.stolen.setdefault((pair >> 32, (pair & 0xFFFFFFFF) - 1), Stolen())
                one.ns += own_ns
                one.count += times
                one.longest_ns = max(one.longest_ns, most)
            self._name(distinct(ran), switches)

    def _name(self, ran: Ints, switches: Switches) -> None:
        for tid in ran[ran > 0].tolist():
            at = np.flatnonzero(switches.next == tid)
            if len(at):
                self.comms[tid] = _text(switches.comm[at[-1]])

    def _keep(self, switches: Switches, moves: Moves) -> None:
        """Keep what a wait that is under way may need: the latest of each thread, the switches since it began."""
        last = np.flatnonzero(np.append(moves.tid[1:] != moves.tid[:-1], True)) if len(moves.tid) else np.empty(0, int)
        self._moves = moves.take(last)
        self._moves.order[:] = CARRIED
        waiting = self._moves.ts_ns[self._moves.what == AWAY_RUNNABLE].tolist() + list(self._accepted.values())
        first = min(waiting, default=np.iinfo(np.int64).max)
        keep = switches.ts_ns >= first
        for cpu in distinct(switches.cpu).tolist():  # and what ran on each CPU when the first of them began
            keep[np.flatnonzero((switches.cpu == cpu) & (switches.ts_ns < first))[-1:]] = True
        self._switches = switches.take(np.flatnonzero(keep)[-MOST_ROWS:])


def quantile_of(buckets: Ints, quantile: float) -> int:
    """Return a quantile of a histogram with at least one value: the middle of its bucket."""
    at = int(np.searchsorted(np.cumsum(buckets), quantile * int(buckets.sum())))
    return round(2 ** ((at + 0.5) / PER_OCTAVE))


def overlaps(waits: Waits, here: Switches, last_ns: int) -> tuple[NDArray[np.intp], Ints, Ints]:
    """Return (which wait, who ran, for how long) of every stretch of a CPU that lies within a wait.

    Parameters
    ----------
    here : the switches of the CPU; what lies before the first one is nobody's
    last_ns : up to when what ran last is known to run
    """
    starts = np.concatenate([[np.iinfo(np.int64).min], here.ts_ns])
    stops = np.append(here.ts_ns, max(last_ns, int(here.ts_ns[-1]) if len(here.ts_ns) else last_ns))
    joins = np.append(here.next[:-1] == here.prev[1:], np.ones(min(len(here.next), 1), bool))
    ran = np.concatenate([[NOBODY_KNOWS], np.where(joins, here.next, NOBODY_KNOWS)])
    first = np.searchsorted(starts, waits.begin_ns, "right") - 1
    stop = np.maximum(np.searchsorted(starts, waits.end_ns, "left"), first + 1)
    counts = stop - first
    wait = np.repeat(np.arange(len(counts)), counts)
    inner = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
    stretch = np.repeat(first, counts) + inner
    ns = np.minimum(stops[stretch], waits.end_ns[wait]) - np.maximum(starts[stretch], waits.begin_ns[wait])
    return wait, ran[stretch], np.maximum(ns, 0)


def _key(known: Ints, tid: Ints, order: Ints) -> Ints:
    """Return keys that sort by thread, then order."""
    return np.searchsorted(known, tid).astype(np.int64) << ORDER_BITS | order.astype(np.int64)


def _pairs(moves: Moves, what: int) -> NDArray[np.intp]:
    """Return the rows that leave a CPU so, and whose thread comes onto one in the next row."""
    same = moves.tid[:-1] == moves.tid[1:]
    return np.flatnonzero(same & (moves.what[:-1] == what) & (moves.what[1:] == IN))


def _sums(tids: Ints, ns: Ints) -> list[tuple[int, int, int]]:
    """Return (tid, sum, count) of each thread."""
    threads, which = np.unique(tids, return_inverse=True)
    which = which.reshape(-1)
    total = np.bincount(which, ns, len(threads)).astype(np.int64)
    count = np.bincount(which, minlength=len(threads))
    return list(zip(threads.tolist(), total.tolist(), count.tolist(), strict=True))


def _text(value: object) -> str:
    raw = value if isinstance(value, bytes) else str(value).encode()
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")
