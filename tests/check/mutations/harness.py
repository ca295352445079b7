"""Run mutations through the checker and count what it caught, per rule, per edit and per VM-exit."""

from __future__ import annotations

import random
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np

from kvmtrace.check import rounds
from kvmtrace.check.engine import Checker
from kvmtrace.formats import open_recording
from mutations.edits import materialise
from mutations.plan import Mutation, places, plan
from mutations.undetectable import why_undetectable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from kvmtrace.check.verdict import Comparison
    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Capture

WHOLE_UP_TO = 4000  # events; longer recordings are mutated in windows
WINDOW = 500  # events on either side of what is looked at


@dataclass(frozen=True)
class Base:
    """A clean table to be mutated: a whole small recording, or a window of a long one."""

    name: str
    capture: Capture
    table: EventTable


@dataclass(frozen=True)
class Outcome:
    """What the checker said of one mutation: the rules broken, and whether any of them is a violation."""

    base: str
    mutation: Mutation
    rules: frozenset[str]
    violation: bool
    excuse: str = ""  # why it cannot be seen, "" if nobody says so

    @property
    def caught(self) -> bool:
        """Whether anything was reported."""
        return bool(self.rules)


@dataclass
class Tally:
    """Outcomes, and the counts that reports need."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def missed(self) -> list[Outcome]:
        """Mutations that were neither caught nor excused."""
        return [outcome for outcome in self.outcomes if not outcome.caught and not outcome.excuse]

    def by_key(self) -> dict[tuple[str, str, str], Counter[str]]:
        """Count violations, suspicions, excused and missed mutations per edit."""
        table: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
        for outcome in self.outcomes:
            table[outcome.mutation.key][_word(outcome)] += 1
        return dict(table)

    def by_rule(self) -> Counter[str]:
        """Count how many mutations each rule caught."""
        return Counter(rule for outcome in self.outcomes for rule in outcome.rules)

    def kill_rate(self) -> float:
        """Return the caught share of the mutations that are not excused."""
        counted = [outcome for outcome in self.outcomes if outcome.caught or not outcome.excuse]
        return sum(outcome.caught for outcome in counted) / len(counted) if counted else 1.0


def _word(outcome: Outcome) -> str:
    if outcome.caught:
        return "violation" if outcome.violation else "suspicion"
    return "excused" if outcome.excuse else "missed"


def check(capture: Capture, table: EventTable) -> Comparison:
    """Compare one table with the model, rounds that are like others left out as in a long recording."""
    with mock.patch.multiple(rounds, FEWEST=0, WORTH=0):
        checker = Checker(capture, limit=1)
        checker.feed(table)
        return checker.finish()


def bases(path: Path) -> Iterator[Base]:
    """Yield the clean tables of a recording; of a long one, a window around each new VM-exit reason."""
    recording = open_recording(str(path))
    table = recording.events()
    if len(table) <= WHOLE_UP_TO:
        yield Base(path.stem, recording.capture, materialise(table))
        return
    seen: set[str] = set()
    for place in places(table.slice(0, min(len(table), 400_000))):
        if place.event == "kvm_exit" and place.exit_name not in seen:
            seen.add(place.exit_name)
            start, stop = max(place.row - WINDOW, 0), min(place.row + WINDOW, len(table))
            yield Base(f"{path.stem}[{place.exit_name}]", recording.capture, materialise(table.slice(start, stop)))


def sample(mutations: Iterable[Mutation], per_group: int, rng: random.Random) -> list[Mutation]:
    """Return at most `per_group` mutations of each group, chosen at random."""
    groups: dict[tuple[str, str, str, str], list[Mutation]] = defaultdict(list)
    for mutation in mutations:
        groups[mutation.group].append(mutation)
    return [mutation for group in groups.values() for mutation in rng.sample(group, min(per_group, len(group)))]


def inner(base: Base, mutations: Iterable[Mutation]) -> Iterator[Mutation]:
    """Leave out the edges of a table: before the first VM-entry of a thread nothing is known, and the end is open."""
    table = base.table
    entries = table.rows("kvm_entry") if table.has("kvm_entry") else table.rows("kvm_fpu")
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for row in entries:
        first.setdefault(int(table.tid[row]), int(row))
        last[int(table.tid[row])] = int(row)
    for mutation in mutations:
        tid = int(table.tid[mutation.row])
        if first.get(tid, len(table)) < mutation.row < last.get(tid, -1):
            yield mutation


def run_mutation(base: Base, mutation: Mutation) -> Outcome:
    """Apply one mutation and ask the checker."""
    result = check(base.capture, mutation.apply(base.table))
    rules = frozenset(rule for rule, counts in result.rules.items() if counts.violated)
    excuse = "" if rules else why_undetectable(mutation, base.table)
    return Outcome(base.name, mutation, rules, result.n_violations > 0, excuse)


def run(files: Iterable[Path], per_group: int, seed: int = 1, limit: int | None = None) -> Tally:
    """Mutate recordings.

    Parameters
    ----------
    files : clean recordings
    per_group : mutations per edit, event and VM-exit reason in each base
    seed : of the choice
    limit : at most this many mutations in all, chosen at random

    Raises
    ------
    AssertionError
        A recording is not clean to begin with.
    """
    rng = random.Random(seed)
    tally = Tally()
    work: list[tuple[Base, Mutation]] = []
    for path in files:
        for base in bases(path):
            clean = check(base.capture, base.table)
            broken = {rule: counts.violated for rule, counts in clean.rules.items() if counts.violated}
            assert not broken, f"{base.name} is not clean: {broken}"
            work += [(base, mutation) for mutation in sample(inner(base, plan(base.table)), per_group, rng)]
    if limit is not None and len(work) > limit:
        work = rng.sample(work, limit)
    for base, mutation in work:
        tally.outcomes.append(run_mutation(base, mutation))
    return tally


def render(tally: Tally) -> str:
    """Return the kill rates as text."""
    lines = [
        f"{len(tally.outcomes):,} mutations, kill rate {tally.kill_rate():.2%} of those that can be seen",
        "",
        f"{'edit':58} {'viol':>6} {'susp':>6} {'excused':>8} {'missed':>7}",
    ]
    for key, counts in sorted(tally.by_key().items()):
        lines.append(
            f"{' '.join(key):58} {counts['violation']:6} {counts['suspicion']:6} {counts['excused']:8} "
            f"{counts['missed']:7}"
        )
    lines += ["", "caught by rule: " + ", ".join(f"{rule} {n}" for rule, n in tally.by_rule().most_common())]
    missed: dict[tuple[str, ...], list[Outcome]] = defaultdict(list)
    for outcome in tally.missed:
        missed[(*outcome.mutation.key, outcome.mutation.isa, outcome.mutation.exit_name)].append(outcome)
    lines += ["", f"missed: {len(tally.missed)}"]
    lines += [
        f"  {' '.join(group)}: {len(group_outcomes)}, e.g. {group_outcomes[0].base} row "
        f"{group_outcomes[0].mutation.row}"
        for group, group_outcomes in sorted(missed.items())
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    np.seterr(all="raise")
    print(render(run([Path(name) for name in sys.argv[2:]], int(sys.argv[1]))))
