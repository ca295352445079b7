"""Write recordings as Parquet, Arrow and CSV; arrow_schema.py describes the files."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

import numpy as np
import pyarrow as pa

from kvmtrace.formats.arrow.arrow_groups import RowGroup, describe_group, pack_groups
from kvmtrace.formats.arrow.arrow_schema import WINDOW_ROWS, schema_of, table_arrays
from kvmtrace.formats.arrow.csv_cells import csv_table, csv_types
from kvmtrace.table.event_table import EventTable
from kvmtrace.table.pipeline import run_stages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from kvmtrace.table.recording import Recording

GROUPED_WINDOWS = 2  # times as many rows: no row group holds all columns of all of them
MIN_GROUP_ROWS = 20_000  # a thread with fewer in a window shares the row group of the rest
MAX_GROUPS = 64  # row groups of a window
USUAL_COLUMNS, MAX_CELLS = 512, 16 << 20  # of wider tables a window has fewer rows
_VCPU_EVENTS = ("kvm_entry", "kvm_exit", "kvm_userspace_exit")


class _Windows:
    """The tables of a recording, `rows` each, and which kinds occur; small recordings are decoded once only.

    Parameters
    ----------
    recording : Recording
    progress : called with the number of events that were handed out so far
    rows : int
    first : rows of the first one, at most `rows`; 0 means as many
    """

    def __init__(
        self, recording: Recording, progress: Callable[[int], None], rows: int = WINDOW_ROWS, first: int = 0
    ) -> None:
        self._recording = recording
        self._rows = rows
        self._first = first or rows
        self._progress = progress
        self._held: EventTable | None = None
        counts = np.zeros(len(recording.kinds), np.int64)
        for i, table in enumerate(recording.iter_events(rows)):
            counts += np.bincount(table.kind, minlength=len(counts))
            self._held = table if i == 0 else None
        self.occurring = frozenset(np.flatnonzero(counts).tolist())

    def narrow(self, n_columns: int) -> None:
        """Hand out smaller tables where many columns would make them large."""
        if n_columns > USUAL_COLUMNS:
            self._rows = min(self._rows, MAX_CELLS // n_columns)
            self._first = min(self._first, self._rows)

    def __iter__(self) -> Iterator[tuple[int, EventTable]]:
        """Yield (first row, table): `rows` rows each, but for the first and the last."""
        first, kept, wanted = 0, list[EventTable](), self._first
        tables = self._recording.iter_events(self._rows) if self._held is None else iter([self._held])
        for table in tables:
            kept.append(table)
            while sum(map(len, kept)) >= wanted:
                whole = EventTable.concat(kept) if len(kept) > 1 else kept[0]
                yield first, (whole.slice(0, wanted) if len(whole) > wanted else whole)
                kept = [whole.slice(wanted, len(whole))] if len(whole) > wanted else []
                first, wanted = first + wanted, self._rows
                self._progress(first)
        if sum(map(len, kept)):
            yield first, (EventTable.concat(kept) if len(kept) > 1 else kept[0])


def _group_rows(table: EventTable) -> list[NDArray[np.intp]]:
    """Return the rows of each row group of a window, in recorded order.

    Each busy vCPU thread has one for each kind of event that it traced often, and one for its other events; the rest
    of the window shares one.
    """
    vcpu_rows = [table.rows(name) for name in _VCPU_EVENTS]
    tids, counts = np.unique(table.tid, return_counts=True)
    busy = tids[(counts >= MIN_GROUP_ROWS) & np.isin(tids, table.tid[np.concatenate(vcpu_rows)])]
    groups: list[NDArray[np.intp]] = []
    rest = np.ones(len(table), bool)
    for tid in busy.tolist():
        if len(groups) >= MAX_GROUPS - 1:
            break
        rows = np.flatnonzero(table.tid == tid)
        groups += _kind_groups(table.kind, rows, MAX_GROUPS - 1 - len(groups))
        rest[rows] = False
    if rest.any() or not groups:
        groups.append(np.flatnonzero(rest))
    return groups


def _kind_groups(kind: NDArray[np.uint16], rows: NDArray[np.intp], most: int) -> list[NDArray[np.intp]]:
    """Return `most` groups of a thread's rows at the most: one for each frequent kind, one for all others."""
    own = kind[rows]
    counts = np.bincount(own)
    frequent = np.flatnonzero(counts >= MIN_GROUP_ROWS)
    frequent = frequent[np.argsort(-counts[frequent], kind="stable")][: most - 1]
    groups = [rows[own == index] for index in frequent.tolist()]
    others = rows[~np.isin(own, frequent)]
    return [*groups, others] if len(others) else groups


