"""All summaries of a DEST as tables of DuckDB, which reads them out of core and adds them up."""

from __future__ import annotations

import re
import weakref
from contextlib import suppress
from copy import copy
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

from kvmtrace.errors import CapabilityError, FormatError, UsageError
from kvmtrace.fleet.staging import ObjectReader
from kvmtrace.fleet.store import FAILURES, SUMMARIES, Store
from kvmtrace.fleet.summary_schema import FAILURE, SUMMARY
from kvmtrace.scratch import ScratchFolder

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    import pyarrow as pa

# what every row of every table says of its recording
IDENTITY = ("checksum", "source", "host", "kernel", "cpu_model", "isa", "day", "duration_ns")
# table -> the list of the summary whose elements are its rows
LISTS = {
    "exits": "exits",
    "userspace_exits": "userspace_exits",
    "vcpus": "vcpus",
    "vms": "vms",
    "ports": "ports",
    "msrs": "msrs",
    "gpas": "gpas",
    "calls": "calls",
    "rules": "rules",
    "findings": "findings",
}
TABLES = ("recordings", *LISTS, "failures")
ROWS_AT_ONCE = 20_000  # of what is given piece by piece
# a list's members that are called as members of its recording: what they are called in the tables
RENAMED = {"isa": "exit_isa", "source": "kernel_source"}


