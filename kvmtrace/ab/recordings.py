"""Two sets of recordings, compared per exit reason and path: what can be, with significance (significance.py)."""

from __future__ import annotations

from dataclasses import field, replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.ab.comparability import BUDGET, TRANSITIONS, Obstacle, allowed, find_obstacles, tell_userspace
from kvmtrace.ab.run import EITHER, Key, RunSamples, Samples
from kvmtrace.ab.significance import (
    ALPHA,
    METRICS,
    MIN_EFFECT,
    MIN_EFFECT_SINGLE,
    MIN_RUNS,
    MIN_SAMPLES,
    holm,
    seconds_of,
    tests_of,
)
from kvmtrace.isa.registry import BY_NAME
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtrace.ab.significance import Test

Edge = tuple[str, str, str]


@dataclass(frozen=True)
class Change:
    """One tested quantity of one key.

    Parameters
    ----------
    metric : "p50" "p90" "p99" (ns) or "rate" (per second)
    base, new : float, the quantity on each side
    ratio : float, new / base (inf if base is 0)
    low, high : float, 95 % confidence interval of the ratio
    p_value : float, after Holm's correction
    significant : bool
    """

    key: Key
    metric: str
    base: float
    new: float
    ratio: float
    low: float
    high: float
    p_value: float
    significant: bool

    @property
    def regression(self) -> bool:
        """Significantly more, or slower."""
        return self.significant and self.ratio > 1


@dataclass(frozen=True)
class Measured:
    """One key on one side: all its runs together.

    Parameters
    ----------
    count : durations
    per_second : of guest time, or of time on the clock where a side lacks it
    p50_ns, p90_ns, p99_ns : None without durations
    """

    count: int
    per_second: float
    p50_ns: float | None
    p90_ns: float | None
    p99_ns: float | None


@dataclass(frozen=True)
class RecordingComparison:
    """The result: before and after, changes, budget shift, model differences, and what the reader must know.

    A side of `counts`, `measured` or `budget_share` is None where its recordings cannot tell.
    """

    base_runs: tuple[str, ...]
    new_runs: tuple[str, ...]
    unit: str  # "runs" or "blocks"
    counts: dict[Key, tuple[int | None, int | None]]
    changes: tuple[Change, ...]
    untested: tuple[Key, ...]
    budget_share: dict[str, tuple[float | None, float | None]]
    transitions_appeared: dict[Edge, int]
    transitions_vanished: dict[Edge, int]
    violations: tuple[int, int]
    notes: tuple[str, ...]
    measured: dict[Key, tuple[Measured | None, Measured | None]] = field(default_factory=dict)
    obstacles: tuple[Obstacle, ...] = ()

    @property
    def comparable(self) -> bool:
        """Say whether nothing stands against comparing times and rates."""
        return {"times", "rates"} <= allowed(self.obstacles)

    @property
    def significant(self) -> tuple[Change, ...]:
        """The changes that are changes."""
        return tuple(change for change in self.changes if change.significant)

    @property
    def regressed(self) -> bool:
        """Something became slower or more frequent, or the model found more violations."""
        return any(change.regression for change in self.changes) or self.violations[1] > self.violations[0]


def compare_runs(
    base: Sequence[RunSamples], new: Sequence[RunSamples], *, min_effect: float | None = None
) -> RecordingComparison:
    """Compare the runs of two sides.

    Parameters
    ----------
    base, new : one or more runs each
    min_effect : relative change below which nothing is called significant; by default MIN_EFFECT for runs against
        runs and MIN_EFFECT_SINGLE for blocks against blocks

    Returns
    -------
    RecordingComparison
    """
    by_run = min(len(base), len(new)) >= MIN_RUNS
    obstacles = find_obstacles(base, new)
    base, new = _alike(base, new)
    keys = sorted({key for run in (*base, *new) for key in run.samples})
    measured = {key: (_measured(key, base), _measured(key, new)) for key in keys}
    counts = {key: (a.count if a else None, b.count if b else None) for key, (a, b) in measured.items()}
    tested = [key for key, sides in counts.items() if None not in sides and max(n or 0 for n in sides) >= MIN_SAMPLES]
    quantities = allowed(obstacles)
    tests = [
        (key, metric, test)
        for key in tested
        for metric, test in tests_of(key, base, new, by_run=by_run, quantities=quantities).items()
    ]
    appeared, vanished = _transitions(base, new) if TRANSITIONS in quantities else ({}, {})
    return RecordingComparison(
        base_runs=tuple(run.name for run in base),
        new_runs=tuple(run.name for run in new),
        unit="runs" if by_run else "blocks",
        counts=counts,
        changes=_changes(tests, (MIN_EFFECT if by_run else MIN_EFFECT_SINGLE) if min_effect is None else min_effect),
        untested=tuple(key for key in keys if key not in tested),
        budget_share=_shares(base, new),
        transitions_appeared=appeared,
        transitions_vanished=vanished,
        violations=(sum(run.violations for run in base), sum(run.violations for run in new)),
        notes=_notes(base, new, by_run=by_run, tested=bool(tests), budget=BUDGET in quantities),
        measured=measured,
        obstacles=obstacles,
    )


