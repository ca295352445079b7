"""The event table as an Arrow schema: what `kvmtrace export` writes to Parquet and Arrow files.

One row per event, in recorded order, which is that of time; only in Parquet files that were written `grouped` it is
not. Columns:

| column        | type                | meaning                                                         |
|---------------|---------------------|-----------------------------------------------------------------|
| row           | int64               | position in the recording (Parquet only, see below)             |
| ts_ns         | int64               | time stamp of the capture's clock, ns                           |
| cpu           | int16               | host CPU, -1 unknown                                            |
| tid           | int32               | thread that was running, -1 none                                |
| event         | dictionary<string>  | kernel's name of the event                                      |
| irq_flags     | uint8               | TRACE_FLAG_* bits                                               |
| preempt_count | uint8               |                                                                 |
| EVENT.FIELD   | the field's         | null in rows of other events; one for each event that occurred  |

Strings are strings, arrays (instruction bytes) are fixed-size binary. pandas reads integers as integers, nullable
ones as Int64, UInt64 and so on. The schema's metadata holds, under the key
`kvmtrace`, one JSON object: `schema` ("kvmtrace.events/1"), `capture`, `loss`, `comms`, `processes`, `kinds`
(`name`, `system`, `fields` with NumPy's dtype strings) and `window_rows`.

Parquet files are cut into windows of `window_rows` events (the first of a quarter as many), each a row group. Those
that were written `grouped` (`export --grouped`) have several in a window: of each busy vCPU thread one for each usual
event and one for its others, and one for the rest of the window, so that a reader who wants a time span, a vCPU or an
event skips the others by the statistics of `ts_ns`, `tid` and `event`; `row` restores the recorded order. What is the
same in all rows of a row group also stands before the footer, see `arrow_groups.py`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from kvmtrace.errors import FormatError
from kvmtrace.formats.arrow.arrow_claims import MAX_VALUE
from kvmtrace.formats.arrow.pandas_types import with_pandas_types
from kvmtrace.table.credible import is_credible
from kvmtrace.table.event_table import COMMON_DTYPES, EventKind

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Recording

TOLD = ":told"  # ends the name of a column that says which events tell the field of that name
SCHEMA = "kvmtrace.events/1"
METADATA_KEY = b"kvmtrace"
WINDOW_ROWS = 1 << 17  # every field of every kind is a column: some hundred bytes a row while it is written
MAX_COLUMNS = 4096  # each holds a value or null for every event, whatever its kind
_BASE = re.compile(r"[<>=|]?[biufSOV]\d{0,9}")


def arrow_type(dtype: np.dtype[Any]) -> pa.DataType:
    """Return the Arrow type that holds values of a field."""
    if dtype.kind == "S":
        return pa.string()
    if dtype.kind == "O" or not dtype.itemsize:  # old kernels declare "char buf;" of size 0
        return pa.binary()
    if dtype.shape or dtype.kind == "V":
        return pa.binary(max(dtype.itemsize, 1))
    return pa.from_numpy_dtype(dtype)


def stored_as(name: str) -> str:
    """Return the name of a common column's column in the file."""
    return "event" if name == "kind" else name


def dtype_text(dtype: np.dtype[Any]) -> str:
    """Return a dtype as text, "<u8" or, of subarrays, "15|u1"."""
    if not dtype.shape:
        return dtype.str
    return f"{'x'.join(map(str, dtype.shape))}|{dtype.base.str.lstrip('|')}"


def text_dtype(text: str) -> np.dtype[Any]:
    """Undo dtype_text; ValueError or TypeError where it is none."""
    shape, bar, base = text.rpartition("|")
    if not _BASE.fullmatch(base):  # NumPy's own reading of a text can evaluate it
        raise ValueError(f"dtype {text!r}")
    found = np.dtype((base, tuple(int(n) for n in shape.split("x")))) if bar and shape else np.dtype(text)
    if found.itemsize > MAX_VALUE:
        raise ValueError(f"a field of {found.itemsize} bytes")
    return found


