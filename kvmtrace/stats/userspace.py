"""Userspace exits: why KVM_RUN returned, and how long the VMM took until it called again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.kvm.userspace_exits import describe_userspace_exit
from kvmtrace.spans.keys import Counter
from kvmtrace.spans.lane_keys import signed32, split_pair
from kvmtrace.spans.lanes import Step
from kvmtrace.stats.durations import Samples, Summary
from kvmtrace.stats.rows import UserspaceExitRow
from kvmtrace.table.distinct import among

if TYPE_CHECKING:
    from kvmtrace.spans.keys import KeyIndex
    from kvmtrace.spans.lanes import Lanes

_INSIDE_KVM_RUN = (Step.RUN, Step.FPU_LOAD, Step.ENTRY, Step.EXIT)


class UserspaceAccumulator:
    """Collects userspace exits over consecutive pieces of lanes.

    The time runs from the ioctl's return (kvm_userspace_exit where returns were not recorded) to the first
    sign of the next KVM_RUN: sys_enter_ioctl, the kvm_vcpu_ioctl probe, kvm_fpu load or kvm_entry, whichever
    was recorded.
    """

    def __init__(self) -> None:
        self.count = Counter()
        self.samples = Samples()

    def feed(self, lanes: Lanes) -> None:
        """Take in the next piece."""
        exits = lanes.step == Step.USERSPACE_EXIT
        if not exits.any():
            return
        self.count.add(lanes.arg[exits & ~lanes.opening])
        called = among(lanes.step, _INSIDE_KVM_RUN)
        rows = np.flatnonzero(exits | called)
        closes = exits[rows[:-1]] & called[rows[1:]] & (lanes.thread[rows[:-1]] == lanes.thread[rows[1:]])
        left, again = rows[:-1][closes], rows[1:][closes]
        begin = lanes.ts_ns[left]
        returned = lanes.step[np.minimum(left + 1, len(lanes) - 1)] == Step.RETURN
        begin = np.where(returned, lanes.ts_ns[np.minimum(left + 1, len(lanes) - 1)], begin)
        dur_ns = lanes.ts_ns[again] - begin
        n_suspect = np.concatenate([[0], np.cumsum(lanes.suspect)])
        sound = (dur_ns >= 0) & (n_suspect[again] == n_suspect[left])
        self.samples.add(lanes.arg[left[sound]], dur_ns[sound])

    def finish(self, index: KeyIndex) -> tuple[UserspaceExitRow, ...]:
        """Return the rows by count, descending."""
        summaries = self.samples.summaries()
        rows = []
        for number, key in enumerate(index.keys()):
            if not self.count[number]:
                continue
            errno, reason = split_pair(key)
            summary = summaries.get(number, Summary())
            rows.append(
                UserspaceExitRow(
                    reason=reason,
                    name=describe_userspace_exit(reason, signed32(errno)),
                    errno=signed32(errno),
                    count=self.count[number],
                    **{name: value for name, value in vars(summary).items() if name != "rel_stderr"},
                )
            )
        return tuple(sorted(rows, key=lambda row: (-row.count, row.reason, row.errno)))
