"""Make lanes from event tables."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace._native import lane_rows
from kvmtrace.isa.registry import run_functions
from kvmtrace.kvm.ioctls import KVM_RUN
from kvmtrace.spans.gaps import Gaps
from kvmtrace.spans.lane_keys import KEYED, LaneKeys, told, u64
from kvmtrace.spans.lanes import MARKS, NESTED_STEP_OF, REASON_BITS, Lanes, Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.spans.keys import KeyIndex
    from kvmtrace.table.event_table import EventTable

MAX_TID = 4 * 1024 * 1024  # PID_MAX_LIMIT, include/linux/threads.h
TASK_STATE_MASK = 0xFF  # prev_state without TASK_REPORT_MAX ("R+"), include/linux/sched.h
MMIO_READ, MMIO_WRITE = 1, 2  # KVM_TRACE_MMIO_*, include/trace/events/kvm.h
MAX_THREADS = 0xFFFF  # lanes number threads in 16 bits; more vCPU threads than that are a damaged file
# a thread that never reaches a point where it can be cut is cut anyway, so that memory stays bounded
MAX_HELD_ROWS = 1_000_000

_SIMPLE_STEPS = {
    "kvm_entry": Step.ENTRY,
    "kvm_exit": Step.EXIT,
    "kvm_userspace_exit": Step.USERSPACE_EXIT,
    "sys_exit_ioctl": Step.RETURN,
    **dict.fromkeys(run_functions(), Step.WRAP_IN),
    **dict.fromkeys(run_functions("_return"), Step.WRAP_OUT),
    "kvm_vcpu_wakeup": Step.WAKEUP,
    "kvm_pio": Step.PIO,
    "kvm_msr": Step.MSR,
    "kvm_cr": Step.CR,
    "kvm_hypercall": Step.HYPERCALL,
    "kvm_page_fault": Step.PAGE_FAULT,
    "kvm_guest_fault": Step.GUEST_FAULT,
    "kvm_hvc_arm64": Step.CALL,
    **NESTED_STEP_OF,
}
_MORE_STEPS = {"kvm_inj_virq": Step.INJECT, "kvm_inj_exception": Step.INJECT, "kvm_emulate_insn": Step.EMULATE}


_MARKED = np.zeros(256, bool)
_MARKED[list(MARKS)] = True


class Threads:
    """Dense numbers of the vCPU threads, in the order in which they turn out to be such."""

    def __init__(self) -> None:
        self.tids: list[int] = []
        self.by_tid = np.zeros(MAX_TID + 1, np.int32)  # from 1: what is never touched takes no memory

    def register(self, tids: NDArray[np.int32]) -> list[int]:
        """Make these threads vCPU threads; return the numbers of those that are new."""
        tids = tids[(tids > 0) & (tids <= MAX_TID)]
        tids = tids[self.by_tid[tids] == 0]
        if not len(tids):
            return []
        seen = np.zeros(int(tids.max()) + 1, bool)
        seen[tids] = True
        new = np.flatnonzero(seen)[: MAX_THREADS - len(self.tids)]
        numbers = range(len(self.tids), len(self.tids) + len(new))
        self.by_tid[new] = np.array(numbers, np.int32) + 1
        self.tids += new.tolist()
        return list(numbers)


class LaneBuilder:
    """Turns consecutive event tables into consecutive pieces of lanes.

    Parameters
    ----------
    rows : bool, lanes know their rows in the recording
    every_step : bool, injections and emulations are steps, too; always with `rows`
    """

    def __init__(self, *, rows: bool = False, every_step: bool = False) -> None:
        self.keys = LaneKeys()
        self.threads = Threads()
        self.gaps = Gaps()
        self.scheduling = False
        self._rows = rows
        self._every_step = rows or every_step
        self._n_seen = 0
        self._held = Lanes.empty(rows=rows)

    def feed(self, table: EventTable) -> Lanes:
        """Return the lanes that this table completes."""
        self.scheduling |= table.has("sched_switch")
        loss = self.gaps.feed(table)
        fresh, new = self._lanes(table, loss)
        self._n_seen += len(table)
        piece = self._emit(fresh, new)
        if self.gaps and len(self._held):
            self.gaps.forget_before(int(self._held.ts_ns.min()))
        return piece

    @property
    def held(self) -> Lanes:
        """The rows that wait for a later table."""
        return self._held

    def finish(self) -> Lanes:
        """Return what was held back."""
        held, self._held = self._held, Lanes.empty(rows=self._rows)
        return self._checked(held)

    def _steps(self, table: EventTable) -> NDArray[np.uint8]:
        """Return the Step of each event of the table, NONE for those that are no step; shape (n,)."""
        of_kind = np.zeros(len(table.kinds) + 1, np.uint8)
        for name, step in _SIMPLE_STEPS.items():
            if name in table.kind_index:
                of_kind[table.kind_index[name]] = step
        for name, step in _MORE_STEPS.items() if self._every_step else ():
            if name in table.kind_index:
                of_kind[table.kind_index[name]] = step
        steps: NDArray[np.uint8] = of_kind.take(table.kind)  # several times as fast as an index of 16 bits
        if table.has("kvm_mmio", "type"):
            kind = table.field("kvm_mmio", "type")
            read = np.where(kind == MMIO_READ, Step.MMIO_READ, Step.NONE)
            steps[table.rows("kvm_mmio")] = np.where(kind == MMIO_WRITE, Step.MMIO_WRITE, read)
        self._conditional_steps(table, steps)
        return steps

    @staticmethod
    def _conditional_steps(table: EventTable, steps: NDArray[np.uint8]) -> None:
        """Fill in the steps that depend on a field."""
        if table.has("kvm_fpu", "load"):
            load = table.field("kvm_fpu", "load") != 0
            steps[table.rows("kvm_fpu")] = np.where(load, Step.FPU_LOAD, Step.NONE)
        for name in ("sys_enter_ioctl", "kvm_vcpu_ioctl"):
            if table.has(name, "cmd"):
                run = table.field(name, "cmd").astype(np.uint64) & np.uint64(0xFFFFFFFF) == KVM_RUN
                steps[table.rows(name)] = np.where(run, Step.RUN, Step.NONE)
        if table.has("kvm_handle_sys_reg", "register"):
            steps[table.rows("kvm_handle_sys_reg")] = Step.REGISTER
        if table.has("sched_switch", "prev_state"):
            runnable = table.field("sched_switch", "prev_state").astype(np.int64) & TASK_STATE_MASK == 0
            steps[table.rows("sched_switch")] = np.where(runnable, Step.PREEMPT, Step.BLOCK)

    def _lanes(self, table: EventTable, loss: NDArray[np.int32]) -> tuple[Lanes, set[int]]:
        """Return the table's steps of vCPU threads, in the order of recording, and the threads that are new."""
        switches = np.empty(0, np.int32)
        if table.has("sched_switch", "next_pid"):
            switches = table.field("sched_switch", "next_pid").astype(np.int32)
        source = lane_rows.LaneSource(
            table.tid,
            table.kind,
            self._steps(table),
            table.ts_ns,
            self._args(table),
            table.cpu,
            loss,
            switches,
            table.kind_index.get("sched_switch", -1),
            self._n_seen,
        )
        n, n_new = lane_rows.count_lane_rows(source, self.threads.by_tid, MARKS)
        new = set(self.threads.register(table.tid[_MARKED[source.step]])) if n_new else set()
        if new:
            n, _ = lane_rows.count_lane_rows(source, self.threads.by_tid, MARKS)
        made = lane_rows.fill_lane_rows(source, self.threads.by_tid, n, Step.RESUME, rows=self._rows)
        flags = np.zeros(n, bool)
        row = made.row if self._rows else None
        return Lanes(made.thread, made.step, made.ts_ns, made.arg, made.cpu, made.loss, flags, flags, row), new

    def _args(self, table: EventTable) -> NDArray[np.int64]:
        """Return the argument of each step (see Step), 0 where it has none; shape (n,)."""
        arg = np.zeros(len(table), np.int64)
        for event, (member, keys) in KEYED.items():
            wanted = self._every_step or event not in _MORE_STEPS
            if table.count(event) and wanted:
                index: KeyIndex = getattr(self.keys, member)
                arg[table.rows(event)] = index.encode(keys(table))
        if table.count("kvm_exit"):
            rips = self.keys.rips.encode(told(table, "kvm_exit", "guest_rip")).astype(np.int64)
            arg[table.rows("kvm_exit")] |= rips << REASON_BITS
        if table.has("kvm_vcpu_wakeup", "ns"):
            ns = np.minimum(u64(table, "kvm_vcpu_wakeup", "ns"), np.uint64(1 << 60)).astype(np.int64)
            waited = u64(table, "kvm_vcpu_wakeup", "waited").astype(np.int64) & 1
            arg[table.rows("kvm_vcpu_wakeup")] = ns * 2 + waited
        return arg

    def _emit(self, fresh: Lanes, new: set[int]) -> Lanes:
        """Append to what is held; cut each thread behind the last row that nothing can change any more."""
        rows = Lanes.concat([self._held, fresh]) if len(self._held) else fresh
        order = _by_thread(rows.thread)
        if order is None:
            step, thread = rows.step, rows.thread
        else:
            step, thread = rows.step[order], rows.thread[order]
        n = len(rows)
        emitted, held = np.zeros(n, bool), np.zeros(n, bool)
        bounds = np.concatenate([[0], np.flatnonzero(thread[1:] != thread[:-1]) + 1, [n]])
        for first, stop in itertools.pairwise(bounds.tolist()):
            if first == stop:
                continue
            # what a thread did before it was a vCPU does not count
            start = first + (int(np.argmax(_MARKED[step[first:stop]])) if int(thread[first]) in new else 0)
            cut = start + _cut(step[start:stop])
            emitted[start : cut + 1] = cut > start
            held[cut:stop] = True
        piece, rest = _taken(rows, order, emitted), _taken(rows, order, held)
        is_first = np.ones(len(rest), bool)
        is_first[1:] = ~rest.same_thread()
        was_emitted = emitted[held]
        self._held = replace(rest, opening=rest.opening | (is_first & was_emitted))
        return self._checked(piece)

    def _checked(self, piece: Lanes) -> Lanes:
        """Return the piece with its column `suspect`."""
        if len(piece) < 2 or not self.gaps:
            return replace(piece, suspect=np.zeros(len(piece), bool))
        away = (piece.step[:-1] == Step.BLOCK) | (piece.step[:-1] == Step.PREEMPT)
        hidden = self.gaps.hide(piece.ts_ns, piece.cpu, piece.loss, away if self.scheduling else np.ones_like(away))
        return replace(piece, suspect=np.append(hidden & piece.same_thread(), False))


