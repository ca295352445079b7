"""Two looks at the summary maps -> rates and shares; what `kvmtrace top` shows."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from kvmtrace.lazy_dataclass import dataclass

PHASES = ("guest", "kernel", "userspace", "blocked", "preempted")


@dataclass(frozen=True)
class VcpuRates:
    """A vCPU thread between two looks.

    Parameters
    ----------
    tid, pid, comm : thread, process, thread name ("" if unknown)
    vcpu_id, isa : None where no VM-exit was seen
    shares : phase -> share of the time, 0..1
    exits : exit_reason -> per second
    userspace_exits : KVM_EXIT_* number, "EINTR" or "other" -> per second
    """

    tid: int
    pid: int
    comm: str
    vcpu_id: int | None
    isa: str | None
    shares: dict[str, float]
    exits: dict[int, float] = field(default_factory=dict)
    userspace_exits: dict[int | str, float] = field(default_factory=dict)

    @property
    def exit_rate(self) -> float:
        """VM-exits per second."""
        return sum(self.exits.values())

    @property
    def userspace_rate(self) -> float:
        """Userspace exits per second."""
        return sum(self.userspace_exits.values())


def rates_between(before: list[dict[str, Any]], after: list[dict[str, Any]], seconds: float) -> list[VcpuRates]:
    """Return the rates of every thread that is in `after`; one that is new there counts from its start.

    Parameters
    ----------
    before, after : rows of SummaryPrograms.snapshot
    seconds : time between them, more than 0
    """
    earlier = {row["tid"]: row for row in before}
    return [_rates(earlier.get(row["tid"]), row, seconds) for row in after]


def _rates(old: dict[str, Any] | None, new: dict[str, Any], seconds: float) -> VcpuRates:
    spent = {phase: new["time_ns"][phase] - (old["time_ns"][phase] if old else 0) for phase in PHASES}
    covered = sum(spent.values())
    return VcpuRates(
        new["tid"],
        new["pid"],
        new["comm"] or "",
        new["vcpu_id"],
        new["isa"],
        {phase: max(ns, 0) / covered if covered > 0 else 0.0 for phase, ns in spent.items()},
        _per_second(old, new, "exits", seconds),
        _per_second(old, new, "userspace_exits", seconds),
    )


def _counts(row: dict[str, Any] | None, table: str) -> dict[Any, int]:
    if row is None:
        return {}
    key = "exit_reason" if table == "exits" else "reason"
    return {cell["error"] if cell[key] is None else cell[key]: cell["count"] for cell in row[table]}


def _per_second(old: dict[str, Any] | None, new: dict[str, Any], table: str, seconds: float) -> dict[Any, float]:
    earlier = _counts(old, table)
    rates = {key: (count - earlier.get(key, 0)) / seconds for key, count in _counts(new, table).items()}
    return {key: rate for key, rate in sorted(rates.items(), key=lambda item: -item[1]) if rate > 0}
