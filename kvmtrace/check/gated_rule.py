"""A rule behind its gate: each part runs where what it needs was recorded, else its places are counted as unknown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.check.excerpt import EXPECTATIONS
from kvmtrace.check.outcomes import Outcome, Outcomes
from kvmtrace.check.rule import Found
from kvmtrace.check.rule_registry import is_own

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.findings import Findings
    from kvmtrace.check.observability import Capability
    from kvmtrace.check.rule import Describe, RowPart, Rule
    from kvmtrace.check.verdict import Violation


class GatedRule:
    """A rule, run part by part where what the part needs was recorded.

    Parameters
    ----------
    rule : Rule
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._own = is_own(rule)
        self._failed = False
        self._row_parts: dict[int, tuple[RowPart, ...]] = {}
        # for one capability: what each needs-list lacks
        self._capability: Capability | None = None
        self._missing: dict[tuple[str, ...], tuple[str, ...]] = {}

    def apply(self, excerpt: Excerpt, findings: Findings) -> None:
        """Check the rule on an excerpt; a rule of another package that fails is left out from then on."""
        if self._own:
            self._apply(excerpt, findings)
        elif not self._failed:
            try:
                self._apply(excerpt, findings)
            except Exception as error:  # noqa: BLE001 (whatever another package's code raises)
                self._failed = True
                findings.errors.append(f"rule {self.rule.id} failed and was left out: {type(error).__name__}: {error}")

    def _apply(self, excerpt: Excerpt, findings: Findings) -> None:
        rule, found = self.rule, Found(findings, self.rule.id)
        told = None if excerpt.told_of is None else excerpt.told_of.get(rule.id)
        missing = self._lacks(rule.needs, excerpt)
        if missing:
            findings.skip(rule.id, "", missing, rule.count_places(excerpt), adds=not self._foreign(missing))
            return
        for number, part in enumerate(rule.parts):
            if told is not None and part.local:
                if number in told.of_parts:
                    findings.add(rule.id, told.of_parts[number])
                continue
            missing = self._lacks(part.needs, excerpt)
            if missing:
                places, adds = int(part.places(excerpt)), part.adds and not self._foreign(missing)
                findings.skip(rule.id, part.about, missing, places, adds=adds)
            else:
                findings.part_source = part.source
                part.check(excerpt, found)
        if told is not None:
            for outcome in told.of_rows:
                findings.add(rule.id, outcome)
        if rule.row_parts_of and not (told is not None and rule.local_rows):
            self._apply_to_rows(excerpt, findings, found)

    def _apply_to_rows(self, excerpt: Excerpt, findings: Findings, found: Found) -> None:
        for part, group in self._parts_of_rows(excerpt):
            missing = self._lacks(part.needs, excerpt)
            if missing:
                places = part.places(excerpt, group)
                findings.skip(self.rule.id, part.about, missing, places, adds=not self._foreign(missing))
            else:
                findings.part_source = part.source
                part.check(excerpt, group, found)

    def judge_locally(self, excerpt: Excerpt) -> Outcomes | None:
        """Return what the local parts find in an excerpt; None if that is a violation.

        Of a rule whose own needs were not met, there is nothing.
        """
        found = Outcomes({}, [])
        if self._lacks(self.rule.needs, excerpt):
            return found
        for number, part in enumerate(self.rule.parts):
            if not part.local:
                continue
            missing, tally = self._lacks(part.needs, excerpt), Tally()
            if missing:
                places, adds = int(part.places(excerpt)), part.adds and not self._foreign(missing)
                tally.skipped = part.about, missing, places, adds
            else:
                part.check(excerpt, tally)
            if tally.violated:
                return None
            found.of_parts[number] = tally.outcome()
        if not self.rule.local_rows:
            return found
        for of_row, group in self._parts_of_rows(excerpt):
            missing, tally = self._lacks(of_row.needs, excerpt), Tally()
            if missing:
                tally.skipped = of_row.about, missing, of_row.places(excerpt, group), not self._foreign(missing)
            else:
                of_row.check(excerpt, group, tally)
            if tally.violated:
                return None
            found.of_rows.append(tally.outcome())
        return found

    def _parts_of_rows(self, excerpt: Excerpt) -> Iterator[tuple[RowPart, NDArray[np.intp]]]:
        for number, group in excerpt.groups.items():
            if number not in self._row_parts:
                row = EXPECTATIONS[number]
                self._row_parts[number] = () if row is None else self.rule.row_parts(row)
            for part in self._row_parts[number]:
                yield part, group

    def _foreign(self, missing: tuple[str, ...]) -> bool:
        """Say whether the rule does not apply to this ISA, which has not what is missing."""
        assert self._capability is not None
        return self._capability.cannot_be(missing)

    def _lacks(self, needs: tuple[str, ...], excerpt: Excerpt) -> tuple[str, ...]:
        if self._capability is not excerpt.capability:
            self._capability, self._missing = excerpt.capability, {}
        if needs not in self._missing:
            self._missing[needs] = excerpt.capability.missing(needs)
        return self._missing[needs]


class Tally(Found):
    """Counts what a part of a rule finds, without a word about it."""

    def __init__(self) -> None:
        self.checked = self.unknown = self.violated = 0
        self.skipped: tuple[str, tuple[str, ...], int, bool] | None = None

    def check(self, n_checked: int | np.intp, n_unknown: int | np.intp = 0) -> None:
        """See Found."""
        self.checked += int(n_checked)
        self.unknown += int(n_unknown)

    def violate(self, positions: NDArray[np.intp] | list[int], describe: Describe) -> None:  # noqa: ARG002
        """See Found."""
        self.violated += len(positions)

    def violate_rows(self, rows: NDArray[np.intp], describe: Describe) -> None:
        """See Found; no local part looks at rows."""
        raise NotImplementedError

    def draft_rows(self, rows: NDArray[np.intp], describe: Describe) -> list[Violation]:
        """See Found; no local part looks at rows."""
        raise NotImplementedError

    def outcome(self) -> Outcome:
        """Return the counts."""
        return Outcome(self.checked, self.unknown, self.skipped)
