"""What an HTML table is made of: columns that turn a row of the document into a text and a value to sort by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.render.terminal import count, duration, percent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@dataclass(frozen=True)
class Cell:
    """A text and, for numbers, the value to sort by."""

    text: str
    value: float | int | None = None
    link: str = ""


@dataclass(frozen=True)
class HtmlTable:
    """`columns` are (title, is a number); filterable from ten rows on."""

    id: str
    title: str
    caption: str
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Column:
    """A title, whether it holds numbers, and how a row's cell is made."""

    title: str
    number: bool
    cell: Callable[[Any], Cell]


def time_cell(ns: int | None) -> Cell:
    """Return a duration's cell; what is not known sorts first."""
    return Cell("-", -1) if ns is None else Cell(duration(ns), ns)


def count_cell(number: int | None) -> Cell:
    """Return a number's cell; what is not known sorts first."""
    return Cell("-", -1) if number is None else Cell(count(number), number)


def share_cell(part: int | None, whole: int | None) -> Cell:
    """Return the cell of a part of a whole."""
    return Cell("-", -1) if part is None or not whole else Cell(percent(part, whole), part / whole)


def hex_cell(number: int | None) -> Cell:
    """Return a number's cell in hexadecimal."""
    return Cell("-", -1) if number is None else Cell(f"{number:#x}", number)


def returned_cell(ret: int | None) -> Cell:
    """Return the cell of what a system call returned: addresses in hexadecimal."""
    if ret is None:
        return Cell("-", -1)
    return Cell(f"{ret:#x}" if ret > 1 << 20 else str(ret), ret)


def text(title: str, field: str = "") -> Column:
    """Return a column of a row's field as it is; None is empty."""
    name = field or title
    return Column(title, False, lambda row: Cell(str(value) if (value := getattr(row, name)) is not None else ""))


def plain(title: str, field: str = "") -> Column:
    """Return a column of identifiers: numbers without separators."""
    name = field or title
    return Column(title, True, lambda row: Cell(str(getattr(row, name)), getattr(row, name)))


def hexadecimal(title: str, field: str = "") -> Column:
    """Return a column of addresses and numbers in hexadecimal."""
    name = field or title
    return Column(title, True, lambda row: hex_cell(getattr(row, name)))


def number(title: str, field: str = "") -> Column:
    """Return a column of counts."""
    name = field or title
    return Column(title, True, lambda row: count_cell(getattr(row, name)))


def time(title: str, field: str) -> Column:
    """Return a column of durations."""
    return Column(title, True, lambda row: time_cell(getattr(row, field)))


def made(title: str, cell: Callable[[Any], str]) -> Column:
    """Return a column of text that is made of a row."""
    return Column(title, False, lambda row: Cell(cell(row)))


def table(name: str, title: str, columns: Iterable[Column], rows: Iterable[Any], caption: str = "") -> HtmlTable:
    """Return the table of these rows.

    Parameters
    ----------
    name : the table's id in the page
    """
    chosen = tuple(columns)
    return HtmlTable(
        name,
        title,
        caption,
        tuple((column.title, column.number) for column in chosen),
        tuple(tuple(column.cell(row) for column in chosen) for row in rows),
    )
