"""Write rows that are no events (VM-exits, userspace exits) as Parquet, Arrow and CSV, in the order they come."""

from __future__ import annotations

from itertools import chain
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa

from kvmtrace.formats.arrow.csv_cells import csv_table, csv_types
from kvmtrace.formats.arrow.pandas_types import with_pandas_types

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvmtrace.table.columns import RowColumn


def _array(column: RowColumn) -> pa.Array:
    if column.texts is None:
        return pa.array(column.values, mask=column.absent)
    return pa.array([*column.texts, ""]).take(pa.array(column.values, mask=column.absent))


def _schema(columns: Mapping[str, RowColumn]) -> pa.Schema:
    fields = [pa.field(name, _array(one).type, nullable=one.absent is not None) for name, one in columns.items()]
    return with_pandas_types(pa.schema(fields))


def write_rows(parts: Iterable[Mapping[str, RowColumn]], out: IO[bytes], kind: str) -> None:
    """Write a table.

    Parameters
    ----------
    parts : consecutive rows as columns, all with the same columns; there is at least one, of no rows perhaps
    out : binary file
    kind : "parquet", "arrow" or "csv"
    """
    rest = iter(parts)
    first = next(rest)
    schema = _schema(first)
    with _writer(out, schema, kind) as writer:
        for columns in chain([first], rest):
            batch = pa.table([_array(column) for column in columns.values()], schema=schema)
            if batch.num_rows:
                writer.write_table(csv_table(batch) if kind == "csv" else batch)


def _writer(out: IO[bytes], schema: pa.Schema, kind: str) -> Any:
    if kind == "csv":
        from pyarrow import csv

        return csv.CSVWriter(out, csv_types(schema))
    if kind == "arrow":
        return pa.ipc.new_file(out, schema, options=pa.ipc.IpcWriteOptions(compression="lz4"))
    import pyarrow.parquet as pq

    return pq.ParquetWriter(out, schema, compression="zstd")
