"""Userspace exits: why KVM_RUN returned, and how long the VMM took until it called again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.kvm.userspace_exits import describe_userspace_exit
from kvmtrace.spans.keys import Counter
from kvmtrace.spans.lane_keys import ERRNO_NOT_TOLD, signed32, split_pair
from kvmtrace.spans.lanes import Step
from kvmtrace.spans.vmm_stays import find_userspace_stays
from kvmtrace.stats.durations import Samples, Summary
from kvmtrace.stats.rows import UserspaceExitRow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kvmtrace.spans.keys import KeyIndex
    from kvmtrace.spans.lanes import Lanes


class UserspaceAccumulator:
    """Collects userspace exits over consecutive pieces of lanes."""

    def __init__(self) -> None:
        self.count = Counter()
        self.samples = Samples()

    def feed(self, lanes: Lanes, chosen: NDArray[np.bool_] | None = None) -> None:
        """Take in the next piece, of it the rows chosen."""
        exits = lanes.step == Step.USERSPACE_EXIT
        if chosen is not None:
            exits &= chosen
        if not exits.any():
            return
        self.count.add(lanes.arg[exits & ~lanes.opening])
        stays = find_userspace_stays(lanes)
        sound = stays.sound if chosen is None else stays.sound & chosen[stays.left]
        self.samples.add(lanes.arg[stays.left[sound]], stays.dur_ns[sound])

    def finish(self, index: KeyIndex) -> tuple[UserspaceExitRow, ...]:
        """Return the rows by count, descending."""
        summaries = self.samples.summaries()
        rows = []
        for number, key in enumerate(index.keys()):
            if not self.count[number]:
                continue
            number_32, reason = split_pair(key)
            errno = None if number_32 == ERRNO_NOT_TOLD else signed32(number_32)
            summary = summaries.get(number, Summary())
            rows.append(
                UserspaceExitRow(
                    reason=reason,
                    name=describe_userspace_exit(reason, errno or 0),
                    errno=errno,
                    count=self.count[number],
                    **{name: value for name, value in vars(summary).items() if name != "rel_stderr"},
                )
            )
        return tuple(sorted(rows, key=lambda row: (-row.count, row.reason, row.errno or 0)))
