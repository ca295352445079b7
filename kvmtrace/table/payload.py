"""Where the fields of recorded events lie, and how a column of them is read.

A decoder does not unpack fields. It says where each event's bytes start; a field becomes a column when
somebody asks for it. That is what keeps a report fast: of the 60 fields recorded, a report needs 15.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvmtrace.errors import MissingEventError
from kvmtrace.table.gather import gather_field, gather_fields

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from kvmtrace.table.format_text import Field


class Payload(Protocol):
    """The fields of all events of one kind, row i belonging to the kind's i-th event."""

    @property
    def fields(self) -> Mapping[str, np.dtype[Any]]:
        """Field name -> dtype."""
        ...

    def column(self, name: str, rows: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """Return field `name` of all events, or of those at `rows` (positions within the kind)."""
        ...

    def told(self, name: str) -> NDArray[np.bool_] | None:
        """Return which events tell field `name`, whose value of the others means nothing; None: all do."""
        ...


class ColumnPayload:
    """Fields that already are columns (text traces, Parquet, tests).

    Parameters
    ----------
    columns : field name -> ndarray, all of the same length
    told : field name -> bool, same length; see Payload.told
    """

    def __init__(
        self, columns: Mapping[str, NDArray[Any]], told: Mapping[str, NDArray[np.bool_]] | None = None
    ) -> None:
        self.columns = dict(columns)
        self._told = dict(told or {})
        self.fields: Mapping[str, np.dtype[Any]] = {n: v.dtype for n, v in self.columns.items()}

    def column(self, name: str, rows: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """See Payload."""
        if name not in self.columns:
            raise MissingEventError(f"field {name} was not recorded")
        values = self.columns[name]
        return values if rows is None else values[rows]

    def told(self, name: str) -> NDArray[np.bool_] | None:
        """See Payload."""
        return self._told.get(name)


class RawPayload:
    """Fields gathered from the recorded bytes when asked for.

    Parameters
    ----------
    words : the buffer as little-endian u32 (a mapped file, or decompressed pages)
    starts : gives the word index of each record's first byte, called once, at the first request
    described : field name -> Field, where each lies
    """

    def __init__(
        self, words: NDArray[np.uint32], starts: Callable[[], NDArray[Any]], described: Mapping[str, Field]
    ) -> None:
        self._words = words
        self._make_starts: Callable[[], NDArray[Any]] | None = starts
        self._starts: NDArray[Any] | None = None
        self._described = described
        self.fields: Mapping[str, np.dtype[Any]] = {n: f.dtype for n, f in described.items()}

    @property
    def starts(self) -> NDArray[Any]:
        """Word index of each record."""
        make = self._make_starts
        if make is not None:  # two threads may both make them: the same ones
            self._starts = make()
            self._make_starts = None  # lets go of what it was made from
        assert self._starts is not None
        return self._starts

    def column(self, name: str, rows: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """See Payload."""
        if name not in self._described:
            raise MissingEventError(f"field {name} was not recorded")
        starts = self.starts if rows is None else self.starts[rows]
        return gather_field(self._words, starts, self._described[name])

    def together(self, names: Sequence[str], rows: NDArray[np.intp] | None = None) -> dict[str, NDArray[Any]]:
        """Return what column() does of several fields; each record is looked at once."""
        fields = {name: self._described[name] for name in names}
        starts = self.starts if rows is None else self.starts[rows]
        return dict(zip(fields, gather_fields(self._words, starts, list(fields.values())), strict=True))

    def told(self, name: str) -> NDArray[np.bool_] | None:  # noqa: ARG002 (a binary record has all its fields)
        """See Payload."""
        return None


class ConcatPayload:
    """Payloads of consecutive parts of one stream; a field that one part lacks is lacking.

    Parameters
    ----------
    parts : (payload, rows or None) pairs in order
    counts : how many events each part has, if known; then a few rows cost little
    """

    def __init__(self, parts: Sequence[tuple[Payload, NDArray[np.intp] | None]], counts: Sequence[int] = ()) -> None:
        self.parts = list(parts)
        self._ends = np.cumsum(np.array(counts, np.intp))
        common: dict[str, np.dtype[Any]] = dict(self.parts[0][0].fields) if self.parts else {}
        for payload, _ in self.parts[1:]:
            common = {name: dtype for name, dtype in common.items() if name in payload.fields}
        self.fields: Mapping[str, np.dtype[Any]] = common

    def column(self, name: str, rows: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """See Payload."""
        if name not in self.fields:
            raise MissingEventError(f"field {name} was not recorded")
        if rows is not None and self._can_be_parted(rows):
            return np.concatenate([payload.column(name, part) for payload, part in self._parted(rows)])
        values = np.concatenate([payload.column(name, part) for payload, part in self.parts])
        return values if rows is None else values[rows]

    def told(self, name: str) -> NDArray[np.bool_] | None:
        """See Payload."""
        masks = [payload.told(name) for payload, _ in self.parts]
        if all(mask is None for mask in masks):
            return None
        found = []
        for (payload, part), mask in zip(self.parts, masks, strict=True):
            if mask is not None:
                found.append(mask if part is None else mask[part])
            else:
                found.append(np.ones(len(payload.column(name) if part is None else part), bool))
        return np.concatenate(found)

    def together(self, names: Sequence[str], rows: NDArray[np.intp] | None = None) -> dict[str, NDArray[Any]]:
        """Return what column() does of several fields; see RawPayload.together."""
        by_part = self.parts
        if rows is not None:
            if not self._can_be_parted(rows):
                return {name: self.column(name, rows) for name in names}
            by_part = self._parted(rows)
        found = [columns_of(payload, names, part) for payload, part in by_part]
        return {name: np.concatenate([columns[name] for columns in found]) for name in names}

    def _can_be_parted(self, rows: NDArray[np.intp]) -> bool:
        return bool(len(self._ends)) and bool(np.all(rows[1:] >= rows[:-1]))

    def _parted(self, rows: NDArray[np.intp]) -> list[tuple[Payload, NDArray[np.intp] | None]]:
        """Return each part with those of its own rows that are among these ascending ones."""
        bounds = np.append(0, np.searchsorted(rows, self._ends))
        found: list[tuple[Payload, NDArray[np.intp] | None]] = []
        begin = 0
        for i, ((payload, part), end) in enumerate(zip(self.parts, self._ends.tolist(), strict=True)):
            own = rows[bounds[i] : bounds[i + 1]] - begin
            found.append((payload, own if part is None else part[own]))
            begin = end
        return found


def columns_of(payload: Payload, names: Sequence[str], rows: NDArray[np.intp] | None = None) -> dict[str, NDArray[Any]]:
    """Return several fields of a payload; where they are gathered from records, each record is looked at once."""
    if isinstance(payload, (RawPayload, ConcatPayload)):
        return payload.together(names, rows)
    return {name: payload.column(name, rows) for name in names}
