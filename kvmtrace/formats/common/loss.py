"""What a recording lacks, gathered from every place that tells."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.table.recording import Damage, Loss

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from kvmtrace.formats.trace_dat.page_streams import Fault

_STAT = re.compile(rb"^(CPU|overrun|commit overrun|dropped events):\s*(\d{1,18})", re.MULTILINE)


def lost_by_cpu_stats(stats: Iterable[bytes]) -> dict[int, int]:
    """Return lost events per CPU from the texts of per_cpu/cpuN/stats.

    Source: kernel/trace/trace.c, tracing_stats_read()
    """
    lost: dict[int, int] = {}
    for text in stats:
        cpu = None
        for name, number in _STAT.findall(text):
            if name == b"CPU":
                cpu = int(number)
            elif cpu is not None:
                lost[cpu] = lost.get(cpu, 0) + int(number)
    return {cpu: count for cpu, count in lost.items() if count}


def _counts_of_meta(meta: Mapping[str, Any]) -> dict[int, int]:
    """Return what our recorder counted; its metadata is as untrusted as the rest."""
    loss = meta.get("loss")
    by_cpu = loss.get("by_cpu") if isinstance(loss, dict) else None
    if not isinstance(by_cpu, dict):
        return {}
    return {
        int(cpu): count for cpu, count in by_cpu.items() if str(cpu).isdigit() and isinstance(count, int) and count > 0
    }


def _total_of_meta(meta: Mapping[str, Any]) -> int:
    """Return the recorder's own total: the kernel counts some misses of programs without saying on which CPU."""
    loss = meta.get("loss")
    total = loss.get("events") if isinstance(loss, dict) else None
    return total if isinstance(total, int) and not isinstance(total, bool) and total > 0 else 0


class LossCounter:
    """Counts lost events.

    The tracer's own statistics, the recorder's metadata and the marks in the pages count the same events,
    each seeing some that the others do not: per CPU the largest of them holds.

    Parameters
    ----------
    meta : the recorder's metadata
    by_stats : lost events per CPU by the tracer's statistics
    """

    def __init__(self, meta: Mapping[str, Any] | None = None, by_stats: Mapping[int, int] | None = None) -> None:
        # the last one: what an earlier pass met
        self._told: list[dict[int, int]] = [_counts_of_meta(meta or {}), dict(by_stats or {}), {}]
        self._total = _total_of_meta(meta or {})
        self._marked: dict[int, int] = {}
        self._uncounted: set[int] = set()
        self._damage: dict[tuple[int, int | None], Damage] = {}
        self._truncated = False
        self._repeated = 0

    def restart(self) -> None:
        """Begin another pass over the recording: what is marked in it is met, and counted, anew."""
        self._told[-1] = {
            cpu: max(self._marked.get(cpu, 0), self._told[-1].get(cpu, 0)) for cpu in {*self._marked, *self._told[-1]}
        }
        self._marked = {}
        self._repeated = 0

    def add_repeated(self, n_events: int) -> None:
        """Take in events that were written twice, and are given out once."""
        self._repeated += n_events

    def add_faults(self, faults: Iterable[Fault], *, truncated: bool = False) -> None:
        """Take in parts that could not be read; `truncated`: the file ends before its time."""
        for fault in faults:
            self._truncated |= truncated
            damage = Damage(fault.offset, fault.cpu, fault.expected, fault.found)
            self._damage.setdefault((fault.offset, fault.cpu), damage)

    def add_lost(self, cpu: NDArray[np.int16], count: NDArray[np.int64]) -> None:
        """Take in rows of lost events."""
        if not len(cpu):
            return
        number = cpu.view(np.uint16)  # no np.unique: it imports masked arrays
        sums = np.zeros(1 << 16, np.int64)
        np.add.at(sums, number, np.maximum(count, 0))
        for one in np.flatnonzero(np.bincount(number)).astype(np.uint16).view(np.int16).tolist():
            self._marked[one] = self._marked.get(one, 0) + int(sums[one & 0xFFFF])
        self._uncounted.update(cpu[count < 0].tolist())

    def loss(self) -> Loss:
        """Return what is known so far."""
        by_cpu: dict[int, int] = {}
        for counts in (*self._told, self._marked):
            for cpu, count in counts.items():
                by_cpu[cpu] = max(by_cpu.get(cpu, 0), count)
        counted = {cpu for counts in self._told[:-1] for cpu in counts}
        unknown = bool(self._uncounted - counted) or bool(self._damage)
        known = {cpu: n for cpu, n in sorted(by_cpu.items()) if n}
        total = None if unknown else max(sum(known.values()), self._total)
        return Loss(total, known, self._truncated, tuple(self._damage.values()), self._repeated)
