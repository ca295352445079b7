"""Rounds of vCPUs that are like earlier ones: what the local parts of rules find in them is known.

A round is what a thread does from a VM-entry to the next. Its content is all that a local part (rule.py) may look at:
the classes of its events, and the fields that local parts read. Equal contents are equal byte for byte, so nothing goes
unjudged: of each content the first round is judged, beside whatever is like no other round, and if nothing is wrong
with these, the others count as often as they come. Where something is wrong, the whole excerpt is judged as if there
were no rounds.

What one content adds to the counts of a rule is not known by itself. In the end the contents are judged once more, as
often as they came: an excerpt that holds some of them a few times counts for many times that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native.round_numbers import RoundEvents, RoundNumbers
from kvmtrace.check.alphabet import CLASS_NAMES, ENTRY
from kvmtrace.check.excerpt import make_excerpt
from kvmtrace.check.findings import Findings
from kvmtrace.check.gated_rule import GatedRule
from kvmtrace.check.round_contents import (
    NotInContentError,
    content_fields,
    keep,
    read_content,
    repeated_rounds,
    rounds_alone,
    without_rows,
)
from kvmtrace.check.rule_registry import is_own
from kvmtrace.check.state_machine import compile_automaton
from kvmtrace.model.states import STEPS
from kvmtrace.table.distinct import run_starts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kvmtrace._native.round_numbers import Cut
    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.observability import Capability
    from kvmtrace.check.outcomes import Outcomes
    from kvmtrace.check.round_contents import Kept
    from kvmtrace.check.rule import Rule
    from kvmtrace.check.state_machine import Steps
    from kvmtrace.check.thread_events import Sequence
    from kvmtrace.table.event_table import EventTable

FEWEST = 60_000  # events of an excerpt: of fewer, looking for rounds takes longer than judging them all
WORTH = 2  # so many times the events that have to be judged
LONGEST = 64  # events of a round that is like others
MOST_CONTENTS, MOST_BYTES = 1 << 14, 1 << 23


class Rounds:
    """The contents of the rounds of a recording so far.

    Parameters
    ----------
    rules : id -> rule; the local parts of ours are judged, those of other packages always look at everything
    """

    def __init__(self, rules: Mapping[str, Rule]) -> None:
        own = filter(is_own, rules.values())
        mine = [rule for rule in own if rule.local_rows or any(part.local for part in rule.parts)]
        self._rules = [GatedRule(rule) for rule in mine]
        self.findings = Findings(rules, 0)  # of rounds that were like earlier ones
        self._fields: tuple[tuple[str, str], ...] = ()
        self._numbers: RoundNumbers | None = None
        self._judged, self._times = np.zeros(MOST_CONTENTS, bool), np.zeros(MOST_CONTENTS, np.int64)
        self._kept: list[Kept] = []
        self._like: EventTable | None = None  # has the kinds of the events
        self._capability: Capability | None = None
        self._given_up = False

    def judge(self, excerpt: Excerpt) -> dict[str, Outcomes] | None:
        """Return what the local parts of each rule find in an excerpt, rounds that are like earlier ones left out.

        None if all of the excerpt has to be judged: something is wrong, or there is nothing to gain.
        """
        if self._given_up or not _is_suitable(excerpt):
            return None
        if self._numbers is None:
            self._numbers = RoundNumbers(MOST_CONTENTS, MOST_BYTES)
            self._fields = content_fields(rule.rule for rule in self._rules)
        if excerpt.capability is not self._capability:
            self.settle()
            self._capability = excerpt.capability
        sequence, steps = excerpt.sequence, excerpt.steps
        content = read_content(sequence.table, self._fields)
        rounds = self._cut(sequence, steps, content)
        number, chosen = rounds.number, rounds.number < 0
        todo = np.flatnonzero(~chosen)
        todo = todo[~self._judged[number[todo]]]
        todo = todo[np.argsort(number[todo], kind="stable")]
        new = np.sort(todo[run_starts(number[todo])])  # the first of each content
        chosen[new] = True
        some = rounds.at(chosen)
        if WORTH * int(some.length.sum()) > len(sequence):
            return None
        try:
            found = self._judge(excerpt.capability, *rounds_alone(sequence, steps, some, content))
        except NotInContentError:  # of a local part that is none
            self._given_up = True
            return None
        if found is not None:
            self._like = without_rows(sequence.table)
            self._kept.append(keep(sequence, steps, rounds.at(new), content))
            self._judged[number[new]] = True
            self._times += np.bincount(number[~chosen], minlength=MOST_CONTENTS)
        return found

    def settle(self) -> None:
        """Count what local parts find in the rounds that were not judged themselves, and forget all contents."""
        if self._times.any():
            assert self._capability is not None
            assert self._like is not None
            for times, sequence, steps in repeated_rounds(self._kept, self._times, self._like):
                found = self._judge(self._capability, sequence, steps)
                assert found is not None, "a local part of a rule looked at more than one round"
                for rule, outcomes in found.items():
                    for outcome in outcomes.all():
                        self.findings.add(rule, outcome, times)
        self._kept, self._like = [], None
        self._times[:] = 0
        self._judged[:] = False
        if self._numbers is not None:
            self._numbers.clear()

    def _cut(self, sequence: Sequence, steps: Steps, content: dict[tuple[str, str], NDArray[Any]]) -> Cut:
        """Cut a sequence into rounds."""
        assert self._numbers is not None
        odd = sequence.broken.copy()
        odd[steps.position[steps.wrong]] = True
        events = RoundEvents(sequence.cls, sequence.first, sequence.repeated, odd, sequence.position_in_kind)
        columns: dict[int, list[NDArray[Any]]] = {}
        for (kind, _), column in content.items():
            for cls in _CLASSES_OF.get(kind, ()):
                columns.setdefault(cls, []).append(column)
        return self._numbers.number(events, columns, ENTRY, LONGEST)

    def _judge(self, capability: Capability, sequence: Sequence, steps: Steps) -> dict[str, Outcomes] | None:
        """Return what the local parts find, None if something is wrong."""
        excerpt = make_excerpt(sequence, steps, capability, compile_automaton(capability))
        excerpt.memory = NoMemory()
        found = {}
        for rule in self._rules:
            outcomes = rule.judge_locally(excerpt)
            if outcomes is None:
                return None
            found[rule.rule.id] = outcomes
        return found


class NoMemory(dict[str, Any]):
    """A local part has no memory."""

    def __contains__(self, name: object) -> bool:
        raise NotInContentError(name)


def _classes_of() -> dict[str, list[int]]:
    """Return tracepoint -> the classes of its events."""
    found: dict[str, list[int]] = {}
    for number, name in enumerate(CLASS_NAMES):
        found.setdefault(STEPS[name].kind if name in STEPS else name, []).append(number)
    return found


_CLASSES_OF = _classes_of()


def _is_suitable(excerpt: Excerpt) -> bool:
    """Say whether an excerpt is long enough, and nothing in it changes what local parts find elsewhere."""
    if len(excerpt.sequence) < FEWEST or excerpt.capability.filtered:
        return False
    # behind the first nested entry another guest may run; a guest that hides its registers does so everywhere
    return not any(excerpt.of_kind(kind).any() for kind in ("nested_entry", "encrypted"))