def schema_of(
    recording: Recording, occurring: Collection[int], *, with_row: bool, window_rows: int | None = None
) -> pa.Schema:
    """Return the schema of a recording's table.

    Parameters
    ----------
    occurring : indices of the kinds whose fields become columns
    with_row : bool, the first column is `row`
    window_rows : events of a window of the file; None: WINDOW_ROWS
    """
    fields = [pa.field("row", pa.int64(), nullable=False)] if with_row else []
    for name, dtype in COMMON_DTYPES.items():
        kind = pa.dictionary(pa.int32(), pa.string()) if name == "kind" else pa.from_numpy_dtype(dtype)
        fields.append(pa.field("event" if name == "kind" else name, kind, nullable=False))
    for index in sorted(occurring):
        kind = recording.kinds[index]
        fields += [pa.field(f"{kind.name}.{n}", arrow_type(d)) for n, d in _stored_fields(recording, kind).items()]
    if len(fields) > MAX_COLUMNS:
        found = f"{len(fields):,} fields of {len(occurring):,} kinds of events"
        raise FormatError(recording.capture.path, None, f"at most {MAX_COLUMNS:,} columns to write", found)
    described = json.dumps(_describe(recording, occurring) | {"window_rows": window_rows or WINDOW_ROWS}).encode()
    return with_pandas_types(pa.schema(fields, {METADATA_KEY: described}))


def _stored_fields(recording: Recording, kind: EventKind) -> dict[str, np.dtype[Any]]:
    """Return a kind's fields, and for those that some of its events do not tell a column that says which do."""
    partly = recording.partly_told.get(kind.name, frozenset())
    return dict(kind.fields) | {f"{n}{TOLD}": np.dtype(bool) for n in kind.fields if n in partly}


def check_types(schema: pa.Schema, kinds: Sequence[EventKind]) -> None:
    """See that a file's columns have the types that are written here; which of them there are is seen on reading.

    Raises
    ------
    ValueError
        A column has another type.
    """
    written: dict[str, pa.DataType] = {"row": pa.int64()}
    written |= {name: pa.from_numpy_dtype(dtype) for name, dtype in COMMON_DTYPES.items() if name != "kind"}
    dtypes = {f"{kind.name}.{name}": dtype for kind in kinds for name, dtype in kind.fields.items()}
    for field in schema:
        found = field.type
        if field.name == "event":
            right = pa.types.is_string(found.value_type if pa.types.is_dictionary(found) else found)
        elif field.name in written:
            right = found == written[field.name]
        else:
            right = field.name not in dtypes or found == arrow_type(dtypes[field.name])
        if not right:
            raise ValueError(f"column {field.name} of {found}")


def _describe(recording: Recording, occurring: Collection[int]) -> dict[str, Any]:
    kinds = [
        {
            "name": k.name,
            "system": k.system,
            "fields": {n: dtype_text(d) for n, d in _stored_fields(recording, k).items()},
            **({"print_fmt": k.print_fmt} if i in occurring else {}),
        }
        for i, k in enumerate(recording.kinds)
    ]
    return {
        "schema": SCHEMA,
        "capture": dataclasses.asdict(recording.capture),
        "loss": dataclasses.asdict(recording.loss),
        "comms": recording.comms,
        "processes": recording.processes,
        "kinds": kinds,
    }


def _values_array(values: NDArray[Any]) -> pa.Array:
    """Return the values of a field, none null, as Arrow's."""
    if values.dtype.kind == "S":
        array = pa.array(values, pa.binary())
        try:
            return array.cast(pa.string())
        except pa.ArrowInvalid:  # names of threads are bytes to the kernel
            return pa.array([v.decode("utf-8", "replace") for v in values.tolist()], pa.string())
    if values.dtype.kind == "O":
        return pa.array(values.tolist(), pa.binary())
    if not values.dtype.itemsize or (values.ndim > 1 and not values.size):
        return pa.array([b""] * len(values), pa.binary())
    if values.ndim > 1 or values.dtype.kind == "V":
        flat = np.ascontiguousarray(values)
        size = flat.nbytes // max(len(flat), 1)
        return pa.FixedSizeBinaryArray.from_buffers(pa.binary(size), len(flat), [None, pa.py_buffer(flat)])
    return pa.array(values)


