"""Where the fields of recorded events lie, and how a column of them is read.

A decoder does not unpack fields. It says where each event's bytes start; a field becomes a column when
somebody asks for it. That is what keeps a report fast: of the 60 fields recorded, a report needs 15.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvmtrace.errors import MissingEventError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


class Payload(Protocol):
    """The fields of all events of one kind, row i belonging to the kind's i-th event."""

    @property
    def fields(self) -> Mapping[str, np.dtype[Any]]:
        """Field name -> dtype."""
        ...

    def column(self, name: str, rows: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """Return field `name` of all events, or of those at `rows` (positions within the kind)."""
        ...


class ColumnPayload:
    """Fields that already are columns (text traces, Parquet, tests).

    Parameters
    ----------
    columns : field name -> ndarray, all of the same length
    """

    def __init__(self, columns: Mapping[str, NDArray[Any]]) -> None:
        self.columns = dict(columns)
        self.fields: Mapping[str, np.dtype[Any]] = {n: v.dtype for n, v in self.columns.items()}

    def column(self, name: str, rows: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """See Payload."""
        if name not in self.columns:
            raise MissingEventError(f"field {name} was not recorded")
        values = self.columns[name]
        return values if rows is None else values[rows]


class ConcatPayload:
    """Payloads of consecutive parts of one stream; a field that one part lacks is lacking.

    Parameters
    ----------
    parts : (payload, rows or None) pairs in order
    """

    def __init__(self, parts: Sequence[tuple[Payload, NDArray[np.intp] | None]]) -> None:
        self.parts = list(parts)
        common: dict[str, np.dtype[Any]] = dict(self.parts[0][0].fields) if self.parts else {}
        for payload, _ in self.parts[1:]:
            common = {name: dtype for name, dtype in common.items() if name in payload.fields}
        self.fields: Mapping[str, np.dtype[Any]] = common

    def column(self, name: str, rows: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """See Payload."""
        if name not in self.fields:
            raise MissingEventError(f"field {name} was not recorded")
        values = np.concatenate([payload.column(name, part) for payload, part in self.parts])
        return values if rows is None else values[rows]
