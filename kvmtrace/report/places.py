"""Where what one may search for is in a long recording: each reason, RIP and follow-up.

Of what occurs a few times, the times; of what occurs more often the first few times, and then in which short stretches
("cells") it does: all of them, so that a search reaches every place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.report.over_time import Place, Places

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.report.stretches import Stretches
    from kvmtrace.spans.doings import DoingsCollector

FIRST = 8  # times of each
MOST = 10_000  # RIPs and follow-ups, the most frequent ones
CELLS = 1 << 13  # of the whole recording; fewer where MOST_CELLS would not hold them
MOST_CELLS = 300_000  # of all places: half a megabyte of the page at most
GATHERED = 1 << 22  # before those that are alike become one

Found = tuple[str, list[tuple[int, int, list[tuple[int, int]]]], "_Occurrences"]


class _Occurrences:
    """Collects where each key is in consecutive, ascending pieces of one lane after the other."""

    def __init__(self, n_lanes: int, cell_ns: int) -> None:
        self._n_lanes, self._cell_ns = n_lanes, cell_ns
        self._total = np.zeros(64, np.int64)
        self._first: dict[int, list[tuple[int, int]]] = {}
        self._gathered: list[NDArray[np.int64]] = []
        self._n_gathered = 0

    def feed(self, lane: int, keys: NDArray[np.int64], ts_ns: NDArray[np.int64]) -> None:
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        rank = np.arange(len(ordered)) - np.repeat(begins, np.diff(np.append(begins, len(ordered))))
        for i in np.flatnonzero(rank < FIRST).tolist():
            self._first.setdefault(int(ordered[i]), []).append((int(ts_ns[order[i]]), lane))
        counts = np.bincount(keys)
        if len(counts) > len(self._total):
            self._total = np.pad(self._total, (0, len(counts) * 2 - len(self._total)))
        self._total[: len(counts)] += counts
        cell = np.clip(ts_ns // self._cell_ns, 0, CELLS - 1)
        self._gather((keys * CELLS + cell) * self._n_lanes + lane)

    def _gather(self, codes: NDArray[np.int64]) -> None:
        self._gathered.append(np.unique(codes))
        self._n_gathered += len(self._gathered[-1])
        if self._n_gathered > GATHERED:
            self._gathered = [np.unique(np.concatenate(self._gathered))]
            self._n_gathered = len(self._gathered[0])

    def most(self, limit: int | None) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """Return (key, how many, first places in time order), the most frequent ones."""
        ranked = sorted(self._first, key=lambda key: (-int(self._total[key]), key))[:limit]
        return [(key, int(self._total[key]), sorted(self._first[key])[:FIRST]) for key in ranked]

    def __len__(self) -> int:
        return len(self._first)

    def cells(self, keys: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return key and cell * lanes + lane of all places of those keys that have more than their first places."""
        codes = np.unique(np.concatenate([np.empty(0, np.int64), *self._gathered]))
        key, cell = np.divmod(codes, CELLS * self._n_lanes)
        kept = (self._total[key] > FIRST) & np.isin(key, np.array(keys, np.int64), kind="sort")
        return key[kept], cell[kept]


def find_places(doings: DoingsCollector, stretches: Stretches) -> Places:
    """Return where reasons, RIPs and follow-ups are."""
    n_lanes = len(stretches.threads)
    cell_ns = max(-(-stretches.length_ns // CELLS), 1)
    reasons, rips, keys = (_Occurrences(n_lanes, cell_ns) for _ in range(3))
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
    found: list[Found] = [("reason", reasons.most(None), reasons), ("rip", rips.most(MOST), rips)]
    found.append(("key", keys.most(MOST), keys))
    left_out = max(len(rips) - MOST, 0) + max(len(keys) - MOST, 0)
    return _with_cells(found, stretches, cell_ns, left_out)


def _with_cells(found: list[Found], stretches: Stretches, cell_ns: int, left_out: int) -> Places:
    """Return the places, their cells as sharp as the bound of the page allows."""
    n_lanes = len(stretches.threads)
    told = [one.cells([key for key, _, _ in most]) for _, most, one in found]
    while sum(len(cell) for _, cell in told) > MOST_CELLS and cell_ns <= stretches.length_ns:
        cell_ns *= 2
        told = [_coarser(key, cell, n_lanes) for key, cell in told]
    made: list[Place] = []
    for (what, most, _), (keys, cells) in zip(found, told, strict=True):
        for key, total, where in most:
            low, high = np.searchsorted(keys, [key, key + 1])
            number = stretches.rip(key) if what == "rip" else key
            lanes, times = tuple(lane for _, lane in where), tuple(ts_ns for ts_ns, _ in where)
            made.append(Place(what, number, total, lanes, times, tuple(cells[low:high].tolist())))
    return Places(tuple(made), cell_ns, left_out)


def _coarser(
    key: NDArray[np.int64], cell: NDArray[np.int64], n_lanes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return cells twice as long."""
    codes = np.unique((key * CELLS + (cell // n_lanes >> 1)) * n_lanes + cell % n_lanes)
    halved, rest = np.divmod(codes, CELLS * n_lanes)
    return halved, rest
