"""VM-exits that one would look at first: the first of each reason and the slowest, found while the recording passes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.spans.lanes import REASON_BITS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.spans.span_builder import Spans

SLOWEST = 4  # of each reason


@dataclass(frozen=True)
class Candidate:
    """A VM-exit with its paired VM-entry; `reason` and `rip` are numbers of LaneKeys."""

    ts_ns: int
    dur_ns: int
    thread: int
    reason: int
    rip: int


class ChosenExits:
    """Chooses VM-exits of consecutive pieces of spans."""

    def __init__(self) -> None:
        self._first: dict[int, Candidate] = {}
        self._slowest: dict[int, list[Candidate]] = {}

    def feed(self, spans: Spans) -> None:
        """Take in the next piece."""
        pairs, lanes = spans.pairs, spans.lanes
        handled = np.flatnonzero(pairs.handling & pairs.sound)
        rows, reason, dur_ns = pairs.edges[handled], pairs.reasons[handled], pairs.dur_ns[handled]
        if not len(rows):
            return
        # one after the other by reason: the earliest first, then the slowest
        for own in _by_reason(reason):
            number = int(reason[own[0]])
            first = own[np.argmin(lanes.ts_ns[rows[own]])]
            order = own[np.lexsort((lanes.ts_ns[rows[own]], -dur_ns[own]))[:SLOWEST]]
            made = [
                Candidate(
                    int(lanes.ts_ns[rows[i]]), int(dur_ns[i]), int(lanes.thread[rows[i]]), number,
                    int(lanes.arg[rows[i]]) >> REASON_BITS,
                )
                for i in (first, *order)
            ]  # fmt: skip
            known = self._first.get(number)
            self._first[number] = min(made[0], known or made[0], key=lambda one: (one.ts_ns, one.thread))
            kept = self._slowest.get(number, []) + made[1:]
            self._slowest[number] = sorted(kept, key=lambda one: (-one.dur_ns, one.ts_ns, one.thread))[:SLOWEST]

    def chosen(self) -> list[tuple[Candidate, str]]:
        """Return the VM-exits with why each was chosen, slowest first."""
        found: dict[Candidate, str] = {}
        for number, first in self._first.items():
            found.setdefault(first, "first of its reason")
            for rank, slow in enumerate(self._slowest[number]):
                found.setdefault(slow, "slowest of its reason" if rank == 0 else "slow")
        return sorted(found.items(), key=lambda item: (-item[0].dur_ns, item[0].ts_ns))


def _by_reason(reason: NDArray[np.int64]) -> Iterator[NDArray[np.intp]]:
    """Yield the positions of each reason."""
    order = np.argsort(reason, kind="stable")
    bounds = np.flatnonzero(np.diff(reason[order])) + 1
    yield from np.split(order, bounds)
