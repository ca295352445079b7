"""VM-exits and userspace exits as a stream of rows in recorded order, in bounded memory.

A thread's last VM-exit of a piece is paired only in a later one. What comes late so is little, and is kept; all other
rows come in order and go to a temporary file, from which both are given back together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.scratch import scratch_file
from kvmtrace.spans.row_columns import userspace_columns, vm_exit_columns
from kvmtrace.spans.span_builder import SpanBuilder, iter_spans
from kvmtrace.spans.vm_exits import EXIT_DTYPE, VmExitRows
from kvmtrace.spans.vmm_stays import USERSPACE_DTYPE, userspace_rows
from kvmtrace.table.vm_threads import labels_of_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from kvmtrace.spans.span_builder import Spans
    from kvmtrace.table.columns import RowColumn
    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Recording

PIECE_EVENTS = 1 << 18
WINDOW_ROWS = 1 << 17  # rows given at once


class OrderedRows:
    """Takes rows that mostly come in order, and gives them back in order.

    Parameters
    ----------
    dtype : of the rows; its field `row` says their order
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._file = scratch_file()  # closed by __iter__
        self._latest = -1
        self._late: list[NDArray[Any]] = []

    def add(self, rows: NDArray[Any]) -> None:
        """Take in rows, ascending among themselves."""
        late = int(np.searchsorted(rows["row"], self._latest))
        if late:
            self._late.append(rows[:late])
        if late < len(rows):
            self._latest = int(rows["row"][-1])
            self._file.write(rows[late:].tobytes())

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """Yield all rows in order, WINDOW_ROWS or a few more at once; once only."""
        late = np.concatenate([np.empty(0, self._dtype), *self._late])
        late = late[np.argsort(late["row"], kind="stable")]
        given = 0
        with self._file as file:
            file.seek(0)
            while data := file.read(WINDOW_ROWS * self._dtype.itemsize):
                rows = np.frombuffer(data, self._dtype)
                stop = given + int(np.searchsorted(late["row"][given:], rows["row"][-1]))
                own = late[given:stop]
                yield np.insert(rows, np.searchsorted(rows["row"], own["row"]), own)
                given = stop
        if given < len(late):
            yield late[given:]


def _streamed(
    recording: Recording,
    dtype: np.dtype[Any],
    rows_of: Callable[[Spans], NDArray[Any]],
    progress: Callable[[int], None],
) -> Iterator[NDArray[Any]]:
    """Yield the rows of the spans of a recording in recorded order; first none, which says their columns."""
    ordered = OrderedRows(dtype)

    def tables() -> Iterator[EventTable]:
        n_events = 0
        for table in recording.iter_events(PIECE_EVENTS):
            yield table
            n_events += len(table)
            progress(n_events)

    for spans in iter_spans(tables(), SpanBuilder(rows=True)):
        ordered.add(rows_of(spans))
    yield np.empty(0, dtype)
    yield from ordered


def stream_vm_exits(
    recording: Recording, progress: Callable[[int], None] = lambda _: None
) -> Iterator[dict[str, RowColumn]]:
    """Yield the VM-exits of a recording as columns, in recorded order; first those of no rows."""
    names = labels_of_threads(recording)
    return (vm_exit_columns(rows, names) for rows in _streamed(recording, EXIT_DTYPE, VmExitRows().feed, progress))


def stream_userspace_exits(
    recording: Recording, progress: Callable[[int], None] = lambda _: None
) -> Iterator[dict[str, RowColumn]]:
    """Yield the userspace exits of a recording as columns, in recorded order; first those of no rows."""
    names = labels_of_threads(recording)
    return (userspace_columns(rows, names) for rows in _streamed(recording, USERSPACE_DTYPE, userspace_rows, progress))


ROW_TABLES = {"vm_exits": stream_vm_exits, "userspace_exits": stream_userspace_exits}
