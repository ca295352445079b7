"""What looks wrong until it is certain that nothing was lost: of whatever CPU, also one that is silent for long.

A loss is seen at the CPU's first event behind it, which may stand in a later table.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.table.distinct import distinct
from kvmtrace.table.event_table import LOST_EVENTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.rule import Found
    from kvmtrace.check.verdict import Violation

MOST = 64  # that wait at once; further ones are not reported


@dataclass(frozen=True)
class Doubt:
    """What is to be reported if nothing was lost.

    Parameters
    ----------
    row : where it shows
    since_ns, until_ns : what was lost of any CPU in this time would explain it
    expected, observed : in words
    """

    row: int
    since_ns: int
    until_ns: int
    expected: str
    observed: str


@dataclass
class LossWatch:
    """When which CPU lost events, and up to when each of them has told all.

    Parameters
    ----------
    last_ns : CPU -> time of its latest event
    gaps : (time of the last event before a loss, that of the first behind)
    """

    last_ns: dict[int, int] = field(default_factory=dict)
    gaps: list[tuple[int, int]] = field(default_factory=list)

    def add(self, excerpt: Excerpt) -> bool:
        """Take note of the new rows of an excerpt's table."""
        table, first = excerpt.whole.table, excerpt.whole.n_parked
        lost = table.rows(LOST_EVENTS) if LOST_EVENTS in table.kind_index else np.empty(0, np.intp)
        lost = lost[lost >= first]
        cpus = table.cpu[first:]
        for cpu in distinct(cpus).tolist():
            if not len(lost):
                self.last_ns[cpu] = int(table.ts_ns[len(table) - 1 - int((cpus[::-1] == cpu).argmax())])
                continue
            own = np.flatnonzero(cpus == cpu) + first
            for row in lost[table.cpu[lost] == cpu].tolist():
                at = int(np.searchsorted(own, row))
                before = int(table.ts_ns[own[at - 1]]) if at else self.last_ns.get(cpu, -(1 << 62))
                self.gaps.append((before, int(table.ts_ns[row])))
            self.last_ns[cpu] = int(table.ts_ns[own[-1]])
        return True

    def told_all(self, until_ns: int) -> bool:
        """Say whether every CPU has told what it did up to a time."""
        return all(last > until_ns for last in self.last_ns.values())

    def lost_any(self, since_ns: int, until_ns: int) -> bool:
        """Say whether any CPU lost events in a time."""
        return any(begin <= until_ns and end >= since_ns for begin, end in self.gaps)


@dataclass
class Waiting:
    """Doubts of one rule, with what is to be reported of them."""

    doubts: list[tuple[Doubt, Violation]] = field(default_factory=list)


def report_when_certain(
    excerpt: Excerpt, found: Found, name: str, doubts: list[Doubt], *, unless: Callable[[Doubt], bool] | None = None
) -> None:
    """Report what was doubted before and is certain now, and keep what is doubted now.

    Parameters
    ----------
    name : of what is waiting
    unless : what the whole recording tells may explain a doubt: all wait for its end, and this says which it explains
    """
    watch: LossWatch = excerpt.remember("losses", LossWatch)
    excerpt.once("losses", watch.add)
    waiting: Waiting = excerpt.remember(f"doubts: {name}", Waiting)
    doubts = doubts[: MOST - len(waiting.doubts)] if unless is not None else doubts[:MOST]
    rows = np.array([doubt.row for doubt in doubts], np.intp)
    drafts = found.draft_rows(rows, lambda i: (doubts[i].expected, doubts[i].observed))
    waiting.doubts += zip(doubts[: len(drafts)], drafts, strict=False)
    del waiting.doubts[MOST:]
    certain: list[Violation] = []
    still: list[tuple[Doubt, Violation]] = []
    for doubt, violation in waiting.doubts:
        if watch.lost_any(doubt.since_ns, doubt.until_ns) or doubt.until_ns >= excerpt.known_until_ns:
            continue
        if excerpt.final:
            certain += [] if unless is not None and unless(doubt) else [violation]
        elif unless is None and watch.told_all(doubt.until_ns):
            certain.append(violation)
        else:
            still.append((doubt, violation))
    waiting.doubts = still
    found.report(certain)
