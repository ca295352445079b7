"""Parquet and Arrow files that kvmtrace wrote, as a Recording; columns are read when asked for."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kvmtrace.decode.metadata import clean_meta
from kvmtrace.decode.pages import MAX_CPU
from kvmtrace.errors import FormatError, MissingEventError
from kvmtrace.events.arrow_schema import METADATA_KEY, SCHEMA, kinds_of
from kvmtrace.events.recording import Capture, Damage, Loss, Recording
from kvmtrace.events.table import COMMON_DTYPES, EventTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from kvmtrace.decode.payload import Payload

PARQUET_MAGIC = b"PAR1"
COMMON_COLUMNS = tuple("event" if name == "kind" else name for name in COMMON_DTYPES)


def _column_values(column: pa.ChunkedArray, dtype: np.dtype[Any], rows: NDArray[np.intp] | None) -> NDArray[Any]:
    """Return a field's column at these rows (None: all of them, in their order) as NumPy values."""
    if pa.types.is_fixed_size_binary(column.type):
        arrays = _array_values(column, dtype)
        return arrays if rows is None else arrays[rows]
    if dtype.kind in "SO" or dtype.shape or dtype.kind == "V":
        return _object_values(column if rows is None else column.take(pa.array(rows)), dtype)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    # values stand in place also where they are null, so that no mask is needed
    parts = [np.frombuffer(c.buffers()[1], column.type.to_pandas_dtype(), len(c), c.offset * (c.type.bit_width // 8))
             if c.buffers()[1] is not None else np.zeros(len(c), column.type.to_pandas_dtype())
             for c in column.chunks]
    whole = parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, dtype)])
    return (whole if rows is None else whole[rows]).astype(dtype, copy=False)