def _by_thread(thread: NDArray[np.uint16]) -> NDArray[np.intp] | None:
    """Return the stable order by thread, None if the rows already are in it."""
    if (thread[:-1] <= thread[1:]).all():
        return None
    return np.argsort(thread, kind="stable")  # radix sort: uint16


def _taken(rows: Lanes, order: NDArray[np.intp] | None, wanted: NDArray[np.bool_]) -> Lanes:
    """Return the wanted rows (a mask over the ordered rows), without copying where they are one stretch."""
    positions = np.flatnonzero(wanted)
    if order is not None:
        return rows.take(order[positions])
    if len(positions) and positions[-1] - positions[0] + 1 == len(positions):
        return rows.take(slice(int(positions[0]), int(positions[-1]) + 1))
    return rows.take(positions)


def _cut(step: NDArray[np.uint8]) -> int:
    """Return the position in one thread's rows up to which nothing can change any more (0: nowhere)."""
    entries = np.flatnonzero(step == Step.ENTRY)
    if len(entries):
        cut = int(entries[-1])
    elif (step == Step.EXIT).any():
        cut = 0
    else:
        marks = np.flatnonzero((step == Step.USERSPACE_EXIT) | (step == Step.RUN))
        cut = int(marks[-1]) if len(marks) else 0
    return cut if len(step) - cut <= MAX_HELD_ROWS else len(step) - 1