def _field_arrays(table: EventTable, kind: EventKind, fields: Collection[str]) -> dict[str, pa.Array]:
    """Return fields of a kind as columns over all rows, null in rows of other kinds."""
    rows, n = table.rows(kind.name), len(table)
    assert len(rows)
    present = np.zeros(n, bool)
    present[rows] = True
    valid = pa.py_buffer(np.packbits(present, bitorder="little"))
    out = {}
    for name in fields:
        if name.endswith(TOLD):
            values = _told(table, kind.name, name.removesuffix(TOLD))
        else:
            values = table.field(kind.name, name)
        if name + TOLD in fields and values.dtype.kind in "iub" and values.ndim == 1:  # null, not 0
            told = np.zeros(n, bool)
            told[rows] = _told(table, kind.name, name)
            spread = np.zeros(n, values.dtype)
            spread[rows] = values
            out[name] = pa.array(spread, mask=~told)
        elif len(rows) == n:  # a row group of one kind
            out[name] = _values_array(values)
        elif values.dtype.kind in "iuf" and values.ndim == 1:
            spread = np.zeros(n, values.dtype)
            spread[rows] = values
            out[name] = pa.Array.from_buffers(
                pa.from_numpy_dtype(values.dtype), n, [valid, pa.py_buffer(spread)], null_count=n - len(rows)
            )
        else:
            where = np.full(n, -1, np.int32)
            where[rows] = np.arange(len(rows), dtype=np.int32)
            out[name] = _values_array(values).take(pa.array(where, mask=~present))
    return out


class _Nulls:
    """Columns of n nulls, all made of the same zeros: most columns of a row group are such."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._made: dict[pa.DataType, pa.Array] = {}

    def of(self, kind: pa.DataType) -> pa.Array:
        """Return n nulls of a type."""
        if kind not in self._made:
            self._made[kind] = pa.nulls(self._n, kind)
        return self._made[kind]


def _told(table: EventTable, event: str, name: str) -> NDArray[np.bool_]:
    told = table.told(event, name)
    return np.ones(table.count(event), bool) if told is None else told


def table_arrays(table: EventTable, schema: pa.Schema, row: NDArray[np.int64]) -> pa.Table:
    """Return an event table's rows as an Arrow table of `schema`.

    Parameters
    ----------
    row : int64, position of each of the table's rows in the recording
    """
    columns: dict[str, pa.Array] = {"row": pa.array(row)}
    for name in COMMON_DTYPES:
        if name != "kind":
            columns[name] = pa.array(getattr(table, name))
    names = pa.array([kind.name for kind in table.kinds], pa.string())
    columns["event"] = pa.DictionaryArray.from_arrays(table.kind.astype(np.int32), names)
    wanted: dict[str, list[str]] = {}
    for field in schema:
        if field.name not in columns:
            event, _, name = field.name.rpartition(".")
            wanted.setdefault(event, []).append(name)
    for kind in table.kinds:
        if kind.name in wanted and table.count(kind.name):
            arrays = _field_arrays(table, kind, wanted[kind.name])
            columns.update({f"{kind.name}.{name}": array for name, array in arrays.items()})
    nulls = _Nulls(len(table))
    columns |= {field.name: nulls.of(field.type) for field in schema if field.name not in columns}
    return pa.table(
        [columns[f.name] if columns[f.name].type == f.type else columns[f.name].cast(f.type) for f in schema],
        schema=schema,
    )


def kinds_of(described: Sequence[Mapping[str, Any]]) -> tuple[EventKind, ...]:
    """Return the kinds of a file's metadata; KeyError, ValueError or TypeError where they are none."""
    kinds = []
    for kind in described:
        system = str(kind["system"])
        dtypes = {str(name): text_dtype(text) for name, text in kind["fields"].items()}
        fields = {name: dtype for name, dtype in dtypes.items() if is_credible(system, name, dtype)}
        kinds.append(EventKind(str(kind["name"]), system, fields, str(kind.get("print_fmt", ""))))
    return tuple(kinds)