def _alike(base: Sequence[RunSamples], new: Sequence[RunSamples]) -> tuple[Sequence[RunSamples], Sequence[RunSamples]]:
    """Give both sides the same denominator of rates, and the same paths of VM-exits."""
    if any(run.guest_ns is None for run in (*base, *new)):
        base, new = ([replace(run, guest_ns=None) for run in side] for side in (base, new))
    if tell_userspace(base) != tell_userspace(new):
        base, new = ([_without_paths(run) for run in side] for side in (base, new))
    return base, new


def _without_paths(run: RunSamples) -> RunSamples:
    """Return the run with the VM-exits of a reason in one key, wherever they were handled."""
    merged: dict[Key, list[Samples]] = {}
    for key, own in run.samples.items():
        merged.setdefault(replace(key, path=EITHER) if key.kind == "vm_exit" else key, []).append(own)
    return replace(run, samples={key: _joined(parts) for key, parts in merged.items()})


def _joined(parts: list[Samples]) -> Samples:
    ts_ns = np.concatenate([part.ts_ns for part in parts])
    order = np.argsort(ts_ns, kind="stable")
    return Samples(ts_ns[order], np.concatenate([part.dur_ns for part in parts])[order])


def _measured(key: Key, side: Sequence[RunSamples]) -> Measured | None:
    """Measure a key on one side, None if its recordings do not show such keys."""
    numbers = {BY_NAME[run.traced.isa].number for run in side if run.traced is not None and run.traced.isa in BY_NAME}
    if (key.kind == "userspace" and not tell_userspace(side)) or (key.isa and numbers and key.isa not in numbers):
        return None
    own = [run.samples[key].dur_ns for run in side if key in run.samples]
    seconds = sum(seconds_of(run) for run in side)
    if not own:
        return Measured(0, 0.0, None, None, None)
    dur_ns = np.concatenate(own)
    quantiles = [float(value) for value in np.quantile(dur_ns, [quantile for _, quantile in METRICS])]
    return Measured(len(dur_ns), len(dur_ns) / seconds, *quantiles)


def _changes(tests: list[tuple[Key, str, Test]], min_effect: float) -> tuple[Change, ...]:
    """Correct the tests' probabilities and decide."""
    adjusted = holm([test.p_value for _, _, test in tests])
    return tuple(
        Change(
            key=key,
            metric=metric,
            base=test.base,
            new=test.new,
            ratio=test.ratio,
            low=test.low,
            high=test.high,
            p_value=p_value,
            significant=p_value < ALPHA and not 1 / (1 + min_effect) < test.ratio < 1 + min_effect,
        )
        for (key, metric, test), p_value in zip(tests, adjusted, strict=True)
    )


def _shares(base: Sequence[RunSamples], new: Sequence[RunSamples]) -> dict[str, tuple[float | None, float | None]]:
    """Return part -> its share of the vCPUs' wall time on each side, None where a side cannot tell."""
    sides = _share(base), _share(new)
    return {part: (sides[0].get(part), sides[1].get(part)) for part in sorted({*sides[0], *sides[1]})}


def _share(side: Sequence[RunSamples]) -> dict[str, float | None]:
    total = sum(value or 0 for run in side for value in run.budget_ns.values())
    shares: dict[str, float | None] = {}
    for part in {part for run in side for part in run.budget_ns}:
        values = [run.budget_ns.get(part) for run in side]
        shares[part] = None if None in values or not total else sum(value or 0 for value in values) / total
    return shares


def _transitions(base: Sequence[RunSamples], new: Sequence[RunSamples]) -> tuple[dict[Edge, int], dict[Edge, int]]:
    """Return the transitions that only the new side took, and only the base side."""
    edges: list[dict[Edge, int]] = []
    for side in (base, new):
        counts: dict[Edge, int] = {}
        for run in side:
            for edge, count in run.transitions.items():
                counts[edge] = counts.get(edge, 0) + count
        edges.append(counts)
    appeared = {edge: count for edge, count in edges[1].items() if edge not in edges[0]}
    return appeared, {edge: count for edge, count in edges[0].items() if edge not in edges[1]}


def _notes(
    base: Sequence[RunSamples], new: Sequence[RunSamples], *, by_run: bool, tested: bool, budget: bool
) -> tuple[str, ...]:
    notes = []
    if tested and not by_run:
        notes.append(
            f"fewer than {MIN_RUNS} runs on a side: blocks within runs were compared, and drift between runs cannot be "
            f"told from a change; only changes of {MIN_EFFECT_SINGLE:.0%} and more count by default. Give several runs"
        )
    if any(run.guest_ns is None for run in (*base, *new)):
        notes.append("guest time is not in every recording: rates are per second of wall time")
    if tell_userspace(base) != tell_userspace(new):
        notes.append(
            "kvm_userspace_exit is not in every recording: VM-exits are not told apart by where they were handled"
        )
    shares = _shares(base, new)
    one_sided = sorted(part.removesuffix("_ns") for part, sides in shares.items() if (None in sides) and any(sides))
    if one_sided and budget:
        notes.append(f"the time of {', '.join(one_sided)} is within other parts where a side cannot tell it")
    if {True, False} <= {run.late_exit for run in (*base, *new)}:
        notes.append(
            "kvm_exit is traced at different places (before or after host interrupts are served): exits by host "
            "interrupts take longer where it is early, though nothing became slower"
        )
    return tuple(notes)
