"""Pages of ftrace's ring buffer -> columns of their records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native._loops import ffi, lib
from kvmtrace._native.arrays import filled, given, words_of
from kvmtrace.errors import FormatError
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class RecordColumns:
    """What is known of records without their formats; the last four are empty where no kinds were asked for.

    Parameters
    ----------
    start : uint32 or int64, word index of each record's data
    ts : uint64, time stamps in the clock's unit
    """

    start: NDArray[Any]
    ts: NDArray[np.uint64]
    kind: NDArray[np.uint16]
    irq_flags: NDArray[np.uint8]
    preempt_count: NDArray[np.uint8]
    tid: NDArray[np.int32]

    @classmethod
    def empty(cls, n: int, start_dtype: np.dtype[Any], *, common: bool = True) -> RecordColumns:
        """Return columns of n rows to be filled in."""
        m = n if common else 0
        return cls(
            np.empty(n, start_dtype),
            np.empty(n, np.uint64),
            np.empty(m, np.uint16),
            np.empty(m, np.uint8),
            np.empty(m, np.uint8),
            np.empty(m, np.int32),
        )

    def as_c(self) -> Any:
        """Return them as C's `Columns`; they must outlive it."""
        out = ffi.new("Columns *")
        out.n_rows, out.wide = len(self.ts), self.start.itemsize == 8
        out.start, out.ts = filled(self.start), filled(self.ts)
        if len(self.tid) == len(self.ts):
            out.kind, out.tid = filled(self.kind), filled(self.tid)
            out.flags, out.preempt = filled(self.irq_flags), filled(self.preempt_count)
        return out


@dataclass(frozen=True)
class Overrun:
    """A record that does not fit into its page: it begins at word `at` and would end at word `stop`."""

    page: int
    at: int
    stop: int


def changed() -> FormatError:
    """Return the error of a file in which there is not what was counted a moment ago."""
    return FormatError("the recording", None, "a file that nobody writes to", "other records than a moment ago")


def count_records(
    words: NDArray[np.uint32], first: NDArray[np.int64], end: NDArray[np.int64]
) -> tuple[NDArray[np.int64], list[Overrun]]:
    """Return how many data records each page holds, and the records that do not fit.

    Parameters
    ----------
    words : the buffer as little-endian u32
    first : int64, shape (n_pages,), word index of each page's first record
    end : int64, shape (n_pages,), behind its last; set to where reading must end on pages that do not fit
    """
    n = len(first)
    counts, page, at, stop = (np.empty(n, np.int64) for _ in range(4))
    found = lib.count_records(
        words_of(words), given(first), filled(end), n, filled(counts), filled(page), filled(at), filled(stop)
    )
    overruns = zip(page[:found].tolist(), at[:found].tolist(), stop[:found].tolist(), strict=True)
    return counts, [Overrun(*overrun) for overrun in overruns]


def fill_records(
    words: NDArray[np.uint32],
    first: NDArray[np.int64],
    end: NDArray[np.int64],
    page_ts: NDArray[np.uint64],
    *,
    kind_of_id: NDArray[np.uint16] | None,
    out: RecordColumns,
) -> None:
    """Fill in the columns of all data records of pages that count_records has been through.

    Parameters
    ----------
    words, first, end : as count_records took and left them
    page_ts : uint64, shape (n_pages,)
    kind_of_id : uint16, shape (65536,), for records with ftrace's usual common fields; None leaves them out
    out : RecordColumns of as many rows as there are records

    Raises
    ------
    FormatError
        There is not what was counted.
    """
    columns = out.as_c()
    kinds = ffi.NULL if kind_of_id is None else given(kind_of_id)
    if kind_of_id is None:
        columns.kind = ffi.NULL
    n = lib.fill_records(words_of(words), given(first), given(end), given(page_ts), len(first), kinds, columns)
    if n != len(out.ts):
        raise changed()


def decode_records(
    words: NDArray[np.uint32],
    span: tuple[NDArray[np.int64], NDArray[np.int64]],
    page_ts: NDArray[np.uint64],
    kind_of_id: NDArray[np.uint16] | None,
    start_dtype: np.dtype[Any],
) -> tuple[RecordColumns, NDArray[np.int64], list[Overrun]]:
    """Decode pages into records.

    Parameters
    ----------
    words : the buffer as little-endian u32
    span : int64, shape (n_pages,), word index of each page's first record, and behind its last
    page_ts : uint64, shape (n_pages,)
    kind_of_id : uint16, shape (65536,), for records with ftrace's usual common fields; None leaves them out
    start_dtype : uint32 or int64

    Returns
    -------
    (records, how many each page has, those that do not fit: the rest of their page is left out)
    """
    first, end = span[0], span[1].copy()
    counts, overruns = count_records(words, first, end)
    out = RecordColumns.empty(int(counts.sum()), start_dtype, common=kind_of_id is not None)
    fill_records(words, first, end, page_ts, kind_of_id=kind_of_id, out=out)
    return out, counts, overruns
