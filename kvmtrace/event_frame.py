"""All events as a pandas frame whose columns are made when they are asked for.

A recording has some hundred fields, each a column as long as the recording: all at once take far more memory than the
file. `rec.events[["ts_ns", "event"]]` makes two of them; whatever a frame can do besides makes them all.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable

COMMON = ("ts_ns", "cpu", "tid", "event", "irq_flags", "preempt_count")
SHOWN_ROWS = 10


class EventFrame:
    """The events of a table.

    `frame["kvm_exit.exit_reason"]` is a Series, `frame[["ts_ns", "event"]]` a DataFrame of these columns, `frame[mask]`
    one of these rows with all columns. Integers stay integers: fields of other events' rows are <NA> (Int64, UInt64
    and so on). Anything else is passed on to `to_pandas()`, which holds every column and is kept.

    Parameters
    ----------
    table : EventTable
    """

    def __init__(self, table: EventTable) -> None:
        self._table = table

    @cached_property
    def _fields(self) -> dict[str, tuple[str, str]]:
        """Column -> (kind, field), of numbers that occur."""
        return {
            f"{kind.name}.{name}": (kind.name, name)
            for kind in self._table.kinds
            if self._table.count(kind.name)
            for name, dtype in kind.fields.items()
            if dtype.kind in "iub" and not dtype.shape
        }

    @property
    def columns(self) -> pd.Index[str]:
        """The columns' names; none of them is made for it."""
        return pd.Index([*COMMON, *self._fields])

    @property
    def shape(self) -> tuple[int, int]:
        """(events, columns)."""
        return len(self), len(COMMON) + len(self._fields)

    @property
    def index(self) -> pd.RangeIndex:
        """The rows' numbers: those of the recording."""
        return pd.RangeIndex(len(self))

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __contains__(self, name: object) -> bool:
        return name in COMMON or name in self._fields

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *(name for name in self.columns if name.isidentifier())})

    def _values(self, name: str) -> Any:
        """Return a column as what a frame is made of."""
        if name == "event":
            kinds = [kind.name for kind in self._table.kinds]
            return pd.Categorical.from_codes(self._table.kind.astype(np.int32), kinds)
        if name in COMMON:
            return getattr(self._table, name)
        if name not in self._fields:
            raise KeyError(name)
        kind, field = self._fields[name]
        absent: NDArray[np.bool_] = np.ones(len(self), bool)
        told = self._table.told(kind, field)
        absent[self._table.rows(kind)] = False if told is None else ~told
        values = self._table.spread(kind, field)
        masked = pd.arrays.BooleanArray if values.dtype.kind == "b" else pd.arrays.IntegerArray
        return masked(values.astype(values.dtype.newbyteorder("="), copy=False), absent)

    def _frame(self, names: list[str]) -> pd.DataFrame:
        return pd.DataFrame({name: self._values(name) for name in names}, index=self.index, copy=False)

    def __getitem__(self, wanted: Any) -> Any:
        """Return one column (a name), some (a list of names), or rows of all (a mask or a slice)."""
        if isinstance(wanted, str):
            return pd.Series(self._values(wanted), index=self.index, name=wanted, copy=False)
        if isinstance(wanted, (list, pd.Index)) and all(isinstance(name, str) for name in wanted):
            return self._frame(list(wanted))
        rows = np.arange(len(self))[wanted.to_numpy(bool) if isinstance(wanted, pd.Series) else wanted]
        return self.rows(rows)

    def rows(self, rows: NDArray[np.intp]) -> pd.DataFrame:
        """Return these rows with all columns; only they are made."""
        chosen = np.asarray(rows, np.intp)
        made = EventFrame(self._table.take(chosen))
        made.__dict__["_fields"] = self._fields
        return made._frame(list(self.columns)).set_axis(chosen)

    def head(self, n: int = 5) -> pd.DataFrame:
        """Return the first rows."""
        return self.rows(np.arange(min(n, len(self))))

    def tail(self, n: int = 5) -> pd.DataFrame:
        """Return the last rows."""
        return self.rows(np.arange(max(len(self) - n, 0), len(self)))

    def to_pandas(self) -> pd.DataFrame:
        """Return every column; made once."""
        return self._whole

    @cached_property
    def _whole(self) -> pd.DataFrame:
        return self._frame(list(self.columns))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[name] if name in self else getattr(self.to_pandas(), name)

    def __repr__(self) -> str:
        return f"{self.head(SHOWN_ROWS)!r}\n{self._size()}"

    def _size(self) -> str:
        return f"{len(self):,} events, {self.shape[1]} columns; events[[NAME, ...]] makes only those asked for"

    def _repr_html_(self) -> str:
        return f"{self.head(SHOWN_ROWS).to_html(max_cols=SHOWN_ROWS)}<p>{self._size()}</p>"
