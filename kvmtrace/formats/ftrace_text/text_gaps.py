"""Where a text that people cut and commented may lack events: a row of lost events stands there.

Between two excerpts that are pasted one behind the other, and where a line is no event (a remark, half a line, an
event that somebody changed), any number of events may be missing. Before the first and behind the last line of an
event nobody expects any.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvmtrace.formats.ftrace_text.text_lines import Lines

UNTOLD = -2  # count of such a row: nobody says how many, and the events before it are as good as any
_FEW_ROWS = 4  # rows of lost events per event, at most


class TextGaps:
    """Marks gaps in consecutive pieces of a text."""

    def __init__(self) -> None:
        self._begun = False  # an event was seen
        self._pending: list[str] = []  # strange lines since the last event
        self._open = False  # a gap lies between the last event and what follows
        self.not_understood = 0  # lines between events that are no events

    def mark(self, lines: Lines) -> Lines:
        """Return the lines of a piece with the rows of lost events that belong between them."""
        n = len(lines.name)
        gaps = [at for at in lines.gaps if 0 < at < n or (at == 0 and self._begun)]
        if self._open and n and (not gaps or gaps[0] != 0):
            gaps.insert(0, 0)
        before_first = 0 if self._begun else sum(at == 0 for at in lines.strange_at)
        behind_last = sum(at == n for at in lines.strange_at) if n else 0
        if n:
            self.not_understood += len(self._pending) + len(lines.strange) - before_first - behind_last
            self._pending = lines.strange[len(lines.strange) - behind_last :]
        elif self._begun:
            self._pending += lines.strange
        self._open = n in lines.gaps if n else self._open or (self._begun and bool(lines.gaps))
        self._begun = self._begun or n > 0
        return _with_rows(lines, gaps) if gaps and n else lines


def _with_rows(lines: Lines, gaps: list[int]) -> Lines:
    """Insert a row of lost events for every CPU of the piece before each of these lines."""
    n = len(lines.name)
    cpus = np.flatnonzero(np.bincount(np.maximum(lines.cpu, 0)))
    if len(gaps) * len(cpus) > _FEW_ROWS * n + 64:
        pairs = [(at, cpu) for at in gaps for cpu in {int(lines.cpu[max(at - 1, 0)]), int(lines.cpu[at])}]
    else:
        pairs = [(at, int(cpu)) for at in gaps for cpu in cpus]
    at = np.array([pair[0] for pair in pairs], np.intp)
    cpu = np.array([pair[1] for pair in pairs], np.int16)
    order = np.argsort(np.concatenate([np.arange(n) * 2 + 1, at * 2]), kind="stable").tolist()

    def texts(column: list[str]) -> list[str]:
        longer = [*column, *[""] * len(pairs)]
        return [longer[i] for i in order]

    return replace(
        lines,
        ts_ns=np.insert(lines.ts_ns, at, lines.ts_ns[at]),
        cpu=np.insert(lines.cpu, at, cpu),
        tid=np.insert(lines.tid, at, -1),
        tgid=np.insert(lines.tgid, at, -1),
        irq_flags=np.insert(lines.irq_flags, at, 0),
        preempt_count=np.insert(lines.preempt_count, at, 0),
        lost=np.insert(lines.lost, at, UNTOLD),
        name=texts(lines.name),
        body=texts(lines.body),
        comm=texts(lines.comm),
    )
