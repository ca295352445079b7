"""Records of a perf.data -> columns of its samples."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native._loops import ffi, lib
from kvmtrace._native.arrays import filled, given, words_of
from kvmtrace._native.key_numbers import SEED
from kvmtrace._native.ring_records import RecordColumns, changed
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Room = Callable[[int], tuple[RecordColumns, NDArray[np.int16]]]

MAX_TABLE = 1 << 20  # of identifiers that lie close together, as the kernel counts them up
MAX_NUMBER = 0xFFFF  # of a layout in that table


@dataclass(frozen=True)
class PerfSamples:
    """The samples of a perf.data that count, and where their parts lie.

    Parameters
    ----------
    layouts : int64, shape (n, 4), in u64 words from the header: time, cpu, raw, chain; -1 if absent
    ids : uint64, shape (m,), event identifiers, ascending, one of which then is a sample's first word; other samples do
        not count. Empty: all samples have the first layout, if there is one
    layout_of_id : int32, shape (m,), row in `layouts` of each
    """

    layouts: NDArray[np.int64]
    ids: NDArray[np.uint64]
    layout_of_id: NDArray[np.int32]

    @cached_property
    def table(self) -> NDArray[np.uint16]:
        """The layouts' numbers from 1, from the least identifier on; empty where that would be too long."""
        if not len(self.ids) or len(self.layouts) > MAX_NUMBER or int(self.ids[-1]) - int(self.ids[0]) >= MAX_TABLE:
            return np.empty(0, np.uint16)
        places = (self.ids - self.ids[0]).astype(np.int64)
        found = np.zeros(int(places[-1]) + 1, np.uint16)
        found[places] = self.layout_of_id + 1
        return found

    @cached_property
    def as_c(self) -> Any:
        """They as C's `Samples`; they must outlive it."""
        out = ffi.new("Samples *")
        out.layouts, out.n_layouts = ffi.cast("Layout *", given(self.layouts)), len(self.layouts)
        out.ids, out.layout_of_id, out.n_ids = given(self.ids), given(self.layout_of_id), len(self.ids)
        out.table, out.table_size = given(self.table), len(self.table)
        return out


@dataclass(frozen=True)
class PerfWindow:
    """What a part of a perf.data gave.

    Parameters
    ----------
    records : the samples that count and hold raw data
    cpu : int16, of each; -1 where none is stated, or none that can be
    others : int64, word index of each record that is no sample
    stop : int, word index where the part ended
    sound : bool, it ended at its end, not at an impossible record
    """

    records: RecordColumns
    cpu: NDArray[np.int16]
    others: NDArray[np.int64]
    stop: int
    sound: bool


def fresh(start_dtype: np.dtype[Any], *, common: bool = True) -> Room:
    """Return what makes new columns for samples."""
    return lambda n: (RecordColumns.empty(n, start_dtype, common=common), np.empty(n, np.int16))


def end_of_perf_records(words: NDArray[np.uint64]) -> int:
    """Return how many words of a buffer whole records fill, one behind the other from its begin on."""
    end: int = lib.end_of_perf_records(given(words), len(words))
    return end


def read_perf_records(
    words: NDArray[np.uint64],
    bounds: tuple[int, int, int],
    samples: PerfSamples,
    kind_of_id: NDArray[np.uint16] | None,
    room: Room,
) -> PerfWindow:
    """Read the records of a perf.data that begin in a part of it, each word once.

    Parameters
    ----------
    words : the file as little-endian u64
    bounds : word indices: where the part begins and ends, and where all records end
    kind_of_id : uint16, shape (65536,), for samples with ftrace's usual common fields; None leaves them out
    room : gives columns for so many samples: word index (u32) of each one's raw data, ..., and CPUs
    """
    first, last, end = bounds
    most = max(last - first, 0)
    out, cpu = room(most // 2 + 1)  # a head and raw data at the least
    others = np.empty(most, np.int64)
    columns, span = out.as_c(), ffi.new("PerfSpan *", {"at": first, "last": last, "end": end, "n_others": most})
    kinds = ffi.NULL if kind_of_id is None else given(kind_of_id)
    if kind_of_id is None:
        columns.kind = ffi.NULL
    n: int = lib.read_perf_records(
        given(words), len(words), span, samples.as_c, kinds, columns, filled(cpu), filled(others)
    )
    if n < 0:
        raise changed()
    rows = RecordColumns(out.start[:n], out.ts[:n], out.kind[:n], out.irq_flags[:n], out.preempt_count[:n], out.tid[:n])
    return PerfWindow(rows, cpu[:n], others[: span.n_others].copy(), span.at, span.at >= last)


def mark_copies(
    words: NDArray[np.uint32], rows: Any, order: NDArray[np.intp], lost: int
) -> tuple[NDArray[np.bool_], int]:
    """Say which rows hold what an earlier one of their CPU, time, thread and kind holds.

    Parameters
    ----------
    words : the file as little-endian u32
    rows : columns ts_ns, cpu, tid, kind and start
    order : of their times
    lost : the kind whose rows are no samples

    Returns
    -------
    (bool of each row in that order, how many rows have the time of an earlier one of their CPU)

    Raises
    ------
    ValueError
        The order is none of these rows'.
    """
    n, ts_ns = len(rows.ts_ns), rows.ts_ns.take(order)
    n_equal = int(np.count_nonzero(ts_ns[1:] == ts_ns[:-1]))
    if not n_equal:
        return np.zeros(n, bool), 0
    n_slots = 1 << (4 * n_equal + 1).bit_length()  # a pair of neighbours is two rows
    copy, same = np.empty(n, np.bool_), np.zeros(1, np.int64)
    timed = ffi.new("TimedRows *")
    start, order = np.ascontiguousarray(rows.start), np.ascontiguousarray(order, np.int64)
    if len(order) != n:
        raise ValueError("an order of other rows")
    timed.n_rows, timed.order, timed.wide, timed.start = n, given(order), start.itemsize == 8, given(start)
    timed.ts, timed.cpu, timed.tid, timed.kind = (given(c) for c in (rows.ts_ns, rows.cpu, rows.tid, rows.kind))
    slots = np.zeros((2, n_slots), np.int64)
    if (
        lib.mark_copies(
            words_of(words), timed, lost, SEED, filled(slots[0]), filled(slots[1]), n_slots, filled(copy), filled(same)
        )
        < 0
    ):
        raise ValueError("an order of other rows")
    return copy, int(same[0])
