"""Parquet and Arrow files that kvmtrace wrote, as a Recording; columns are read when asked for."""

from __future__ import annotations

import json
import threading
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kvmtrace._native.parquet_footer import column_chunks
from kvmtrace.errors import FormatError
from kvmtrace.formats.arrow.arrow_claims import validate_buffers, validate_pages, validate_values
from kvmtrace.formats.arrow.arrow_groups import is_number, unpack_groups, value_of
from kvmtrace.formats.arrow.arrow_schema import METADATA_KEY, SCHEMA, check_types, kinds_of, stored_as
from kvmtrace.formats.arrow.arrow_values import field_values, kind_numbers, number_values
from kvmtrace.formats.arrow.arrow_window import StoredRows, Window
from kvmtrace.formats.common.metadata import PRINTED_NAMES, clean_meta
from kvmtrace.formats.trace_dat.pages import MAX_CPU
from kvmtrace.isa.printed import remember_printed
from kvmtrace.table.event_table import COMMON_DTYPES
from kvmtrace.table.recording import Capture, Damage, Loss, Recording

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from kvmtrace.formats.arrow.arrow_groups import RowGroup
    from kvmtrace.table.event_table import EventTable

PARQUET_MAGIC = b"PAR1"
_DAMAGE = (
    pa.ArrowException,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
MIN_ROWS, ROWS_PER_BYTE = 1 << 20, 4  # that a file may have; real ones have a tenth of a row in each byte
ROW_DTYPE = np.dtype(np.int64)


def _capture(told: Any, path: str, file_format: str) -> Capture:
    """Return what a recording's file told; members of other types than Capture's count as absent."""
    n_cpus, cost = told.get("n_cpus"), told.get("tracer_cost_ns_per_event")
    known = clean_meta(
        {
            **{name: told.get(name) for name in ("host", "kernel", "cpu_model", "clock", "backend")},
            "events": list(told.get("events") or ()),
            "cost_ns_per_event": cost,
        }
    )
    texts = {name: known.get(name) for name in ("host", "kernel", "cpu_model", "clock", "backend")}
    return Capture(
        path,
        file_format,
        **texts,
        events=tuple(known.get("events") or ()),
        n_cpus=n_cpus if type(n_cpus) is int and 0 < n_cpus <= MAX_CPU else None,
        tracer_cost_ns_per_event=known.get("cost_ns_per_event"),
        meta=_remembered(clean_meta(told.get("meta"))),
    )


def _remembered(meta: dict[str, Any]) -> dict[str, Any]:
    """Take in the names of exit reasons that no table has."""
    remember_printed(meta.get(PRINTED_NAMES))
    return meta


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
    damage = tuple(
        Damage(_count(d["offset"]), None if d["cpu"] is None else _count(d["cpu"]), str(d["expected"]), str(d["found"]))
        for d in told["damage"]
    )
    return Loss(
        None if told["events"] is None else _count(told["events"]),
        {int(cpu): _count(n) for cpu, n in told["by_cpu"].items()},
        bool(told["truncated"]),
        damage,
    )


class ArrowRecording(Recording):
    """Events of a Parquet or Arrow file.

    Parameters
    ----------
    data : memoryview, the file
    path : str
    """

    def __init__(self, data: memoryview, path: str) -> None:
        self._path = path
        self._own = threading.local()  # a ParquetFile is not made for two threads: each has its own
        self._parquet = bytes(data[:4]) == PARQUET_MAGIC
        self._about: list[RowGroup] | None = None  # the row groups, if they are as written here
        self._rows: dict[int, int] = {}  # else of each of them, as far as asked for
        self._window_numbers: list[int] = []
        self._columns: dict[str, int] = {}  # of a Parquet file: path -> number
        self._chunks = np.empty((0, 0, 4), np.int64)  # of a Parquet file, see column_chunks
        self._seen: set[tuple[int, int]] = set()  # row groups and columns whose pages were looked at
        try:
            self._file = self._open(data)
            self._check_rows(len(data))
            self._schema = schema = self._file.schema_arrow if self._parquet else self._file.schema
            told = json.loads((schema.metadata or {}).get(METADATA_KEY, b"null"))
            self._take_in(told)
            check_types(schema, self.kinds)
            self._window_rows = max(int(told["window_rows"]), 1)
            if self._parquet:
                self._about = unpack_groups(data)
                self._check_groups()
        except _DAMAGE as error:
            raise self._fail(error) from error
        self._index = {kind.name: i for i, kind in enumerate(self.kinds)}
        self._events: EventTable | None = None

    def _open(self, data: memoryview) -> Any:
        self._data, self._source = data, pa.py_buffer(data)
        if self._parquet:
            import pyarrow.parquet as pq

            return pq.ParquetFile(pa.BufferReader(self._source))
        validate_buffers(data)
        return pa.ipc.open_file(self._source)

    def _check_rows(self, size: int) -> None:
        """Hold the rows that the file claims against its size: a column of one value takes no room."""
        rows = self._file.metadata.num_rows if self._parquet else 0  # of Arrow files each batch is checked when read
        if rows > max(MIN_ROWS, size * ROWS_PER_BYTE):
            raise ValueError(f"{rows} rows in {size} bytes")

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

    def _check_groups(self) -> None:
        if self._about is not None and (
            len(self._about) != self._n_groups()
            or min((about.rows for about in self._about), default=0) < 0
            or sum(about.rows for about in self._about) != self._file.metadata.num_rows
        ):
            raise ValueError("row groups of other sizes than they say")

    def events(self) -> EventTable:
        """Return all events (cached)."""
        if self._events is None:
            window = self._window(range(self._n_groups()))
            self._events = window.table(0, len(window))
        return self._events

    def iter_events(self, max_events: int = 4_000_000) -> Iterator[EventTable]:
        """Yield tables of about `max_events` rows; memory is bounded by them and by the windows they lie in."""
        before: Window | None = None
        for groups in self._windows(max_events):
            window = self._window(groups)
            if before is not None:
                window.read_ahead(before)
            before = window
            self.read_share = (groups[-1] + 1) / max(self._n_groups(), 1)
            n_parts = max(round(len(window) / max_events), 1)
            bounds = [len(window) * i // n_parts for i in range(n_parts + 1)]
            for start, stop in pairwise(bounds):
                if stop > start:
                    yield window.table(start, stop)

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
        if self._about is not None:
            return self._about[group].rows
        if group not in self._rows:
            self._rows[group] = len(self._guarded([group], ["cpu"]))
        return self._rows[group]

    def _window_of(self, group: int) -> int:
        """Return the number of the window that a row group belongs to."""
        if self._about is not None:
            return self._about[group].window
        if not self._parquet:
            return group
        # written again by somebody else: row groups that overlap have to be read together
        if not self._window_numbers:
            last, number = -1, -1
            for i in range(self._n_groups()):
                row = self._common([i], ["row"])["row"][0]
                number += not len(row) or int(row.min()) > last
                last = max(last, int(row.max()) if len(row) else last)
                self._window_numbers.append(number)
        return self._window_numbers[group]

    def _guarded(self, groups: Sequence[int], names: Sequence[str]) -> pa.Table:
        try:
            return self._read_groups(groups, names)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise self._fail(error) from error

    def _read(self, groups: Sequence[int], names: Sequence[str]) -> pa.Table:
        table = self._guarded(groups, names)
        if sorted(table.column_names) != sorted(names):
            raise self._fail(ValueError(f"no column {', '.join(sorted(set(names) - set(table.column_names)))}"))
        if len(table) != sum(map(self._group_rows, groups)):
            raise self._fail(ValueError("row groups of other sizes than they say"))
        return table

    def _read_groups(self, groups: Sequence[int], names: Sequence[str]) -> pa.Table:
        if self._parquet:
            if not hasattr(self._own, "file"):
                import pyarrow.parquet as pq

                source, metadata = pa.BufferReader(self._source), self._file.metadata
                texts = [f.name for f in self._schema if pa.types.is_string(f.type) or pa.types.is_binary(f.type)]
                self._own.file = pq.ParquetFile(source, metadata=metadata, read_dictionary=texts)
            self._look_at(groups, names)
            return self._own.file.read_row_groups(list(groups), columns=list(names), use_threads=False)
        # only these columns are decompressed
        fields = [self._schema.get_field_index(name) for name in names]
        if min(fields) < 0:
            raise KeyError(f"no column {names[fields.index(-1)]}")
        file = pa.ipc.open_file(self._source, options=pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False))
        table = pa.Table.from_batches([file.get_batch(g) for g in groups], file.schema).select(list(names))
        table.validate(full=True)  # its buffers are the file's bytes as they are
        return table

    def _look_at(self, groups: Sequence[int], names: Sequence[str]) -> None:
        """See that what is to be read becomes no larger than such a file can make it."""
        metadata = self._file.metadata
        if not self._columns:
            self._columns = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
            self._chunks = column_chunks(self._data, metadata.num_row_groups, metadata.num_columns)
        for group in groups:
            for number in (self._columns[name] for name in names if name in self._columns):
                if (group, number) not in self._seen:
                    validate_pages(self._data, self._chunks[group, number].tolist())
                    self._seen.add((group, number))

    def _window(self, groups: Sequence[int]) -> Window:
        names = [*COMMON_DTYPES, *(["row"] if self._parquet else [])]
        columns: dict[str, list[Any]] = {name: [None] * len(groups) for name in names}
        wanted: dict[tuple[int, ...], list[str]] = {}  # columns that are to be read of the same row groups
        for name, values in columns.items():
            values[:] = [self._constant(group, name) for group in groups]
            wanted.setdefault(tuple(i for i, value in enumerate(values) if value is None), []).append(name)
        for numbers, together in wanted.items():
            for name, parts in self._common([groups[i] for i in numbers], together).items():
                for i, part in zip(numbers, parts, strict=True):
                    columns[name][i] = part
        bounds = accumulate(map(self._group_rows, groups), initial=0)
        rows = columns.pop("row") if self._parquet else [np.arange(*bound) for bound in pairwise(bounds)]
        return Window(StoredRows(groups, columns, rows), self.kinds, self._read_fields)

    def _common(self, groups: Sequence[int], names: Sequence[str]) -> dict[str, list[NDArray[Any]]]:
        """Return common columns, each as its values in every one of the row groups."""
        if not groups:
            return {}
        table = self._read(groups, [stored_as(name) for name in names])
        bounds = list(accumulate(map(self._group_rows, groups), initial=0))
        found = {}
        for name in names:
            column = table.column(stored_as(name))
            found[name] = [self._numbers(column.slice(first, last - first), name) for first, last in pairwise(bounds)]
        return found

    def _constant(self, group: int, name: str) -> int | None:
        """Return the value that a common column has in all rows of a row group, None if that is not known."""
        told = None if self._about is None else self._about[group].same.get(stored_as(name))
        if name == "kind":
            return self._index.get(told) if isinstance(told, str) else None
        return value_of(told, COMMON_DTYPES.get(name, ROW_DTYPE), -1 if name == "cpu" else None)

    def _read_fields(
        self, groups: Sequence[int], wanted: Mapping[str, np.dtype[Any]], rows: NDArray[np.intp] | None
    ) -> dict[str, NDArray[Any]]:
        constant = {name: self._constant_field(groups, name, dtype, rows) for name, dtype in wanted.items()}
        found = {name: values for name, values in constant.items() if values is not None}
        others = [name for name in wanted if name not in found]
        if not others:
            return found
        try:
            for name in others:
                validate_values(sum(map(self._group_rows, groups)), wanted[name].itemsize, len(self._data))
        except ValueError as error:
            raise self._fail(error) from error
        table = self._read(groups, others)
        try:
            return found | {name: field_values(table.column(name), wanted[name], rows) for name in others}
        except (pa.ArrowException, ValueError) as error:
            raise self._fail(error) from error

    def _constant_field(
        self, groups: Sequence[int], name: str, dtype: np.dtype[Any], rows: NDArray[np.intp] | None
    ) -> NDArray[Any] | None:
        """Return a field that is the same in all rows of these row groups, None if that is not known."""
        if self._about is None or not is_number(dtype):
            return None
        told = {value_of(self._about[group].same.get(name), dtype) for group in groups}
        if len(told) != 1 or None in told:
            return None
        n = sum(map(self._group_rows, groups)) if rows is None else len(rows)
        return np.broadcast_to(np.array(told.pop(), dtype), n)  # one value in memory, whose steps are 0 bytes

    def _numbers(self, column: pa.ChunkedArray, name: str) -> NDArray[Any]:
        """Return the values of a common column."""
        if column.null_count:
            raise self._fail(ValueError(f"nulls in column {name}"))
        try:
            values = kind_numbers(column, self._index) if name == "kind" else number_values(column)
            values = values.astype(COMMON_DTYPES.get(name, ROW_DTYPE), copy=False)
            if name == "cpu" and len(values) and values.min() < -1:
                raise ValueError(f"CPU {values.min()}")  # noqa: TRY301 - damage like the others
        except (pa.ArrowException, LookupError, ValueError) as error:
            raise self._fail(error) from error
        return values
