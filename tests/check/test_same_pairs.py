"""The checker's segments and the spans of the statistics join the same VM-exit with the same VM-entry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvmtrace.check.engine import Checker
from kvmtrace.formats.known_formats import open_recording
from kvmtrace.spans.vm_exits import collect_vm_exits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.table.event_table import EventTable

FIXTURES = sorted((Path(__file__).parents[2] / "fixtures").glob("*.dat"))
NO_ENTRY = -1


class PairsOfTheChecker(Checker):
    """Keeps, of each VM-exit, the row of the VM-entry that its segments lead to."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.entry_of: dict[int, int] = {}

    def _judge_first(self, part: tuple[Excerpt, NDArray[np.int64]]) -> tuple[Excerpt, NDArray[np.int64]]:
        excerpt, index = part
        segments, sequence = excerpt.segments, excerpt.sequence
        resume = segments.resume[excerpt.exits.seg]
        rows = index[sequence.row[excerpt.exits.start]]
        found = np.full(len(resume), NO_ENTRY)
        known = resume >= 0
        found[known] = index[sequence.row[segments.start[resume[known]]]]
        self.entry_of |= dict(zip(rows.tolist(), found.tolist(), strict=True))
        return part

    def _judge_others(self, part: tuple[Excerpt, NDArray[np.int64]]) -> None: ...

    def finish(self) -> None:  # type: ignore[override]
        if self._parked is not None and len(self._parked):
            self._judge_first(
                self._excerpt(self._parked, self._parked_index, self._parked_loss, len(self._parked), final=True)
            )


def both(tables: list[EventTable], capture) -> tuple[dict[int, int], dict[int, int]]:
    """Return VM-exit -> VM-entry, by the checker and by the spans; NO_ENTRY where none is sure."""
    checker = PairsOfTheChecker(capture)
    for table in tables:
        checker.feed(table)
    checker.finish()
    spans = collect_vm_exits(tables)
    sure = np.where(spans["lost"], NO_ENTRY, spans["entry_row"])
    return checker.entry_of, dict(zip(spans["row"].tolist(), sure.tolist(), strict=True))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_of_the_fixtures(path: Path) -> None:
    recording = open_recording(path)
    by_checker, by_spans = both(list(recording.iter_events()), recording.capture)
    assert by_checker.keys() == by_spans.keys()
    assert {row: (entry, by_spans[row]) for row, entry in by_checker.items() if entry != by_spans[row]} == {}


def test_a_difference_would_be_seen() -> None:
    """One VM-entry less for one of the two: they disagree about its VM-exit, and only about that one."""
    recording = open_recording(next(path for path in FIXTURES if path.stem == "svm-6.1-storm"))
    table = next(iter(recording.iter_events()))
    gone = table.rows("kvm_entry")[5]
    by_checker, _ = both([table], recording.capture)
    _, by_spans = both([table.take(np.delete(np.arange(len(table)), gone))], recording.capture)
    joined = sum(entry != NO_ENTRY for entry in by_checker.values())
    assert sum(entry != NO_ENTRY for entry in by_spans.values()) == joined - 1
