"""VM-exits by reason: counts, exact time quantiles, and how many left to userspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native.edges import sum_exits
from kvmtrace.isa.registry import describe_exit_reason, isa_name
from kvmtrace.spans.keys import SUM_LIMIT, Counter
from kvmtrace.spans.lane_keys import split_pair
from kvmtrace.spans.lanes import Step
from kvmtrace.spans.time_parts import EXIT_PARTS
from kvmtrace.stats.durations import Samples, Summary
from kvmtrace.stats.rows import ExitRow

if TYPE_CHECKING:
    from kvmtrace.spans.keys import KeyIndex
    from kvmtrace.spans.lanes import Lanes
    from kvmtrace.spans.pairs import Pairs
    from kvmtrace.spans.time_parts import ReasonSplit


class ExitAccumulator:
    """Collects VM-exits over consecutive pieces of lanes; groups are numbers of `LaneKeys.reasons`."""

    def __init__(self) -> None:
        self.count = Counter()
        self.to_userspace = Counter()
        self.guest_before_ns = Counter()
        self.samples = Samples()
        self.discarded = 0

    def feed(self, lanes: Lanes, pairs: Pairs) -> None:
        """Take in the next piece and its pairs."""
        n_reasons = int(pairs.reasons.max(initial=0)) + 1
        count, guest_ns = self.count.room(n_reasons), self.guest_before_ns.room(n_reasons)
        reasons, dur_ns, discarded = sum_exits(pairs, count, guest_ns, SUM_LIMIT)
        self.discarded += discarded
        self.samples.add(reasons, dur_ns)
        self._feed_userspace(lanes, pairs)

    def _feed_userspace(self, lanes: Lanes, pairs: Pairs) -> None:
        """Count the exits with a userspace exit before the thread's next entry or exit."""
        left = lanes.step == Step.USERSPACE_EXIT
        if not left.any():
            return
        owner = pairs.owner[left & ~lanes.opening]
        owner = owner[owner >= 0]
        owner = owner[lanes.step[owner] == Step.EXIT]
        # an exit may leave several times before the next entry: it counts once
        owner = owner[np.append(True, owner[1:] != owner[:-1])] if len(owner) else owner
        self.to_userspace.add(lanes.reasons(owner))

    def finish(
        self, reasons: KeyIndex, split: ReasonSplit | None, told: frozenset[str], *, userspace: bool
    ) -> tuple[ExitRow, ...]:
        """Return the rows by total time, descending.

        Parameters
        ----------
        split : where the time of each reason went, if it was computed
        told : the names of EXIT_PARTS that the capture shows; the others are null
        userspace : bool, kvm_userspace_exit was recorded
        """
        summaries = self.samples.summaries()
        rows = []
        for number, key in enumerate(reasons.keys()):
            if not self.count[number]:
                continue
            isa, exit_reason = split_pair(key)
            summary = summaries.get(number, Summary())
            parts = split.of(number) if split and summary.samples else {}
            known: dict[str, Any] = {name: parts.get(name) if name in told else None for name in EXIT_PARTS}
            rows.append(
                ExitRow(
                    isa=isa_name(isa),
                    exit_reason=exit_reason,
                    name=describe_exit_reason(isa, exit_reason),
                    count=self.count[number],
                    to_userspace=self.to_userspace[number] if userspace else None,
                    guest_before_ns=self.guest_before_ns[number],
                    **known,
                    **vars(summary),
                )
            )
        return tuple(sorted(rows, key=lambda row: (-(row.total_ns or 0), -row.count, row.exit_reason)))
