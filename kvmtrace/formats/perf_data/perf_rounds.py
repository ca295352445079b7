"""What perf's rounds promise of the time: no sample is older than the newest of the round before the last.

It holds for a sample's place in the file, however the file is cut into pieces.

Source: tools/perf/util/session.c, process_finished_round
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

NEVER = np.iinfo(np.int64).min


class Rounds:
    """The rounds read so far.

    Attributes
    ----------
    flush : int, ns; whatever follows in a sound file is not older
    """

    def __init__(self) -> None:
        self.flush = NEVER
        self._finished = self._newest = NEVER  # of the rounds that ended, of all that was read

    def take_in(self, ts_ns: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Take in the samples that follow in the file, and how many of them stand before each end of a round.

        Returns
        -------
        ndarray[int64], the samples that come too late: a sound file has none
        """
        limits = self._limits(ts_ns, ends)
        if not len(ts_ns):
            return np.empty(0, np.int64)
        first = np.concatenate([[0], ends])
        n_rows = np.diff(np.append(first, len(ts_ns)))
        held, first = np.flatnonzero(n_rows), first[n_rows > 0]
        if (np.minimum.reduceat(ts_ns, first) >= limits[held]).all():
            return np.empty(0, np.int64)
        return np.flatnonzero(ts_ns < np.repeat(limits, n_rows))

    def _limits(self, ts_ns: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how old a sample may be, of the round under way and of each that begins after an end."""
        newest = np.empty(len(ends) + 1, np.int64)
        first = 0
        for i, end in enumerate([*ends.tolist(), len(ts_ns)]):
            self._newest = int(ts_ns[first:end].max(initial=self._newest))
            newest[i], first = self._newest, end
        finished = np.concatenate([[self._finished], newest[:-1]])  # when each round began
        limits = np.concatenate([[self.flush], finished[:-1]])
        self.flush, self._finished = int(limits[-1]), int(finished[-1])
        return limits