class Fleet:
    """The summaries of many recordings: `sql()` over the tables of TABLES.

    A table is read from the summaries when a query first names it, and stays in the database.

    Parameters
    ----------
    url : folder or fsspec URL that `kvmtrace fleet summarize` wrote to
    memory_limit : DuckDB's, "1GiB"; what does not fit is spilled to its temporary folder

    Raises
    ------
    CapabilityError
        duckdb or fsspec is not installed.
    FormatError
        No summary lies there.
    """

    def __init__(self, url: str, memory_limit: str = "512MiB") -> None:
        try:
            import duckdb
        except ImportError as error:
            raise CapabilityError("duckdb is not installed", "pip install 'kvmtrace[fleet]'") from error
        self.url = url
        store = Store(url)
        self._objects = {name: store.objects(name) for name in (SUMMARIES, FAILURES)}
        if not any(self._objects.values()):
            raise FormatError(url, None, "summaries made by `kvmtrace fleet summarize`", "none")
        self.connection = duckdb.connect()
        with suppress(duckdb.InvalidInputException):  # in Jupyter without ipywidgets there is no bar to switch off
            self.connection.execute("SET enable_progress_bar = false")
        # what does not fit goes to files, which are not for the working directory
        self.connection.execute(f"SET memory_limit = '{memory_limit}'")
        self.connection.execute("SET preserve_insertion_order = false")  # which would hold back what is read
        scratch = ScratchFolder("fleet")
        self._remove_scratch: Any = weakref.finalize(self, scratch.close)
        path = str(scratch.path).replace("'", "''")
        self.connection.execute(f"SET temp_directory = '{path}/spill'")  # DuckDB makes it
        self._reader = ObjectReader(self.connection, store, scratch.path)
        self._read_into: dict[str, str] = {}  # table -> the table of the database with its columns
        self._chosen: str | None = None  # the table with the checksums of the recordings looked at
        self._schema, self._parts = "main", count(1)  # of the database; names of what each part makes there

    def load(self, *tables: str) -> None:
        """Read tables from the summaries, all at once: reading one after the other takes that many times as long."""
        wanted = [name for name in TABLES if name in tables and name not in self._read_into]
        if "failures" in wanted:
            self._reader.read(f"{self._schema}.failures_read", self._objects[FAILURES], FAILURE.names, FAILURE)
            self._show("failures", f"{self._schema}.failures_read")
        summarised = [name for name in wanted if name != "failures"]
        if not summarised:
            return
        lists = [LISTS[name] for name in summarised if name in LISTS]
        scalars = [name for name in SUMMARY.names if name not in LISTS.values()]
        columns = [*(scalars if "recordings" in summarised else IDENTITY), *lists]
        place = f"{self._schema}.read_{len(self._read_into)}"
        self._reader.read(place, self._objects[SUMMARIES], columns, SUMMARY)
        for name in summarised:
            self._show(name, place)

    def _show(self, table: str, place: str) -> None:
        """Make the view of a table over what was read of the summaries."""
        self._read_into[table] = place
        chosen = f"WHERE checksum IN (SELECT checksum FROM {self._chosen})" if self._chosen else ""
        if table == "failures":
            query = f"SELECT * EXCLUDE (object) FROM {place}"
        elif table == "recordings":
            columns = ", ".join(name for name in SUMMARY.names if name not in LISTS.values())
            query = f"SELECT {columns} FROM {place} {chosen}"
        else:
            identity = ", ".join(IDENTITY)
            members = [field.name for field in SUMMARY.field(LISTS[table]).type.value_type]
            own = ", ".join(f"row.{name} AS {RENAMED.get(name, name)}" for name in members)
            rows = f"SELECT {identity}, unnest({LISTS[table]}) AS row FROM {place} {chosen}"
            query = f"SELECT {identity}, {own} FROM ({rows})"
        self.connection.execute(f"CREATE OR REPLACE VIEW {table} AS {query}")

    def _load_for(self, query: str) -> None:
        """Load the tables that a query names; all of them for one that names none (SHOW TABLES).

        Raises
        ------
        UsageError
            It is no SQL.
        """
        import duckdb

        try:
            self.connection.extract_statements(query)
        except duckdb.Error as error:
            raise UsageError(" ".join(str(error).split())) from error
        words = set(re.findall(r"\w+", query.lower()))
        self.load(*(words.intersection(TABLES) or TABLES))

    def narrow(self, where: str) -> None:
        """Look only at the recordings for which an SQL condition over `recordings` holds.

        Raises
        ------
        UsageError
            The condition is no SQL, or names an unknown column.
        """
        import duckdb

        self._load_for(f"SELECT checksum FROM recordings WHERE {where}")
        chosen = f"{self._schema}.chosen_{next(self._parts)}"
        query = f"SELECT DISTINCT checksum FROM recordings WHERE {where}"
        try:
            if len(self.connection.extract_statements(query)) > 1:
                raise UsageError(f"{where}: more than a condition")
            self.connection.execute(f"CREATE TABLE {chosen} AS {query}")
        except duckdb.Error as error:
            raise UsageError(" ".join(str(error).split())) from error
        self._chosen = chosen
        for table, place in self._read_into.items():
            self._show(table, place)
        place = self._read_into["recordings"]
        rows = self.connection.execute(
            f"SELECT DISTINCT object FROM {place} WHERE checksum IN (SELECT checksum FROM {chosen})"
        ).fetchall()
        names = {name for (name,) in rows}  # what is read from now on is of these
        self._objects[SUMMARIES] = [one for one in self._objects[SUMMARIES] if one.rsplit("/", 1)[-1] in names]

    def part(self, where: str) -> Fleet:
        """Return the recordings for which a condition over `recordings` holds, as a fleet; close it before this one.

        Raises
        ------
        UsageError
            As of narrow().
        """
        self.load("recordings")
        connection, schema = self.connection.cursor(), f"part_{next(self._parts)}"
        # it sees this fleet's tables until narrow() has made its own
        connection.execute(f"CREATE SCHEMA {schema}; SET search_path = '{schema},{self._schema}'")
        part = copy(self)
        vars(part).update(
            connection=connection,
            _schema=schema,
            _reader=ObjectReader(connection, self._reader.store, self._reader.scratch),
            _read_into=dict(self._read_into),
            _objects=dict(self._objects),
            _remove_scratch=None,
        )
        vars(part).pop("n_recordings", None)  # a cached property
        part.narrow(where)
        return part

    def lock(self, query: str) -> None:
        """Load what a query names, and let no query reach any file from now on."""
        self._load_for(query)
        self.connection.execute("SET enable_external_access = false")
        self.connection.execute("SET lock_configuration = true")

    def sql(self, query: str) -> pd.DataFrame:
        """Return the result of a query as a frame.

        Raises
        ------
        UsageError
            DuckDB does not understand it.
        """
        frame: pd.DataFrame = self._result(query, "df")
        return frame

    def arrow(self, query: str) -> Any:
        """Return the result of a query as a pyarrow.Table."""
        return self._result(query, "to_arrow_table")

    def batches(self, query: str) -> Iterator[pa.RecordBatch]:
        """Give the result of a query piece by piece, as pyarrow.RecordBatch."""
        yield from self._result(query, "to_arrow_reader", ROWS_AT_ONCE)

    def csv(self, query: str) -> str:
        """Return the result of a query as CSV with a header; lists and structures as DuckDB prints them."""
        import pyarrow as pa
        import pyarrow.csv as pa_csv

        table = self.arrow(query)
        for i, field in enumerate(table.schema):
            if pa.types.is_nested(field.type):
                texts = pa.array([None if value is None else str(value) for value in table.column(i).to_pylist()])
                table = table.set_column(i, field.name, texts)
        out = pa.BufferOutputStream()
        pa_csv.write_csv(table, out)
        return str(out.getvalue().to_pybytes(), "utf-8")

    def _result(self, query: str, form: str, *arguments: Any) -> Any:
        import duckdb

        self._load_for(query)
        try:
            return getattr(self.connection.sql(query), form)(*arguments)
        except duckdb.Error as error:
            raise UsageError(" ".join(str(error).split())) from error
        except AttributeError:
            raise UsageError(f"not a query: {query}") from None

    @cached_property
    def n_recordings(self) -> int:
        """Return how many recordings there are."""
        return int(self.arrow("SELECT count(*) AS n FROM recordings").column("n")[0].as_py())

    def close(self) -> None:
        """Close the connection."""
        with suppress(Exception):
            self.connection.close()
        if self._remove_scratch:
            self._remove_scratch()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_fleet(url: str) -> Fleet:
    """Return the summaries of a folder or bucket; `.sql("SELECT ... FROM exits")` gives frames.

    Tables: recordings, exits, userspace_exits, vcpus, vms, ports, msrs, gpas, calls, rules, findings, failures.
    """
    return Fleet(url)
