"""The next moment that words name, anywhere in a recording: as the page's own search, without its limits."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.render.html.timeline_data import describe_follow_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvmtrace.report.over_time import Timeline
    from kvmtrace.report.stretches import Stretches


class Finder:
    """Finds moments in a recording.

    Parameters
    ----------
    timeline, stretches : of the recording
    """

    def __init__(self, timeline: Timeline, stretches: Stretches) -> None:
        self._stretches = stretches
        self._reasons = timeline.reasons
        self._rips = [f"{rip:#x}" for rip in stretches.rips()]
        self._keys = [describe_follow_up(one) for one in timeline.follow_ups]

    def next(self, words: str, after_ns: int) -> dict[str, int] | None:
        """Return the first VM-exit behind a moment that words name: what they name, its lane, begin and length.

        Behind the last one it is the first of all; None if there is none.
        """
        is_number = words.isascii() and words.isdigit()
        for since in (after_ns + 2, 0):
            found = self._numbered(int(words), since) if is_number else self._named(words, since)
            if found:
                at, begin, dur_ns, lane = min(found)
                return {"lane": lane, "at": at, "begin": begin, "dur": dur_ns, "total": 1, "listed": 1}
        return None

    def _numbered(self, number: int, since_ns: int) -> list[tuple[int, int, int, int]]:
        lanes = range(len(self._stretches.threads))
        found = [(*place, lane) for lane in lanes if (place := self._stretches.numbered(lane, number))]
        return [place for place in found if place[0] >= since_ns]

    def _named(self, words: str, since_ns: int) -> list[tuple[int, int, int, int]]:
        masks = [matching(words, names) for names in (self._reasons, self._rips, self._keys)]
        if not any(mask.any() for mask in masks):
            return []
        lanes = range(len(self._stretches.threads))
        return [(*place, lane) for lane in lanes if (place := self._stretches.next_place(lane, since_ns, *masks))]


def matching(words: str, names: Sequence[str]) -> NDArray[np.bool_]:
    """Say which names words mean; a number in hexadecimal is meant as a whole, if there is such a one.

    The page's script has the same (timeline_data.js).
    """
    wanted = words.strip().lower()
    lower = [name.lower() for name in names]
    if wanted.startswith("0x"):
        whole = np.array([wanted in re.split(r"[^0-9a-z_]+", name) for name in lower], bool)
        if whole.any():
            return whole
    return np.array([wanted in name for name in lower], bool)
