"""CSV cells: bytes as hexadecimal, and no text that a spreadsheet would take for a formula.

A traced text that begins with = + - @, a tab or a carriage return gets an apostrophe before it, as OWASP's "CSV
Injection" advises: names of threads come from whoever ran them.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

_FORMULA = r"^[=+\-@\t\r]"


def csv_types(schema: pa.Schema) -> pa.Schema:
    """Return the schema of the cells."""
    return pa.schema([pa.field(field.name, _type(field.type)) for field in schema])


def csv_table(table: pa.Table) -> pa.Table:
    """Return a table's cells."""
    return pa.table([_cells(column) for column in table.columns], schema=csv_types(table.schema))


def _type(kind: pa.DataType) -> pa.DataType:
    return pa.string() if _is_bytes(kind) or pa.types.is_dictionary(kind) else kind


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _cells(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if _is_bytes(column.type):
        return pa.chunked_array([[None if v is None else v.hex() for v in column.to_pylist()]], pa.string())
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.string())
    if not pa.types.is_string(column.type):
        return column
    return pc.replace_substring_regex(column, _FORMULA, "'\\0")
