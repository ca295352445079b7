"""Nested guests: what the exits of L2 cost as L2 sees them, and which exits of L1 they caused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.isa.registry import describe_exit_reason, isa_name
from kvmtrace.kvm.nested_events import L1
from kvmtrace.spans.keys import Counter
from kvmtrace.spans.lane_keys import split_pair
from kvmtrace.spans.lanes import Step
from kvmtrace.spans.nested_chains import NestedChains
from kvmtrace.spans.time_parts import Part
from kvmtrace.stats.rows import NestedBudget, NestedExitRow, NestedVcpu, ReflectedWorkRow

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvmtrace.spans.lane_keys import LaneKeys
    from kvmtrace.spans.span_builder import Spans
    from kvmtrace.stats.rows import VcpuRow

_SUMS = ("l1_exits", "dur_ns", "l0_ns", "l1_guest_ns", "userspace_ns", "waiting_ns", "preempted_ns", "unknown_ns")


class NestedAccumulator:
    """Collects what consecutive pieces of spans tell of nested guests; nothing where there are none."""

    def __init__(self) -> None:
        self._chains = NestedChains()
        self._l2_guest = Counter()  # per thread
        self._entries = Counter()
        self._failed = Counter()
        self._any = False
        self._rows: dict[tuple[int, int, bool], list[int]] = {}  # (thread, reason, reflected) -> count, samples, ...
        self._l1: dict[tuple[int, int], list[int]] = {}  # (thread, reason) of L1's exits in chains -> count, ns

    def feed(self, spans: Spans) -> None:
        """Take in the next piece."""
        if not spans.nested:
            return
        self._any = True
        lanes, swept = spans.lanes, spans.swept
        thread = lanes.thread.astype(np.int32)
        guest = np.flatnonzero((swept.part == Part.GUEST) & spans.in_l2)
        self._l2_guest.add(thread[guest], swept.dur_ns[guest])
        self._entries.add(thread[lanes.step == Step.NESTED_ENTRY])
        self._failed.add(thread[lanes.step == Step.NESTED_FAILED])
        piece = self._chains.feed(spans)
        self._add(piece.ended)
        self._add_l1(spans, piece.within)

    def _add(self, chains: NDArray[Any]) -> None:
        """Add chains to their rows; times are of those whose end was seen."""
        for thread, reason, reflected in sorted(set(chains[["thread", "reason", "reflected"]].tolist())):
            mine = (chains["thread"] == thread) & (chains["reason"] == reason) & (chains["reflected"] == reflected)
            whole = chains[mine & chains["complete"]]
            row = self._rows.setdefault((thread, reason, bool(reflected)), [0] * (3 + len(_SUMS)))
            row[0] += int(np.count_nonzero(mine))
            row[1] += len(whole)
            row[2] = max(row[2], int(whole["dur_ns"].max(initial=0)))
            for i, name in enumerate(_SUMS, 3):
                row[i] += int(whole[name].sum())

    def _add_l1(self, spans: Spans, within: NDArray[np.bool_]) -> None:
        """Add the exits that L1 took while L2 waited."""
        lanes, pairs = spans.lanes, spans.pairs
        own = np.flatnonzero(pairs.is_exit & (spans.levels == L1) & within[pairs.edges])
        if not len(own):
            return
        timed = np.append(pairs.handling & pairs.sound, False)[own]
        ns = np.where(timed, np.append(pairs.dur_ns, 0)[own], 0)
        key = lanes.thread[pairs.edges[own]].astype(np.int64) << 32 | pairs.reasons[own]
        for one in np.unique(key).tolist():
            row = self._l1.setdefault((one >> 32, one & 0xFFFFFFFF), [0, 0])
            row[0] += int(np.count_nonzero(key == one))
            row[1] += int(ns[key == one].sum())

    def finish(self, keys: LaneKeys, tids: Sequence[int], vcpus: Sequence[VcpuRow]) -> tuple[NestedVcpu, ...] | None:
        """Return a row per vCPU that ran a nested guest, in the order of `vcpus`; None if none did."""
        if not self._any:
            return None
        self._add(self._chains.finish())
        reasons = [split_pair(key) for key in keys.reasons.keys()]  # noqa: SIM118
        number = {tid: i for i, tid in enumerate(tids)}
        made = (self._vcpu(row, number[row.tid], reasons) for row in vcpus if row.tid in number)
        return tuple(row for row in made if row.l2_exits or row.entries or row.failed_entries) or None

    def _vcpu(self, vcpu: VcpuRow, thread: int, reasons: list[tuple[int, int]]) -> NestedVcpu:
        exits = [self._exit_row(key, row, reasons) for key, row in self._rows.items() if key[0] == thread]
        l1_rows = [_work_row(reasons[key[1]], row) for key, row in self._l1.items() if key[0] == thread]
        l2_exits = sum(row.count for row in exits)
        budget, l2_ns = vcpu.budget, self._l2_guest[thread]
        return NestedVcpu(
            tid=vcpu.tid,
            vcpu_id=vcpu.vcpu_id,
            entries=self._entries[thread],
            failed_entries=self._failed[thread],
            l1_exits=vcpu.exits - l2_exits,
            l2_exits=l2_exits,
            reflected=sum(row.count for row in exits if row.reflected),
            wall_ns=vcpu.wall_ns,
            budget=NestedBudget(
                l2_guest_ns=l2_ns,
                l1_guest_ns=(budget.guest_ns or 0) - l2_ns,
                l0_ns=(budget.entry_exit_ns or 0) + budget.handler_ns,
                userspace_ns=budget.userspace_ns,
                waiting_ns=_sum(budget.blocked_ns, budget.halt_poll_ns),
                preempted_ns=budget.preempted_ns,
                unknown_ns=budget.unknown_ns,
            ),
            exits=tuple(sorted(exits, key=lambda row: (-(row.total_ns or 0), -row.count, row.exit_reason))),
            l1_work=tuple(sorted(l1_rows, key=lambda row: (-row.count, row.exit_reason))),
        )

    @staticmethod
    def _exit_row(key: tuple[int, int, bool], row: list[int], reasons: list[tuple[int, int]]) -> NestedExitRow:
        isa, exit_reason = reasons[key[1]]
        count, samples, longest, *sums = row
        values: dict[str, Any] = dict(zip(_SUMS, sums if samples else [None] * len(_SUMS), strict=True))
        return NestedExitRow(
            isa=isa_name(isa),
            exit_reason=exit_reason,
            name=describe_exit_reason(isa, exit_reason),
            reflected=key[2],
            count=count,
            samples=samples,
            total_ns=values.pop("dur_ns"),
            max_ns=longest if samples else None,
            **values,
        )


def _work_row(reason: tuple[int, int], row: list[int]) -> ReflectedWorkRow:
    return ReflectedWorkRow(isa_name(reason[0]), reason[1], describe_exit_reason(*reason), row[0], row[1])


def _sum(*values: int | None) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