def _array_values(column: pa.ChunkedArray, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return arrays of one size; like numbers they stand in place also where they are null."""
    size = column.type.bit_width // 8
    parts = [np.zeros(0, np.uint8)]
    for c in column.chunks:
        data = c.buffers()[1]
        parts.append(np.zeros(len(c) * size, np.uint8) if data is None
                     else np.frombuffer(data, np.uint8, len(c) * size, c.offset * size))
    return np.concatenate(parts).view(dtype.base).reshape(len(column), *dtype.shape)


def _object_values(column: pa.ChunkedArray, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return strings, arrays and bytes as NumPy values."""
    n = len(column)
    if dtype.kind == "S":
        values = np.array([v.encode() for v in column.to_pylist()] or [b""], "S")[:n]
        return values.astype(dtype) if dtype.itemsize else values
    if dtype.kind == "O":
        return np.array([*column.to_pylist(), None], object)[:-1]
    return np.frombuffer(b"".join(column.to_pylist()), dtype.base).reshape(n, *dtype.shape)


@dataclass(frozen=True)
class KindRows:
    """Where the events of a kind are.

    Parameters
    ----------
    groups : row groups that hold them
    rows : their rows among those of these groups, in recorded order; None: all rows as they are
    """

    groups: list[int]
    rows: NDArray[np.intp] | None


class ArrowPayload:
    """Fields of a kind in a columnar file; a column is read once and kept.

    Parameters
    ----------
    kind_name, fields : of the kind
    read : gives a column of the file by row groups and name; two threads may ask at once
    where : gives the kind's place in the file
    fail : makes the error that says that the file is damaged
    """

    def __init__(self, kind_name: str, fields: Mapping[str, np.dtype[Any]],
                 read: Callable[[Sequence[int], str], pa.ChunkedArray], where: Callable[[], KindRows],
                 fail: Callable[[Exception], FormatError]) -> None:
        self.fields = dict(fields)
        self._kind_name = kind_name
        self._read = read
        self._make_where = where
        self._fail = fail
        self._where: KindRows | None = None
        self._columns: dict[str, NDArray[Any]] = {}
        self._lock = threading.Lock()

    def column(self, name: str, rows: NDArray[np.intp] | None = None) -> NDArray[Any]:
        """See Payload."""
        if name not in self.fields:
            raise MissingEventError(f"field {name} was not recorded")
        with self._lock:
            if name not in self._columns:
                self._columns[name] = self._whole(name)
        values = self._columns[name]
        return values if rows is None else values[rows]

    def _whole(self, name: str) -> NDArray[Any]:
        if self._where is None:
            self._where = self._make_where()
        column = self._read(self._where.groups, f"{self._kind_name}.{name}")
        try:
            return _column_values(column, self.fields[name], self._where.rows)
        except (pa.ArrowException, ValueError, TypeError, AttributeError, IndexError, NotImplementedError) as error:
            raise self._fail(error) from error


class _Recorded:
    """Puts values of stored rows into recorded order.

    Parameters
    ----------
    row : int64, the stored rows' numbers in the recording
    """

    def __init__(self, row: NDArray[np.int64]) -> None:
        self.stored_so = not len(row) or bool((row[1:] >= row[:-1]).all())
        self._place: NDArray[np.int64] | None = None
        self._order: NDArray[np.intp] | None = None
        if self.stored_so:
            return
        place = row - row.min()
        if int(place.min()) == 0 and int(place.max()) < len(row):
            taken = np.zeros(len(row), bool)
            taken[place] = True
            if taken.all():  # each number stands once: it is the row's place
                self._place = place
                return
        self._order = np.argsort(row, kind="stable")

    def __call__(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return the values in recorded order."""
        if self._place is not None:
            out = np.empty_like(values)
            out[self._place] = values
            return out
        return values if self._order is None else values[self._order]


@dataclass(frozen=True)
class _Window:
    """Row groups read together.

    Parameters
    ----------
    groups : their numbers in the file
    bounds : shape (groups + 1,), the first row of each among those of all
    kinds, row : of each row, as stored
    counts : shape (groups, kinds)
    """

    groups: Sequence[int]
    bounds: list[int]
    kinds: NDArray[np.uint16]
    row: NDArray[np.int64]
    counts: NDArray[np.intp]

    def rows_of(self, index: int) -> KindRows:
        """Return where the events of kind `index` are."""
        own = np.flatnonzero(self.counts[:, index]).tolist()
        positions, rows, begin = [], [], 0
        for i in own:
            first, last = self.bounds[i], self.bounds[i + 1]
            alone = self.counts[i, index] == last - first
            within = np.arange(last - first) if alone else np.flatnonzero(self.kinds[first:last] == index)
            positions.append(within + begin)
            rows.append(self.row[within + first])
            begin += last - first
        position = np.concatenate(positions)
        recorded = _Recorded(np.concatenate(rows))
        if recorded.stored_so and len(position) == begin:
            return KindRows([self.groups[i] for i in own], None)
        return KindRows([self.groups[i] for i in own], recorded(position))


def _capture(told: Any, path: str, file_format: str) -> Capture:
    """Return what a recording's file told; members of other types than Capture's count as absent."""
    n_cpus, cost = told.get("n_cpus"), told.get("tracer_cost_ns_per_event")
    known = clean_meta({**{name: told.get(name) for name in ("host", "kernel", "cpu_model", "clock", "backend")},
                        "events": list(told.get("events") or ()), "cost_ns_per_event": cost})
    texts = {name: known.get(name) for name in ("host", "kernel", "cpu_model", "clock", "backend")}
    return Capture(path, file_format, **texts, events=tuple(known.get("events") or ()),
                   n_cpus=n_cpus if type(n_cpus) is int and 0 < n_cpus <= MAX_CPU else None,
                   tracer_cost_ns_per_event=known.get("cost_ns_per_event"), meta=clean_meta(told.get("meta")))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"no count: {value!r}"[:60])
    return value


def _tid(value: Any) -> int:
    number = int(value)
    if not -1 <= number < 1 << 31:
        raise ValueError(f"no thread: {number}"[:60])
    return number


def _loss(told: Any) -> Loss:
    """Return the loss that a file tells; ValueError, KeyError or TypeError where it is none."""
    damage = tuple(Damage(_count(d["offset"]), None if d["cpu"] is None else _count(d["cpu"]), str(d["expected"]),
                          str(d["found"])) for d in told["damage"])
    return Loss(None if told["events"] is None else _count(told["events"]),
                {int(cpu): _count(n) for cpu, n in told["by_cpu"].items()}, bool(told["truncated"]), damage)


class ArrowRecording(Recording):
    """Events of a Parquet or Arrow file.

    Parameters
    ----------
    data : memoryview, the file
    path : str
    """

    def __init__(self, data: memoryview, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._parquet = bytes(data[:4]) == PARQUET_MAGIC
        try:
            self._file = self._open(data)
            schema = self._file.schema_arrow if self._parquet else self._file.schema
            told = json.loads((schema.metadata or {}).get(METADATA_KEY, b"null"))
            self._take_in(told)
            self._window_rows = max(int(told["window_rows"]), 1)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._fail(error) from error
        self._index = {kind.name: i for i, kind in enumerate(self.kinds)}
        self._events: EventTable | None = None

    def _open(self, data: memoryview) -> Any:
        source = pa.BufferReader(pa.py_buffer(data))
        if self._parquet:
            import pyarrow.parquet as pq

            return pq.ParquetFile(source)
        return pa.ipc.open_file(source)

    def _fail(self, error: Exception) -> FormatError:
        expected = "a Parquet or Arrow file written by kvmtrace export"
        return FormatError(self._path, None, expected, " ".join(str(error).split())[:200] or type(error).__name__)

    def _take_in(self, told: Any) -> None:
        """Take in the metadata."""
        if not isinstance(told, dict) or told.get("schema") != SCHEMA:
            raise ValueError("another table")
        self.kinds = kinds_of(told["kinds"])
        self.capture = _capture(told["capture"], self._path, "parquet" if self._parquet else "arrow")
        self.loss = _loss(told["loss"])
        self.comms = {_tid(tid): str(comm) for tid, comm in told["comms"].items()}
        self.processes = {_tid(tid): _tid(pid) for tid, pid in told["processes"].items()}

    def events(self) -> EventTable:
        """Return all events (cached)."""
        if self._events is None:
            self._events = self._table(list(range(self._n_groups())))
        return self._events

    def iter_events(self, max_events: int = 4_000_000) -> Iterator[EventTable]:
        """Yield tables of about `max_events` rows; memory is bounded by them and by the windows they lie in."""
        for groups in self._windows(max_events):
            table = self._table(groups)
            n_parts = max(round(len(table) / max_events), 1)
            bounds = [len(table) * i // n_parts for i in range(n_parts + 1)]
            for start, stop in pairwise(bounds):
                if stop > start:
                    yield table if n_parts == 1 else table.slice(start, stop)

    def _windows(self, max_events: int) -> Iterator[list[int]]:
        """Yield the row groups of whole windows, of `max_events` rows or one window each."""
        groups: list[int] = []
        rows, window = 0, -1
        for group in range(self._n_groups()):
            own = self._window_of(group)
            if own != window and rows >= max(max_events - self._window_rows + 1, 1):
                yield groups
                groups, rows = [], 0
            groups.append(group)
            rows += self._group_rows(group)
            window = own
        if groups:
            yield groups

    def _n_groups(self) -> int:
        return int(self._file.num_row_groups if self._parquet else self._file.num_record_batches)

    def _group_rows(self, group: int) -> int:
        if self._parquet:
            return int(self._file.metadata.row_group(group).num_rows)
        return int(self._file.get_batch(group).num_rows)

    def _window_of(self, group: int) -> int:
        """Return the number of the window that a row group belongs to."""
        if not self._parquet:
            return group
        statistics = self._file.metadata.row_group(group).column(0).statistics
        if statistics is None or not statistics.has_min_max:
            raise self._fail(ValueError("no statistics of column row"))
        return int(statistics.min) // self._window_rows

    def _read(self, groups: Sequence[int], names: Sequence[str]) -> pa.Table:
        try:
            with self._lock:  # a ParquetFile is not made for two threads
                table = self._read_groups(groups, names)
        except (pa.ArrowException, OSError, KeyError) as error:
            raise self._fail(error) from error
        if set(table.column_names) != set(names):
            raise self._fail(ValueError(f"no column {', '.join(set(names) - set(table.column_names))}"))
        return table

    def _read_groups(self, groups: Sequence[int], names: Sequence[str]) -> pa.Table:
        if self._parquet:
            return self._file.read_row_groups(list(groups), columns=list(names))
        batches = [self._file.get_batch(g) for g in groups]
        table = pa.Table.from_batches(batches, self._file.schema).select(list(names))
        table.validate(full=True)  # its buffers are the file's bytes as they are
        return table

    def _table(self, groups: Sequence[int]) -> EventTable:
        common = self._read(groups, [*(["row"] if self._parquet else []), *COMMON_COLUMNS])
        row = self._numbers(common, "row") if self._parquet else np.arange(len(common))
        recorded = _Recorded(row)
        stored = {name: self._common(common, name) for name in COMMON_DTYPES}
        columns = {name: recorded(values) for name, values in stored.items()}
        bounds = [0, *accumulate(self._group_rows(group) for group in groups)]
        if bounds[-1] != len(common):
            raise self._fail(ValueError("row groups of other sizes than they say"))
        counts = np.array([np.bincount(stored["kind"][first:last], minlength=len(self.kinds))
                           for first, last in pairwise(bounds)]).reshape(len(groups), len(self.kinds))
        window = _Window(groups, bounds, stored["kind"], row, counts)
        payloads: dict[int, Payload] = {}
        for index in np.flatnonzero(counts.any(axis=0)).tolist():
            payloads[index] = self._payload(index, partial(window.rows_of, index))
        return EventTable(columns, self.kinds, payloads)

    def _payload(self, index: int, where: Callable[[], KindRows]) -> Payload:
        kind = self.kinds[index]
        return ArrowPayload(kind.name, kind.fields, lambda groups, name: self._read(groups, [name]).column(0), where,
                            self._fail)

    def _numbers(self, table: pa.Table, name: str) -> NDArray[np.int64]:
        try:
            numbers: NDArray[np.int64] = table.column(name).to_numpy().astype(np.int64, copy=False)
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise self._fail(error) from error
        return numbers

    def _common(self, table: pa.Table, name: str) -> NDArray[Any]:
        column = table.column("event" if name == "kind" else name)
        if column.null_count:
            raise self._fail(ValueError(f"nulls in column {name}"))
        try:
            values = self._kind_numbers(column) if name == "kind" else column.to_numpy()
            values = np.ascontiguousarray(values.astype(COMMON_DTYPES[name], copy=False))
            if name == "cpu" and len(values) and values.min() < -1:
                raise ValueError(f"CPU {values.min()}")  # noqa: TRY301 - damage like the others
        except (pa.ArrowException, LookupError, ValueError, TypeError) as error:
            raise self._fail(error) from error
        return values

    def _kind_numbers(self, column: pa.ChunkedArray) -> NDArray[Any]:
        parts = [np.empty(0, np.uint16)]
        for chunk in column.chunks:
            encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
            numbers = np.array([self._index[n] for n in encoded.dictionary.to_pylist()] or [0], np.uint16)
            parts.append(numbers[encoded.indices.to_numpy()])
        return np.concatenate(parts)
