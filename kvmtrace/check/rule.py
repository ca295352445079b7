"""A rule: what must hold, what it needs, its parts; and what the engine hands to them.

A rule is judged part by part. A part names the events and fields that it needs, beside those of its rule; the engine
runs it only where all of them were recorded, and else counts its places as unknown. A part never asks itself.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy as np
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.findings import Findings
    from kvmtrace.check.verdict import Violation
    from kvmtrace.isa.base import ExitRow

    # expected, observed, and, where a violation knows better than its part, the functions that may be at fault
    Describe = Callable[[int], tuple[str, str] | tuple[str, str, str]]
    Check = Callable[[Excerpt, "Found"], None]
    Group = NDArray[np.intp]

VIOLATION = "violation"
SUSPICION = "suspicion"


class Found:
    """Takes what a rule found: counts, and positions in the excerpt's sequence.

    Parameters
    ----------
    findings : Findings that collects them
    rule : id of the rule
    """

    def __init__(self, findings: Findings, rule: str) -> None:
        self._findings = findings
        self._rule = rule

    def check(self, n_checked: int | np.intp, n_unknown: int | np.intp = 0) -> None:
        """Count places where the rule was checked, or could not be."""
        self._findings.check(self._rule, n_checked, n_unknown)

    def violate(self, positions: NDArray[np.intp] | list[int], describe: Describe) -> None:
        """Report violations at sequence positions; describe(i) gives (expected, observed) of the i-th."""
        self._findings.violate(self._rule, positions, describe)

    def violate_rows(self, rows: NDArray[np.intp], describe: Describe) -> None:
        """Report violations at rows of the excerpt's table, of events that the model's alphabet has no class for."""
        self._findings.violate_rows(self._rule, rows, describe)

    def draft_rows(self, rows: NDArray[np.intp], describe: Describe) -> list[Violation]:
        """Return what violate_rows would report, for `report` when it is certain; not more than are kept."""
        return self._findings.draft_rows(self._rule, rows, describe)

    def report(self, drafts: list[Violation]) -> None:
        """Report drafts."""
        self._findings.report(self._rule, drafts)


@dataclass(frozen=True)
class Part:
    """A part of a rule that looks at an excerpt as a whole.

    Parameters
    ----------
    about : a few words; "" if the rule has no other part
    needs : events, "event.field" or "irq_flags", beside those of the rule; "a|b" is met by either
    check : run if all of them were recorded
    places : counts where it applies, for the account of what could not be checked
    adds : its places are counted as unknown where it is not checked; not if other parts judge the same places
    source : str, the kernel functions that may be at fault, where that is not what the rule says
    local : what is found between a VM-entry and the next depends on these events alone, on their classes and fields
        (not on times, CPUs, threads or rows, nor on memory), so that one such round stands for all that are like it
    """

    about: str
    needs: tuple[str, ...]
    check: Check
    places: Callable[[Excerpt], int]
    adds: bool = True
    source: str = ""
    local: bool = False


@dataclass(frozen=True)
class RowPart:
    """A part of a rule that looks at the VM-exits of one row of the exit tables.

    Parameters
    ----------
    about, needs, source : as of a Part
    check : gets the numbers of these exits
    places : counts where it applies among them; by default, everywhere
    """

    about: str
    needs: tuple[str, ...]
    check: Callable[[Excerpt, Group, Found], None]
    places: Callable[[Excerpt, Group], int] = lambda _, group: len(group)
    source: str = ""


@dataclass(frozen=True, eq=False)
class Rule:
    """One invariant of the vCPU lifecycle.

    Parameters
    ----------
    id : str, "V1".. contract, "J1".. event injection, "H1".. heuristics; others' rules choose their own
    title : str, a few words
    severity : VIOLATION (contradicts KVM's contract) or SUSPICION (heuristic)
    needs : events, "event.field" or "irq_flags" without which nothing of the rule is checked; "a|b" is met by either
    sentence : str, what must hold
    source : str, kernel functions and files
    cannot_see : str, faults of this kind that the rule misses: a noun phrase, "" if none is known
    places : class of events (alphabet.py) at which the rule applies, or a function that counts them
    blames_handler : bool, what the VM-exit's handler did may be at fault, too: it is named beside the source
    local_rows : bool, what is checked for rows of the exit tables is local, as of a Part
    healthy, broken : str, short traces (examples.py) that hold and that break it

    Examples
    --------
    >>> RULE = Rule("X1", "no CPUID", SUSPICION, ("kvm_cpuid",), "The guest does not ask.", "ours", places="kvm_cpuid")
    >>> @RULE.part()
    ... def _none(excerpt, found):
    ...     positions = excerpt.segments.positions("kvm_cpuid")
    ...     found.check(len(positions))
    ...     found.violate(positions, lambda i: ("no kvm_cpuid", "one"))
    """

    id: str
    title: str
    severity: str
    needs: tuple[str, ...]
    sentence: str
    source: str
    cannot_see: str = ""
    places: str | Callable[[Excerpt], int] = "VM-exit"
    healthy: str = ""
    broken: str = ""
    blames_handler: bool = True
    local_rows: bool = False
    parts: list[Part] = field(default_factory=list)
    row_parts_of: list[Callable[[ExitRow], Iterable[RowPart]]] = field(default_factory=list)

    def part(
        self,
        about: str = "",
        *,
        needs: tuple[str, ...] = (),
        places: str | Callable[[Excerpt], int] = "",
        adds: bool = True,
        source: str = "",
        local: bool = False,
    ) -> Callable[[Check], Check]:
        """Register a function as a part of this rule; `places`: a class of events, or a function that counts."""
        count = counter(places or self.places)

        def register(check: Check) -> Check:
            self.parts.append(Part(about, needs, check, count, adds, source, local))
            return check

        return register

    def count_places(self, excerpt: Excerpt) -> int:
        """Count the events at which the rule applies."""
        return counter(self.places)(excerpt)

    def each_row(self, parts_of: Callable[[ExitRow], Iterable[RowPart]]) -> Callable[[ExitRow], Iterable[RowPart]]:
        """Register a function that says what is to be checked for a row of the exit tables."""
        self.row_parts_of.append(parts_of)
        return parts_of

    def row_parts(self, row: ExitRow) -> tuple[RowPart, ...]:
        """Return what is to be checked for a row of the exit tables."""
        return tuple(part for parts_of in self.row_parts_of for part in parts_of(row))


def counter(places: str | Callable[[Excerpt], int]) -> Callable[[Excerpt], int]:
    """Return a function that counts the events of a class that an excerpt is the first to hold, or the function."""
    if callable(places):
        return places

    def count(excerpt: Excerpt) -> int:
        positions = excerpt.segments.positions(places)
        return len(positions) - int(excerpt.sequence.repeated[positions].sum())

    return count
