"""Where what one may search for is in a long recording: the first few VM-exits of each reason, RIP and follow-up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.report.over_time import Place

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.report.stretches import Stretches
    from kvmtrace.spans.doings import DoingsCollector

FIRST = 8  # places of each
MOST = 2_000  # RIPs and follow-ups, the most frequent ones


class _FirstOnes:
    """Keeps the first few places of each key of consecutive, ascending pieces of one lane after the other."""

    def __init__(self) -> None:
        self._total = np.zeros(64, np.int64)
        self._places: dict[int, list[tuple[int, int]]] = {}

    def feed(self, lane: int, keys: NDArray[np.int64], ts_ns: NDArray[np.int64]) -> None:
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        rank = np.arange(len(ordered)) - np.repeat(begins, np.diff(np.append(begins, len(ordered))))
        for i in np.flatnonzero(rank < FIRST).tolist():
            self._places.setdefault(int(ordered[i]), []).append((int(ts_ns[order[i]]), lane))
        counts = np.bincount(keys)
        if len(counts) > len(self._total):
            self._total = np.pad(self._total, (0, len(counts) * 2 - len(self._total)))
        self._total[: len(counts)] += counts

    def most(self, limit: int | None) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """Return (key, how many, places in time order), the most frequent ones."""
        ranked = sorted(self._places, key=lambda key: (-int(self._total[key]), key))[:limit]
        return [(key, int(self._total[key]), sorted(self._places[key])[:FIRST]) for key in ranked]


def find_places(doings: DoingsCollector, stretches: Stretches) -> tuple[Place, ...]:
    """Return where reasons, RIPs and follow-ups are."""
    reasons, rips, keys = _FirstOnes(), _FirstOnes(), _FirstOnes()
    for lane, thread in enumerate(stretches.threads):
        for run, first, stop in doings.segments.runs(thread):
            rows: NDArray[Any] = doings.segments.rows(run, first, stop)
            exits = rows[rows["rip"] >= 0]
            at = exits["ts_ns"]
            told = exits["reason"] >= 0
            reasons.feed(lane, exits["reason"][told].astype(np.int64), at[told])
            rips.feed(lane, exits["rip"].astype(np.int64), at)
        for run, first, stop in doings.events.runs(thread):
            events = doings.events.rows(run, first, stop)
            keys.feed(lane, stretches.indices(events), events["ts_ns"])
    made = [_place("reason", *one) for one in reasons.most(None)]
    made += [_place("rip", stretches.rip(key), total, where) for key, total, where in rips.most(MOST)]
    return (*made, *(_place("key", *one) for one in keys.most(MOST)))


def _place(what: str, number: int, total: int, where: list[tuple[int, int]]) -> Place:
    return Place(what, number, total, tuple(lane for _, lane in where), tuple(ts_ns for ts_ns, _ in where))
