"""VM-exits per vCPU thread and exit reason, in numbers that add up exactly over recordings."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.spans.keys import Counter, KeyIndex
from kvmtrace.spans.lane_keys import split_pair
from kvmtrace.spans.lanes import REASON_BITS, REASON_MASK, Step
from kvmtrace.spans.time_parts import ReasonSplit
from kvmtrace.stats.exact_sums import ExactSum, ExactSums
from kvmtrace.stats.exponential_histogram import Histograms

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.spans.span_builder import Spans


@dataclass(frozen=True)
class VcpuExits:
    """All VM-exits of one reason, of one level of guest, on one thread.

    Parameters
    ----------
    level : 1 (a guest of KVM's own) or 2 (a guest's guest); None where not every VM-exit tells (kvm_nested_vmexit)
    isa, exit_reason : numbers as kvm_exit carries them
    count : kvm_exit events
    durations : of completed exit→entry pairs
    to_userspace : exits that left to userspace before the next entry
    guest_before_ns : guest mode that ended with such an exit
    kernel_ns, userspace_ns, waiting_ns, preempted_ns, unknown_ns : parts of the durations' sum
    histogram : bucket -> pairs, see stats/exponential_histogram.py
    """

    tid: int
    level: int | None
    isa: int
    exit_reason: int
    count: int
    durations: ExactSum
    to_userspace: int
    guest_before_ns: int
    kernel_ns: int
    userspace_ns: int
    waiting_ns: int
    preempted_ns: int
    unknown_ns: int
    histogram: dict[int, int]


class VcpuExitStatistic:
    """Collects VcpuExits over the pieces of a recording's spans."""

    def __init__(self) -> None:
        self._groups = KeyIndex()  # (thread * 3 + level) << REASON_BITS | reason
        self._count = Counter()
        self._to_userspace = Counter()
        self._guest = Counter()
        self._sums = ExactSums()
        self._histograms = Histograms()
        self._split = ReasonSplit()
        self._latest: Spans | None = None

    def take(self, spans: Spans) -> None:
        """Take in the next piece."""
        self._latest = spans
        pairs = spans.pairs
        thread = spans.lanes.thread[pairs.edges].astype(np.int64)
        group = np.full(len(pairs.edges), -1, np.int64)
        is_exit = pairs.is_exit
        level = spans.levels[is_exit].astype(np.int64) if spans.levels_told else 0
        group[is_exit] = self._groups.encode((thread[is_exit] * 3 + level) << REASON_BITS | pairs.reasons[is_exit])
        self._count.add(group[is_exit])
        handled = pairs.handling & pairs.sound
        self._sums.add(group[:-1][handled], pairs.dur_ns[handled])
        self._histograms.add(group[:-1][handled], pairs.dur_ns[handled])
        in_guest = pairs.guest & pairs.sound
        self._guest.add(group[1:][in_guest], pairs.dur_ns[in_guest])
        self._split.feed(spans.lanes, replace(pairs, reasons=group), spans.swept, spans.moves)
        self._take_userspace(spans, group)

    def _take_userspace(self, spans: Spans, group: NDArray[np.int64]) -> None:
        """Count the exits with a userspace exit before the thread's next entry or exit, each once."""
        lanes, pairs = spans.lanes, spans.pairs
        owner = pairs.owner[np.flatnonzero((lanes.step == Step.USERSPACE_EXIT) & ~lanes.opening)]
        owner = owner[owner >= 0]
        owner = np.unique(owner[lanes.step[owner] == Step.EXIT])
        self._to_userspace.add(group[np.searchsorted(pairs.edges, owner)])

    def rows(self) -> tuple[VcpuExits, ...]:
        """Return what was counted, by thread and reason."""
        if self._latest is None:
            return ()
        reasons, tids = self._latest.keys.reasons.keys(), self._latest.tids
        histograms = self._histograms.finish()
        rows = []
        for number, key in enumerate(self._groups.keys()):
            isa, exit_reason = split_pair(reasons[key & REASON_MASK])
            thread, level = divmod(key >> REASON_BITS, 3)
            rows.append(
                VcpuExits(
                    tid=tids[thread],
                    level=level or None,
                    isa=isa,
                    exit_reason=exit_reason,
                    count=self._count[number],
                    durations=self._sums[number],
                    to_userspace=self._to_userspace[number],
                    guest_before_ns=self._guest[number],
                    **self._split.of(number),
                    histogram=histograms.get(number, {}),
                )
            )
        return tuple(sorted(rows, key=lambda row: (row.tid, row.level or 0, row.isa, row.exit_reason)))
