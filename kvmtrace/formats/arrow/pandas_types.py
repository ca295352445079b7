"""What a file's schema tells pandas, so that integers stay integers where rows have none: pandas' nullable types.

Source: pandas' developer guide, "Storing pandas DataFrame objects in Apache Parquet format"
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Mapping


def with_pandas_types(schema: pa.Schema) -> pa.Schema:
    """Return a schema that pandas reads with nullable types (Int64, UInt64, boolean) for its nullable numbers."""
    columns = [_column(field) for field in schema]
    about = {"index_columns": [], "column_indexes": [], "columns": columns, "creator": {"library": "kvmtrace"}}
    metadata: Mapping[bytes, bytes] = schema.metadata or {}
    return schema.with_metadata({**metadata, b"pandas": json.dumps(about).encode()})


def _column(field: pa.Field) -> dict[str, Any]:
    kind = str(field.type)
    numpy_type = "object"
    if pa.types.is_boolean(field.type):
        kind, numpy_type = "bool", "boolean" if field.nullable else "bool"
    elif pa.types.is_integer(field.type):
        numpy_type = kind.replace("u", "U").replace("int", "Int") if field.nullable else kind
    elif pa.types.is_floating(field.type):
        numpy_type = {"halffloat": "float16", "float": "float32", "double": "float64"}.get(kind, "float64")
    return {
        "name": field.name,
        "field_name": field.name,
        "pandas_type": kind,
        "numpy_type": numpy_type,
        "metadata": None,
    }
