"""The event table: one row per recorded event, in recorded order, as columns.

Columns every row has (name, dtype, unit, null):

| column        | dtype  | meaning                                                            | null |
|---------------|--------|--------------------------------------------------------------------|------|
| ts_ns         | int64  | time stamp of the capture's clock, ns                              | -    |
| cpu           | int16  | host CPU that recorded the event                                   | -1   |
| tid           | int32  | thread that was running (common_pid)                               | -1   |
| kind          | uint16 | index into `kinds`                                                 | -    |
| irq_flags     | uint8  | common_flags: TRACE_FLAG_* bits of include/linux/trace_events.h    | 0    |
| preempt_count | uint8  | common_preempt_count                                               | 0    |

Rows of different CPUs are merged by time; rows of one CPU keep their buffer order even where the clock
stands still or steps back. Fields belong to a kind: `table.field("kvm_exit", "exit_reason")` is aligned
with `table.rows("kvm_exit")`. Lost events are rows of the kind "lost_events" (field `count`, int64, -1 if
the tracer did not say how many), on the CPU that lost them, tid -1, placed before the first event after
the gap.
"""

from __future__ import annotations

import contextlib
from dataclasses import field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native import thread_rows
from kvmtrace.errors import MissingEventError
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.table.derived import derived_fields
from kvmtrace.table.payload import ConcatPayload, Payload, RawPayload

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

LOST_EVENTS = "lost_events"

# common_flags (include/linux/trace_events.h, enum trace_flag_type)
TRACE_FLAG_IRQS_OFF = 0x01
TRACE_FLAG_IRQS_NOSUPPORT = 0x02  # older kernels: the tracer cannot know
TRACE_FLAG_NEED_RESCHED = 0x04
TRACE_FLAG_HARDIRQ = 0x08
TRACE_FLAG_SOFTIRQ = 0x10
TRACE_FLAG_PREEMPT_RESCHED = 0x20
TRACE_FLAG_NMI = 0x40
TRACE_FLAG_BH_OFF = 0x80

COMMON_DTYPES: dict[str, np.dtype[Any]] = {
    "ts_ns": np.dtype(np.int64),
    "cpu": np.dtype(np.int16),
    "tid": np.dtype(np.int32),
    "kind": np.dtype(np.uint16),
    "irq_flags": np.dtype(np.uint8),
    "preempt_count": np.dtype(np.uint8),
}


@dataclass(frozen=True)
class EventKind:
    """A tracepoint or probe of the capture.

    Parameters
    ----------
    name : str, verbatim as the kernel names it ("kvm_exit"); ours for probes ("kvm_vcpu_ioctl")
    system : str, tracepoint subsystem ("kvm", "sched", "syscalls"); "kvmtrace" for our probes and markers
    fields : field name -> dtype; () shaped, or a subarray dtype such as (15,)u1
    print_fmt : str, the format file's `print fmt` (data, never evaluated); "" if unknown
    """

    name: str
    system: str
    fields: dict[str, np.dtype[Any]] = field(default_factory=dict)
    print_fmt: str = ""


class RowsByKind:
    """Which rows of a table are of which kind; found when asked for, by two threads perhaps.

    Parameters
    ----------
    kind : uint16, the table's column
    n_kinds : int
    """

    def __init__(self, kind: NDArray[np.uint16], n_kinds: int) -> None:
        self._kind = kind
        self._n_kinds = n_kinds
        # no cached_property: its lock is one for all tables, and two threads work on different ones
        self._found: tuple[list[NDArray[np.intp]], NDArray[np.intp]] | None = None

    def __len__(self) -> int:
        return len(self._kind)

    def _find(self) -> tuple[list[NDArray[np.intp]], NDArray[np.intp]]:
        if self._found is None:
            order, begin, position = thread_rows.rows_by_kind(self._kind, self._n_kinds)
            bounds = begin.tolist()
            self._found = [order[first:stop] for first, stop in pairwise(bounds)] or [order], position
        return self._found

    def of(self, index: int) -> NDArray[np.intp]:
        """Return the ascending row numbers of one kind, without those of all others if these were not asked for yet."""
        return np.flatnonzero(self._kind == index) if self._found is None else self._found[0][index]

    @property
    def rows(self) -> list[NDArray[np.intp]]:
        """The ascending row numbers of each kind."""
        return self._find()[0]

    @property
    def position(self) -> NDArray[np.intp]:
        """The position of each row within its kind."""
        return self._find()[1]


