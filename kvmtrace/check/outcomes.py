"""What parts of a rule found where nothing was wrong: counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Outcome:
    """What a part of a rule found, no violation among it.

    Parameters
    ----------
    checked, unknown : places
    skipped : (part, what was missing, places, whether they are unknown ones) if it could not be checked
    """

    checked: int
    unknown: int
    skipped: tuple[str, tuple[str, ...], int, bool] | None


@dataclass(frozen=True)
class Outcomes:
    """What the local parts of a rule found: by the number of the part, and one after the other for rows."""

    of_parts: dict[int, Outcome]
    of_rows: list[Outcome]

    def all(self) -> Iterator[Outcome]:
        """Yield each of them."""
        yield from self.of_parts.values()
        yield from self.of_rows
