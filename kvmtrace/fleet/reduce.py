"""All summaries of a DEST as tables of DuckDB, which reads them out of core and adds them up."""

from __future__ import annotations

import weakref
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvmtrace.errors import CapabilityError, FormatError, UsageError
from kvmtrace.fleet.store import FAILURES, SUMMARIES, Store
from kvmtrace.fleet.summary_schema import FAILURE, SUMMARY
from kvmtrace.scratch import ScratchFolder

if TYPE_CHECKING:
    import pandas as pd

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


class Fleet:
    """The summaries of many recordings: `sql()` over the tables of TABLES.

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
        self.store = Store(url)
        self.connection = duckdb.connect()
        with suppress(duckdb.InvalidInputException):  # in Jupyter without ipywidgets there is no bar to switch off
            self.connection.execute("SET enable_progress_bar = false")
        # what does not fit goes to files, which are not for the working directory
        self.connection.execute(f"SET memory_limit = '{memory_limit}'")
        spill = ScratchFolder("fleet")
        self._remove_spill = weakref.finalize(self, spill.close)
        path = str(spill.path).replace("'", "''")
        self.connection.execute(f"SET temp_directory = '{path}/spill'")  # DuckDB makes it
        self._make_tables()

    def _make_tables(self) -> None:
        summaries = self.store.objects(SUMMARIES)
        failures = self.store.objects(FAILURES)
        if not summaries and not failures:
            raise FormatError(self.url, None, "summaries made by `kvmtrace fleet summarize`", "none")
        if not self.store.is_local:
            self.connection.register_filesystem(self.store.filesystem)
        self._view("summaries", summaries, SUMMARY)
        self._view("failures", failures, FAILURE)
        lists = ", ".join(dict.fromkeys(LISTS.values()))
        self.connection.execute(f"CREATE VIEW recordings AS SELECT * EXCLUDE ({lists}) FROM summaries")
        identity = ", ".join(IDENTITY)
        for table, column in LISTS.items():
            own = ", ".join(f"row.{field.name}" for field in SUMMARY.field(column).type.value_type)
            self.connection.execute(
                f"CREATE VIEW {table} AS SELECT {identity}, {own} "
                f"FROM (SELECT {identity}, unnest({column}) AS row FROM summaries)"
            )

    def _view(self, name: str, objects: list[str], schema: Any) -> None:
        """Make a view over Parquet objects; an empty table where there are none."""
        if not objects:
            empty = schema.empty_table()
            self.connection.register(f"no_{name}", empty)
            self.connection.execute(f"CREATE VIEW {name} AS SELECT * FROM no_{name}")
            return
        scheme = "" if self.store.is_local else f"{self.store.url.split('://', 1)[0]}://"
        folder = f"{scheme}{self.store.root}/{SUMMARIES if name == 'summaries' else FAILURES}"
        pattern = "*/*/*/*.parquet" if name == "summaries" else "*.parquet"
        path = f"{folder}/{pattern}".replace("'", "''")
        self.connection.execute(
            f"CREATE VIEW {name} AS SELECT * FROM read_parquet('{path}', hive_partitioning = false)"
        )

    def narrow(self, where: str) -> None:
        """Look only at the recordings for which an SQL condition over `recordings` holds.

        Raises
        ------
        UsageError
            The condition is no SQL, or names an unknown column.
        """
        import duckdb

        try:
            self.connection.execute(f"CREATE TABLE chosen AS SELECT checksum FROM recordings WHERE {where}")
        except duckdb.Error as error:
            raise UsageError(" ".join(str(error).split())) from error
        self.connection.execute("ALTER VIEW summaries RENAME TO all_summaries")
        self.connection.execute(
            "CREATE VIEW summaries AS SELECT * FROM all_summaries WHERE checksum IN (SELECT checksum FROM chosen)"
        )

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

    def _result(self, query: str, form: str) -> Any:
        import duckdb

        try:
            return getattr(self.connection.sql(query), form)()
        except duckdb.Error as error:
            raise UsageError(" ".join(str(error).split())) from error
        except AttributeError:
            raise UsageError(f"not a query: {query}") from None

    @cached_property
    def n_recordings(self) -> int:
        """Return how many recordings there are."""
        return int(self.connection.execute("SELECT count(*) FROM summaries").fetchall()[0][0])

    def close(self) -> None:
        """Close the connection."""
        with suppress(Exception):
            self.connection.close()
        self._remove_spill()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load_fleet(url: str) -> Fleet:
    """Return the summaries of a folder or bucket; `.sql("SELECT ... FROM exits")` gives frames.

    Tables: recordings, exits, userspace_exits, vcpus, vms, ports, msrs, gpas, calls, rules, findings, failures.
    """
    return Fleet(url)