def _groups(windows: _Windows, schema: pa.Schema, *, grouped: bool) -> Iterator[tuple[RowGroup, pa.Table]]:
    """Yield the row groups of all windows."""
    for number, (first, table) in enumerate(windows):
        for rows in _group_rows(table) if grouped else [np.arange(len(table))]:
            part = table if len(rows) == len(table) else table.take(rows)
            part.read_ahead((index, name) for index in part.payloads for name in part.kinds[index].fields)
            yield describe_group(part, number), table_arrays(part, schema, first + rows)


def write_parquet(
    recording: Recording, out: IO[bytes], progress: Callable[[int], None] = lambda _: None, *, grouped: bool = False
) -> None:
    """Write a recording as Parquet, window by window, its events in recorded order.

    Parameters
    ----------
    recording : Recording
    out : binary file
    progress : called with the number of events written so far
    grouped : the events of a window go by thread and kind: sooner written and read, but out of order
    """
    import pyarrow.parquet as pq

    rows = WINDOW_ROWS * (GROUPED_WINDOWS if grouped else 1)
    # whoever reads it soon has something to work on
    windows = _Windows(recording, progress, rows, first=rows // 4)
    schema = schema_of(recording, windows.occurring, with_row=True, window_rows=rows)
    windows.narrow(len(schema))
    ascending = {"row", "ts_ns"}  # small steps: deltas are smaller than compressed values, and sooner decoded
    with pq.ParquetWriter(
        out,
        schema,
        compression={f.name: "none" if f.name in ascending else "zstd" for f in schema},
        compression_level={f.name: 1 for f in schema if f.name not in ascending},
        use_dictionary=[f.name for f in schema if f.name not in ascending],
        column_encoding=dict.fromkeys(ascending, "DELTA_BINARY_PACKED"),
        write_statistics=["row", "ts_ns", "tid", "cpu", "event"],
    ) as writer:

        def write(group: tuple[RowGroup, pa.Table]) -> None:
            about, table = group
            written.append(about)
            writer.write_table(table, row_group_size=max(len(table), 1))

        written: list[RowGroup] = []
        run_stages(_groups(windows, schema, grouped=grouped), (write,))  # one thread decodes, the other one compresses
        out.write(pack_groups(written))


def write_arrow(recording: Recording, out: IO[bytes], progress: Callable[[int], None] = lambda _: None) -> None:
    """Write a recording as an Arrow file (Feather), one record batch for each window, lz4-compressed.

    Parameters
    ----------
    recording : Recording
    out : binary file
    progress : called with the number of events written so far
    """
    windows = _Windows(recording, progress)
    schema = schema_of(recording, windows.occurring, with_row=False)
    windows.narrow(len(schema))
    with pa.ipc.new_file(out, schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        for _, table in windows:
            writer.write_table(table_arrays(table, schema, np.arange(len(table))), max_chunksize=len(table))


def write_csv(recording: Recording, out: IO[bytes], progress: Callable[[int], None] = lambda _: None) -> None:
    """Write a recording as CSV, the columns of the Arrow file; see csv_cells.py.

    Parameters
    ----------
    recording : Recording
    out : binary file
    progress : called with the number of events written so far
    """
    from pyarrow import csv

    windows = _Windows(recording, progress, 1 << 17)
    schema = schema_of(recording, windows.occurring, with_row=False).remove_metadata()
    windows.narrow(len(schema))
    with csv.CSVWriter(out, csv_types(schema)) as writer:
        for _, table in windows:
            writer.write_table(csv_table(table_arrays(table, schema, np.arange(len(table)))))
