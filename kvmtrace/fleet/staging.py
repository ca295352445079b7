"""Summaries read into tables of DuckDB: each object once for all that a query needs, remote ones many at a time.

What opening an object costs (its footer tells of some 150 columns) is most of what reading it costs, so tables that
are needed together are read together, and a query finds them in the database.
"""

from __future__ import annotations

import glob
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvmtrace.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pyarrow as pa

    from kvmtrace.fleet.store import Store

AT_ONCE = 2000  # objects of one query; so many copies of remote ones lie on this machine


class ObjectReader:
    """Reads columns of Parquet objects into tables of a database.

    Parameters
    ----------
    connection : of DuckDB
    scratch : folder for the copies of remote objects
    """

    def __init__(self, connection: Any, store: Store, scratch: Path) -> None:
        self.connection = connection
        self.store = store
        self.scratch = scratch

    def read(self, table: str, objects: Sequence[str], columns: Sequence[str], schema: pa.Schema) -> None:
        """Make a table of some columns of all rows, and of the column `object`: the name of the object they come from.

        Raises
        ------
        FormatError
            An object is no summary, or is damaged.
        """
        import duckdb

        names = ", ".join(f'"{name}"' for name in columns)
        self.connection.register("of_schema", schema.empty_table())
        self.connection.execute(f"CREATE TABLE {table} AS SELECT {names}, '' AS object FROM of_schema")
        self.connection.unregister("of_schema")
        for paths in self._at_hand(objects):
            try:
                self.connection.execute(
                    f"INSERT INTO {table} SELECT {names}, parse_filename(filename) FROM "
                    "read_parquet($paths, hive_partitioning = false, filename = true)",
                    {"paths": paths},
                )
            except duckdb.Error as error:
                told = " ".join(str(error).split())[:200]
                raise FormatError(self.store.url, None, "summaries made by `kvmtrace fleet summarize`", told) from error

    def _at_hand(self, objects: Sequence[str]) -> Iterator[list[str]]:
        """Give the paths of AT_ONCE objects after the other on this machine's file system."""
        for first in range(0, len(objects), AT_ONCE):
            some = objects[first : first + AT_ONCE]
            if self.store.is_local:
                yield [glob.escape(path) for path in some]
                continue
            folder = self.scratch / "objects"
            copies = [str(folder / str(i) / Path(path).name) for i, path in enumerate(some)]
            try:
                self.store.filesystem.get(list(some), copies)
                yield copies
            finally:
                shutil.rmtree(folder, ignore_errors=True)
