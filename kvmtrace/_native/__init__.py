"""The compiled inner loops (kernel.c) as functions on arrays, where they were built; ctypes calls them without the GIL.

`loaded()` gives the kernel or None: then, or with KVMTRACE_KERNEL=0 in the environment, its callers use their NumPy
code, which gives the same results. KVMTRACE_KERNEL=/PATH names another build of it (tests: one with sanitizers).
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.errors import FormatError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIBRARY = Path(__file__).with_name("_kernel.so")
VERSION = 5  # KERNEL_VERSION of kernel.c: a library of another version is not used
SWITCH = "KVMTRACE_KERNEL"

_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "kernel_version": (_I32, []),
    "count_records": (_I64, [_P, _I64, _P, _P, _I64, _P, _P, _P, _P]),
    "fill_records": (_I64, [_P, _I64, _P, _P, _P, _I64, _P, _I32, _I64, _P, _P, _P, _P, _P, _P]),
    "gather_bytes": (None, [_P, _I64, _P, _I32, _I64, _I64, _I64, _I64, _I32, _P]),
    "count_perf_records": (_I64, [_P, _I64, _I64, _I64, _P, _P]),
    "fill_perf_records": (_I64, [_P, _I64, _I64, _I64, _P, _P, _I64, _P, _I32, _I64, _I64, *[_P] * 8]),
    "count_tracked": (_I64, [_P, _P, _I64, _P, _I64, _P, _P]),
    "fill_tracked": (None, [_P, _P, _P, _P, _I64, *[_P] * 6]),
    "take_steps": (_I64, [_P, _P, _P, _I64, _P, _P, _I64, _I32, _P, _P, _P, _P]),
    "cut_segments": (_I64, [_P, _P, _P, _I64, *[_P] * 6]),
    "rows_by_kind": (_I64, [_P, _I64, _I64, _P, _P, _P]),
    "latest_wanted": (None, [_P, _P, _I64, _P]),
    "count_edges": (None, [_P, _P, _P, _P, _I64, _I64, _I32, _I32, _I64, _P]),
}


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


@dataclass(frozen=True)
class Overrun:
    """A record that does not fit into its page: it begins at word `at` and would end at word `stop`."""

    page: int
    at: int
    stop: int


@dataclass(frozen=True)
class PerfSamples:
    """The samples of a perf.data that count, and where their parts lie.

    Parameters
    ----------
    layouts : int64, shape (n, 4), in u64 words from the header: time, cpu, raw, chain; -1 if absent
    number_of_id : uint8, by event identifier, which then is a sample's first word: the number of its layout from 1,
        0 where samples do not count; None: all samples have the first layout
    """

    layouts: NDArray[np.int64]
    number_of_id: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class TrackedColumns:
    """Columns of an event table, all of one length; cls is 0 where the model does not track the event."""

    tid: NDArray[np.int32]
    cls: NDArray[np.uint8]
    ts_ns: NDArray[np.int64]
    cpu: NDArray[np.int16]


@dataclass(frozen=True)
class TrackedRows:
    """Tracked events, thread by thread: row in the table, class, number of the thread, time, CPU."""

    row: NDArray[np.int64]
    cls: NDArray[np.uint8]
    thread: NDArray[np.uint16]
    ts_ns: NDArray[np.int64]
    cpu: NDArray[np.int16]


@dataclass(frozen=True)
class Knowledge:
    """The classes of a sequence, and where a thread begins or knowledge breaks off."""

    cls: NDArray[np.uint8]
    first: NDArray[np.bool_]
    broken: NDArray[np.bool_]


@dataclass(frozen=True)
class SegmentColumns:
    """Segments: each event's number of its segment, and the segments' columns (compare/segments.py)."""

    of: NDArray[np.intp]
    start: NDArray[np.intp]
    kind: NDArray[np.uint8]
    mask: NDArray[np.uint64]
    linked: NDArray[np.bool_]


@dataclass(frozen=True)
class StepColumns:
    """Steps in order: the state before each, its class, whether it is wrong, its time."""

    before: NDArray[np.uint8]
    cls: NDArray[np.uint8]
    wrong: NDArray[np.bool_]
    ts_ns: NDArray[np.int64]


class Kernel:
    """kernel.c's functions.

    Parameters
    ----------
    library : the loaded library
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._call = {name: getattr(library, name) for name in _SIGNATURES}
        for name, (result, arguments) in _SIGNATURES.items():
            self._call[name].restype, self._call[name].argtypes = result, arguments
        self.version: int = self._call["kernel_version"]()

    def count_records(
        self, words: NDArray[np.uint32], first: NDArray[np.int64], end: NDArray[np.int64]
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
        found = self._call["count_records"](
            _at(words), len(words), _at(first), _at(end), n, _at(counts), _at(page), _at(at), _at(stop)
        )
        overruns = zip(page[:found].tolist(), at[:found].tolist(), stop[:found].tolist(), strict=True)
        return counts, [Overrun(*overrun) for overrun in overruns]

    def fill_records(
        self,
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
        table = None if kind_of_id is None else _at(kind_of_id)
        n = self._call["fill_records"](
            _at(words),
            len(words),
            _at(first),
            _at(end),
            _at(page_ts),
            len(first),
            table,
            out.start.itemsize == 8,
            len(out.ts),
            _at(out.ts),
            _at(out.start),
            _at(out.kind),
            _at(out.irq_flags),
            _at(out.preempt_count),
            _at(out.tid),
        )
        if n != len(out.ts):
            raise _changed()

    def gather(
        self,
        words: NDArray[np.uint32],
        start: NDArray[Any],
        offset: int,
        size: int,
        *,
        unit: int = 4,
        by_word: bool = False,
    ) -> NDArray[np.uint8]:
        """Return `size` bytes at byte `start * unit + offset` of the buffer for each start, shape (n, size).

        Parameters
        ----------
        words : the buffer as little-endian u32, not empty
        start : uint32 or int64
        by_word : beyond the buffer's end its last word repeats, not its last byte
        """
        out = np.empty((len(start), size), np.uint8)
        start = np.ascontiguousarray(start)
        self._call["gather_bytes"](
            _at(words), len(words), _at(start), start.itemsize == 8, len(start), unit, offset, size, by_word, _at(out)
        )
        return out

    def count_perf_records(
        self, words: NDArray[np.uint64], first: int, last: int, end: int
    ) -> tuple[int, int, int, bool]:
        """Count the records of a perf.data that begin in words first..last and end at `end` at the latest.

        Returns
        -------
        (samples, other records, word where the walk ended, whether at the end and not at an impossible record)
        """
        samples, stop = _I64(), _I64()
        n = self._call["count_perf_records"](
            _at(words), first, last, end, ctypes.addressof(samples), ctypes.addressof(stop)
        )
        return samples.value, (n if n >= 0 else -1 - n) - samples.value, stop.value, n >= 0

    def fill_perf_records(
        self,
        words: NDArray[np.uint64],
        first: int,
        stop: int,
        samples: PerfSamples,
        *,
        kind_of_id: NDArray[np.uint16],
        out: RecordColumns,
        cpu: NDArray[np.int16],
        others: NDArray[np.int64],
    ) -> int:
        """Fill in the columns of samples in words first..stop, and the word indices of records that are none.

        Parameters
        ----------
        words : the file as little-endian u64
        kind_of_id : uint16, shape (65536,)
        out, cpu, others : of as many rows as count_perf_records said

        Returns
        -------
        how many samples count and hold raw data: so many rows were filled in

        Raises
        ------
        FormatError
            There is not what was counted.
        """
        numbers = samples.number_of_id
        n: int = self._call["fill_perf_records"](
            _at(words),
            len(words),
            first,
            stop,
            _at(samples.layouts),
            None if numbers is None else _at(numbers),
            0 if numbers is None else len(numbers),
            _at(kind_of_id),
            out.start.itemsize == 8,
            len(out.ts),
            len(others),
            _at(out.ts),
            _at(cpu),
            _at(out.start),
            _at(out.kind),
            _at(out.irq_flags),
            _at(out.preempt_count),
            _at(out.tid),
            _at(others),
        )
        if n < 0:
            raise _changed()
        return n

    def tracked(self, columns: TrackedColumns, tids: NDArray[np.int32]) -> tuple[TrackedRows, int]:
        """Return the tracked events of some threads, thread by thread, and how many events these threads have in all.

        Parameters
        ----------
        columns : of a table
        tids : int32, ascending, at most 65,534
        """
        n = len(columns.tid)
        number, counts = np.empty(n, np.uint16), np.empty(len(tids), np.int64)
        total: int = self._call["count_tracked"](
            _at(columns.tid), _at(columns.cls), n, _at(tids), len(tids), _at(number), _at(counts)
        )
        m = int(counts.sum())
        out = TrackedRows(
            np.empty(m, np.int64),
            np.empty(m, np.uint8),
            np.empty(m, np.uint16),
            np.empty(m, np.int64),
            np.empty(m, np.int16),
        )
        begins = np.cumsum(counts) - counts
        self._call["fill_tracked"](
            _at(number),
            _at(columns.cls),
            _at(columns.ts_ns),
            _at(columns.cpu),
            n,
            _at(begins),
            _at(out.row),
            _at(out.cls),
            _at(out.thread),
            _at(out.ts_ns),
            _at(out.cpu),
        )
        return out, total

    def take_steps(
        self, known: Knowledge, next_state: NDArray[np.uint8], verdict: NDArray[np.uint8], unknown: int
    ) -> tuple[NDArray[np.intp], NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
        """Step the transition table through a sequence.

        Parameters
        ----------
        next_state : uint8, shape (steps + 1,)
        verdict : uint8, shape (states, steps + 1)
        unknown : int, the state where knowledge begins

        Returns
        -------
        (position, state before, verdict) of each step, and the state that each event of the sequence finds
        """
        n = len(known.cls)
        state, before, found = (np.empty(n, np.uint8) for _ in range(3))
        position = np.empty(n, np.intp)
        m = self._call["take_steps"](
            _at(known.cls),
            _at(known.first),
            _at(known.broken),
            n,
            _at(next_state),
            _at(verdict),
            len(next_state) - 1,
            unknown,
            _at(state),
            _at(position),
            _at(before),
            _at(found),
        )
        return position[:m], before[:m], found[:m], state

    def cut_segments(self, known: Knowledge, boundaries: tuple[int, int, int]) -> SegmentColumns:
        """Cut a sequence at events of three classes and where knowledge begins."""
        n = len(known.cls)
        of, start, kind = np.empty(n, np.intp), np.empty(n, np.intp), np.empty(n, np.uint8)
        mask, linked = np.empty(n, np.uint64), np.empty(n, np.bool_)
        classes = np.array(boundaries, np.uint8)
        m = self._call["cut_segments"](
            _at(known.cls),
            _at(known.first),
            _at(known.broken),
            n,
            _at(classes),
            _at(of),
            _at(start),
            _at(kind),
            _at(mask),
            _at(linked),
        )
        return SegmentColumns(of, start[:m].copy(), kind[:m].copy(), mask[:m].copy(), linked[:m].copy())

    def count_edges(self, steps: StepColumns, unknown: int, sub_bits: int, counts: NDArray[np.int64]) -> None:
        """Count steps by edge and duration, those from the unknown state and wrong ones left out.

        Parameters
        ----------
        counts : int64, shape (states, classes, buckets), is added to
        """
        _, n_classes, n_buckets = counts.shape
        self._call["count_edges"](
            _at(steps.before),
            _at(steps.cls),
            _at(steps.wrong),
            _at(steps.ts_ns),
            len(steps.cls),
            n_classes,
            unknown,
            sub_bits,
            n_buckets,
            _at(counts),
        )

    def rows_by_kind(
        self, kind: NDArray[np.uint16], n_kinds: int
    ) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]] | None:
        """Sort rows by their kind.

        Returns
        -------
        (rows of kind 0, then of kind 1 ..., where each kind begins there and the end, place of each row in its kind);
        None if a number is no kind's
        """
        begin = np.empty(n_kinds + 1, np.intp)
        order, position = np.empty(len(kind), np.intp), np.empty(len(kind), np.intp)
        kind = np.ascontiguousarray(kind)
        found = self._call["rows_by_kind"](_at(kind), len(kind), n_kinds, _at(begin), _at(order), _at(position))
        return (order, begin, position) if found == 0 else None

    def latest_wanted(self, wanted: NDArray[np.bool_], thread: NDArray[np.uint16]) -> NDArray[np.int32]:
        """Return, for each row, the latest row of its thread up to itself that is wanted; -1 for none.

        Parameters
        ----------
        wanted : of at most 2**31 - 1 rows
        thread : uint16, of as many rows, those of a thread together
        """
        latest = np.empty(len(wanted), np.int32)
        wanted, thread = np.ascontiguousarray(wanted), np.ascontiguousarray(thread)
        self._call["latest_wanted"](_at(wanted), _at(thread), len(wanted), _at(latest))
        return latest


def _changed() -> FormatError:
    return FormatError("the recording", None, "a file that nobody writes to", "other records than a moment ago")


def _at(array: NDArray[Any]) -> int:
    """Return where an array's values are; they must lie one behind the other."""
    assert array.flags.c_contiguous
    address: int = array.__array_interface__["data"][0]
    return address


@cache
def _load(library: str) -> Kernel | None:
    try:
        kernel = Kernel(ctypes.CDLL(library))
    except (OSError, AttributeError):  # not built, or built from another kernel.c
        return None
    return kernel if kernel.version == VERSION else None


def loaded() -> Kernel | None:
    """Return the kernel; None where it was not built, or is switched off."""
    chosen = os.environ.get(SWITCH, "")
    return None if chosen == "0" else _load(chosen if "/" in chosen else str(LIBRARY))
