"""Count, sum, sum of squares and extremes of durations per group, exact to the last digit, so that parts add up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HALF = 32  # bits
_LOW = np.int64((1 << _HALF) - 1)
_LARGEST = 1 << 31  # ns; squares of shorter ones fit int64


@dataclass
class ExactSum:
    """What is known of the durations of one group; integers of any size.

    Parameters
    ----------
    squares_ns2 : sum of squares
    """

    samples: int = 0
    total_ns: int = 0
    squares_ns2: int = 0
    min_ns: int | None = None
    max_ns: int | None = None

    def add(self, other: ExactSum) -> None:
        """Add the durations of another."""
        self.samples += other.samples
        self.total_ns += other.total_ns
        self.squares_ns2 += other.squares_ns2
        if other.min_ns is not None and other.max_ns is not None:
            self.min_ns = other.min_ns if self.min_ns is None else min(self.min_ns, other.min_ns)
            self.max_ns = other.max_ns if self.max_ns is None else max(self.max_ns, other.max_ns)


class ExactSums:
    """Durations by dense group number; fed in pieces of at most some hundred thousand."""

    def __init__(self) -> None:
        self._sums: dict[int, ExactSum] = {}

    def add(self, groups: NDArray[Any], dur_ns: NDArray[np.int64]) -> None:
        """Add durations, none of them negative."""
        if not len(groups):
            return
        order = np.argsort(groups, kind="stable")
        group, dur = groups[order], dur_ns[order]
        first = np.flatnonzero(np.diff(group, prepend=group[0] - 1))
        count = np.diff(np.append(first, len(group)))
        small = np.where(dur < _LARGEST, dur, 0)
        squares = small * small
        # two halves, whose sums stay far below 2**63
        low = np.add.reduceat(squares & _LOW, first)
        high = np.add.reduceat(squares >> _HALF, first)
        total = [np.add.reduceat(part, first) for part in (dur & _LOW, dur >> _HALF)]
        least, most = np.minimum.reduceat(dur, first), np.maximum.reduceat(dur, first)
        for i, number in enumerate(group[first].tolist()):
            large = dur[first[i] : first[i] + count[i]]
            rest = sum(value * value for value in large[large >= _LARGEST].tolist()) if most[i] >= _LARGEST else 0
            self._sums.setdefault(int(number), ExactSum()).add(
                ExactSum(
                    samples=int(count[i]),
                    total_ns=(int(total[1][i]) << _HALF) + int(total[0][i]),
                    squares_ns2=(int(high[i]) << _HALF) + int(low[i]) + rest,
                    min_ns=int(least[i]),
                    max_ns=int(most[i]),
                )
            )

    def __getitem__(self, group: int) -> ExactSum:
        return self._sums.get(group, ExactSum())
