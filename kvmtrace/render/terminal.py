"""Words, numbers and tables for terminals and plain-text mail."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 100  # in a pipe, a file, a page
NARROWEST = 60
_UNITS = ((1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "us"))
ABSENT = "-"
MIN_FLEXIBLE = 8


def escape(text: str | None) -> str:
    """Make text from a trace safe to print: control and format characters become visible escapes."""
    if text is None:
        return ABSENT
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def duration(ns: int | float | None) -> str:
    """Return a duration with three significant digits and its unit: "850ns", "12.3us", "4.56ms", "1.20s"."""
    if ns is None:
        return ABSENT
    for size, unit in _UNITS:
        if abs(ns) >= size * 0.9995:
            value = ns / size
            digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
            return f"{value:,.{digits}f}{unit}"
    return f"{ns:.0f}ns"


def count(number: int | None) -> str:
    """Return an integer with thousands separated."""
    return ABSENT if number is None else f"{number:,}"


def percent(part: int | None, whole: int | None) -> str:
    """Return a share: "100%", "31.6%", "<0.1%", "0"."""
    if part is None or not whole:
        return ABSENT
    share = part / whole * 100
    if part == 0:
        return "0"
    if share < 0.05:
        return "<0.1%"
    return f"{share:.0f}%" if share >= 99.95 else f"{share:.1f}%"


def plural(number: int, noun: str) -> str:
    """Return "1 event", "2 events"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


@dataclass(frozen=True)
class Style:
    """Colours, or none of them, and how many columns there are."""

    colour: bool = False
    width: int = WIDTH

    def wrapped(self, text: str, first: str = "", rest: str | None = None) -> list[str]:
        """Return text as lines; `first` begins the first one, `rest` the others. No word is broken that fits a line."""
        return textwrap.wrap(
            text,
            self.width,
            initial_indent=first,
            subsequent_indent=first if rest is None else rest,
            break_on_hyphens=False,
        )

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.colour and text else text

    def title(self, text: str) -> str:
        """Return text as a heading."""
        return self._paint("1", text)

    def good(self, text: str) -> str:
        """Return text as good news."""
        return self._paint("32", text)

    def bad(self, text: str) -> str:
        """Return text as bad news."""
        return self._paint("1;31", text)

    def warn(self, text: str) -> str:
        """Return text as a warning."""
        return self._paint("33", text)

    def faint(self, text: str) -> str:
        """Return text in the background."""
        return self._paint("2", text)


def columns_wanted(*, terminal: bool) -> int:
    """Return how wide a text shall be: $COLUMNS, else the terminal, else 100; never below 60.

    Parameters
    ----------
    terminal : the text goes to a terminal
    """
    told = os.environ.get("COLUMNS", "")
    if told.isdecimal() and 0 < int(told) < 100_000:
        return max(int(told), NARROWEST)
    if not terminal:
        return WIDTH
    import shutil

    return max(shutil.get_terminal_size((WIDTH, 24)).columns, NARROWEST)


@dataclass(frozen=True)
class Column:
    """A table's column.

    Parameters
    ----------
    flexible : cut where the line is too narrow, down to `shortest` columns
    rank : what is left out first where it is still too narrow: the highest; 0 stays
    """

    title: str
    cells: Sequence[str]
    left: bool = False
    flexible: bool = False
    rank: int = 0
    shortest: int = MIN_FLEXIBLE

    @property
    def width(self) -> int:
        """Columns that it takes if nothing is cut."""
        return max([len(self.title), *map(len, self.cells)])

    @property
    def least(self) -> int:
        """Columns that it takes at least."""
        return min(self.width, self.shortest) if self.flexible else self.width


def table(columns: Sequence[Column], style: Style) -> list[str]:
    """Return a table's lines: headings, then one line per row, none wider than the style allows.

    Columns that do not fit are left out by their rank, then the flexible ones are cut.
    """
    columns = _fitting(columns, style.width)
    widths = [column.width for column in columns]
    excess = sum(widths) + 2 * len(columns) - style.width
    for i, column in enumerate(columns):
        if column.flexible and excess > 0:
            narrower = max(widths[i] - excess, column.shortest)
            excess -= widths[i] - narrower
            widths[i] = narrower
    gap = "  " if excess <= 0 else " "
    head = _line([column.title for column in columns], columns, widths, gap)
    rows = [_line([column.cells[i] for column in columns], columns, widths, gap) for i in range(len(columns[0].cells))]
    return [style.faint(head), *rows]


def _fitting(columns: Sequence[Column], width: int) -> list[Column]:
    """Return the columns without those of the highest ranks, as many as must go."""
    kept = list(columns)
    while sum(column.least for column in kept) + 2 * len(kept) > width:
        last = max(kept, key=lambda column: column.rank)
        if not last.rank:
            break
        kept.remove(last)
    return kept


def _line(cells: list[str], columns: Sequence[Column], widths: list[int], gap: str) -> str:
    parts = []
    for cell, column, width in zip(cells, columns, widths, strict=True):
        shown = cell if len(cell) <= width else cell[: width - 2] + ".."
        parts.append(shown.ljust(width) if column.left else shown.rjust(width))
    return (gap + gap.join(parts)).rstrip()


def titled(title: str, note: str, columns: Sequence[Column], style: Style, left_out: str = "") -> list[str]:
    """Return a table under its title, with a note behind it where there is room."""
    note = note if len(title) + len(note) + 2 <= style.width else ""
    heading = style.title(title) + (style.faint(f"  {note}") if note else "")
    return [heading, *table(columns, style), *([style.faint(f"  {left_out}")] if left_out else [])]