class EventTable:
    """Events as columns; see the module docstring for the columns.

    Parameters
    ----------
    columns : the six columns of COMMON_DTYPES, each of n rows
    kinds : the kinds that `kind` indexes
    payloads : kind index -> Payload with one row per event of that kind, in table order
    by_kind : RowsByKind, if the payloads need it already
    """

    def __init__(
        self,
        columns: dict[str, NDArray[Any]],
        kinds: Sequence[EventKind],
        payloads: dict[int, Payload],
        by_kind: RowsByKind | None = None,
    ) -> None:
        n_rows = len(columns["ts_ns"])
        for name, dtype in COMMON_DTYPES.items():
            values = columns[name]
            assert values.dtype == dtype, (name, values.dtype)
            assert values.shape == (n_rows,), (name, values.shape)
        self.ts_ns: NDArray[np.int64] = columns["ts_ns"]
        self.cpu: NDArray[np.int16] = columns["cpu"]
        self.tid: NDArray[np.int32] = columns["tid"]
        self.kind: NDArray[np.uint16] = columns["kind"]
        self.irq_flags: NDArray[np.uint8] = columns["irq_flags"]
        self.preempt_count: NDArray[np.uint8] = columns["preempt_count"]
        self.kinds: tuple[EventKind, ...] = tuple(kinds)
        self.payloads = payloads
        self.kind_index: dict[str, int] = {kind.name: i for i, kind in enumerate(self.kinds)}
        self.by_kind = RowsByKind(self.kind, len(self.kinds)) if by_kind is None else by_kind
        self.derived = derived_fields({kind.name: kind.fields for kind in self.kinds})
        self._cache: dict[tuple[int, str], NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self.ts_ns)

    def __repr__(self) -> str:
        return f"<EventTable: {len(self):,} events of {len(self.kinds)} kinds>"

    def has(self, name: str, field: str | None = None) -> bool:
        """Say whether the capture describes kind `name` (with field `field`), occurring or not."""
        index = self.kind_index.get(name)
        if index is None or field is None:
            return index is not None
        return field in self.kinds[index].fields or (name, field) in self.derived

    def rows(self, name: str) -> NDArray[np.intp]:
        """Return the ascending row numbers of kind `name`; empty if the capture does not know it."""
        index = self.kind_index.get(name)
        return np.empty(0, np.intp) if index is None else self.by_kind.rows[index]

    def count(self, name: str) -> int:
        """Return how many events of kind `name` there are."""
        return len(self.rows(name))

    def field(self, name: str, field: str) -> NDArray[Any]:
        """Return field `field` of every event of kind `name`, aligned with rows(name).

        Raises
        ------
        MissingEventError
            The capture does not describe that kind or field.
        """
        index = self.kind_index.get(name)
        if index is None or not self.has(name, field):
            raise MissingEventError(f"the recording has no field {field} of event {name}")
        key = (index, field)
        if key not in self._cache and field not in self.kinds[index].fields:
            made = self.derived[name, field]
            self._cache[key] = made.column(lambda part: self.field(name, part), self.count(name))
        elif key not in self._cache:
            payload = self.payloads.get(index)
            if payload is None:  # described, never occurred
                self._cache[key] = np.zeros(0, self.kinds[index].fields[field])
            else:
                self._cache[key] = payload.column(field)
        return self._cache[key]

    def told(self, name: str, field: str) -> NDArray[np.bool_] | None:
        """Return which events of kind `name` tell `field`, aligned with rows(name); None where all do.

        What was not told has a value of 0 in field(): never take it for one.
        """
        payload = self.payloads.get(self.kind_index.get(name, -1))
        if payload is None:
            return None
        made = self.derived.get((name, field))
        if made is None or field in self.kinds[self.kind_index[name]].fields:
            return payload.told(field)
        masks = [mask for part in made.parts if (mask := payload.told(part.field)) is not None]
        return np.logical_and.reduce(masks) if masks else None

    @property
    def asked_for(self) -> list[tuple[int, str]]:
        """The fields that were asked for so far, as (index of the kind, name)."""
        return list(self._cache)

    def read_ahead(self, wanted: Iterable[tuple[int, str]]) -> None:
        """Find what another thread is going to ask for: rows by kind, and these fields of kinds that occur."""
        _ = self.by_kind.rows
        names: dict[int, list[str]] = {}
        for index, name in wanted:
            if index in self.payloads and (index, name) not in self._cache:
                names.setdefault(index, []).append(name)
        for index, of_kind in names.items():
            payload = self.payloads[index]
            recorded = [name for name in of_kind if name in payload.fields]
            if isinstance(payload, (RawPayload, ConcatPayload)) and len(recorded) > 1:
                self._cache |= {(index, name): column for name, column in payload.together(recorded).items()}
            for name in of_kind:
                with contextlib.suppress(MissingEventError):
                    self.field(self.kinds[index].name, name)

    def spread(self, name: str, field: str, fill: int = 0, dtype: np.dtype[Any] | type | None = None) -> NDArray[Any]:
        """Return field `field` of kind `name` as a column over all rows, `fill` elsewhere."""
        values = self.field(name, field)
        column = np.full(len(self), fill, dtype or values.dtype)
        column[self.rows(name)] = values
        return column

    @property
    def position_in_kind(self) -> NDArray[np.intp]:
        """Return the position of each row within its kind."""
        return self.by_kind.position

    def take(self, rows: NDArray[np.intp]) -> EventTable:
        """Return the table of these rows, which must be in the order wanted (any order is allowed)."""
        columns = {name: getattr(self, name)[rows] for name in COMMON_DTYPES}
        kinds = columns["kind"]
        position = self.position_in_kind
        payloads: dict[int, Payload] = {}
        for index in np.flatnonzero(np.bincount(kinds, minlength=len(self.kinds))).tolist():
            if index in self.payloads:
                chosen = position[rows[kinds == index]]
                payloads[index] = ConcatPayload([(self.payloads[index], chosen)], [len(chosen)])
        return EventTable(columns, self.kinds, payloads)

    def slice(self, start: int, stop: int) -> EventTable:
        """Return rows start..stop as a table; its columns are views of this one's."""
        columns = {name: getattr(self, name)[start:stop] for name in COMMON_DTYPES}
        payloads: dict[int, Payload] = {}
        for index, payload in self.payloads.items():
            first, last = np.searchsorted(self.rows(self.kinds[index].name), (start, stop))
            if last > first:
                payloads[index] = ConcatPayload([(payload, np.arange(first, last))], [last - first])
        return EventTable(columns, self.kinds, payloads)

    @staticmethod
    def concat(tables: Sequence[EventTable], *, shared: bool = False) -> EventTable:
        """Return the rows of tables that share their kinds, one after the other.

        Parameters
        ----------
        shared : use the columns and row numbers that the tables keep, for short-lived results: the tables stay alive
        """
        kinds = tables[0].kinds
        assert all(table.kinds == kinds for table in tables)
        columns = {name: np.concatenate([getattr(table, name) for table in tables]) for name in COMMON_DTYPES}
        payloads: dict[int, Payload] = {}
        for index in {i for table in tables for i in table.payloads}:
            parts = [t for t in tables if index in t.payloads]
            counts = [t.count(kinds[index].name) for t in parts]
            of_parts = [_CachedPayload(t, index) if shared else t.payloads[index] for t in parts]
            payloads[index] = ConcatPayload([(payload, None) for payload in of_parts], counts)
        return EventTable(columns, kinds, payloads)


class _CachedPayload:
    """A payload of a table whose whole columns the table keeps, so that each is decoded once.

    Parameters
    ----------
    table : EventTable
    index : of the kind
    """

    def __init__(self, table: EventTable, index: int) -> None:
        self._table = table
        self._index = index
        self.fields = table.payloads[index].fields

    def column(self, name: str, rows: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """See Payload."""
        if rows is None:
            return self._table.field(self._table.kinds[self._index].name, name)
        return self._table.payloads[self._index].column(name, rows)

    def told(self, name: str) -> NDArray[np.bool_] | None:
        """See Payload."""
        return self._table.payloads[self._index].told(name)
