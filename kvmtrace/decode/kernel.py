"""The compiled inner loops (kernel.c) as functions on arrays, where they were built; ctypes calls them without the GIL.

`loaded()` gives the kernel or None: then, or with KVMTRACE_KERNEL=0 in the environment, the decoders use their NumPy
code, which gives the same results.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIBRARY = Path(__file__).with_name("_kernel.so")
VERSION = 2  # KERNEL_VERSION of kernel.c: a library of another version is not used
SWITCH = "KVMTRACE_KERNEL"

_P, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "kernel_version": (_I32, []),
    "count_records": (_I64, [_P, _I64, _P, _P, _I64, _P, _P, _P, _P]),
    "fill_records": (None, [_P, _I64, _P, _P, _P, _I64, _P, _I32, _P, _P, _P, _P, _P, _P]),
    "gather_bytes": (None, [_P, _I64, _P, _I32, _I64, _I64, _I64, _I64, _I32, _P]),
    "count_perf_records": (_I64, [_P, _I64, _I64, _I64, _P, _P]),
    "fill_perf_records": (_I64, [_P, _I64, _I64, _I64, _P, _P, _I64, _P, _I32, *[_P] * 8]),
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
        return cls(np.empty(n, start_dtype), np.empty(n, np.uint64), np.empty(m, np.uint16), np.empty(m, np.uint8),
                   np.empty(m, np.uint8), np.empty(m, np.int32))


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

    def count_records(self, words: NDArray[np.uint32], first: NDArray[np.int64], end: NDArray[np.int64]
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
        found = self._call["count_records"](_at(words), len(words), _at(first), _at(end), n, _at(counts), _at(page),
                                            _at(at), _at(stop))
        overruns = zip(page[:found].tolist(), at[:found].tolist(), stop[:found].tolist(), strict=True)
        return counts, [Overrun(*overrun) for overrun in overruns]

    def fill_records(self, words: NDArray[np.uint32], first: NDArray[np.int64], end: NDArray[np.int64],
                     page_ts: NDArray[np.uint64], *, kind_of_id: NDArray[np.uint16] | None, out: RecordColumns) -> None:
        """Fill in the columns of all data records of pages that count_records has been through.

        Parameters
        ----------
        words, first, end : as count_records took and left them
        page_ts : uint64, shape (n_pages,)
        kind_of_id : uint16, shape (65536,), for records with ftrace's usual common fields; None leaves them out
        out : RecordColumns of as many rows as there are records
        """
        table = None if kind_of_id is None else _at(kind_of_id)
        self._call["fill_records"](
            _at(words), len(words), _at(first), _at(end), _at(page_ts), len(first), table, out.start.itemsize == 8,
            _at(out.ts), _at(out.start), _at(out.kind), _at(out.irq_flags), _at(out.preempt_count), _at(out.tid))

    def gather(self, words: NDArray[np.uint32], start: NDArray[Any], offset: int, size: int, *, unit: int = 4,
               by_word: bool = False) -> NDArray[np.uint8]:
        """Return `size` bytes at byte `start * unit + offset` of the buffer for each start, shape (n, size).

        Parameters
        ----------
        words : the buffer as little-endian u32, not empty
        start : uint32 or int64
        by_word : beyond the buffer's end its last word repeats, not its last byte
        """
        out = np.empty((len(start), size), np.uint8)
        start = np.ascontiguousarray(start)
        self._call["gather_bytes"](_at(words), len(words), _at(start), start.itemsize == 8, len(start), unit, offset,
                                   size, by_word, _at(out))
        return out

    def count_perf_records(self, words: NDArray[np.uint64], first: int, last: int, end: int
                           ) -> tuple[int, int, int, bool]:
        """Count the records of a perf.data that begin in words first..last and end at `end` at the latest.

        Returns
        -------
        (samples, other records, word where the walk ended, whether at the end and not at an impossible record)
        """
        samples, stop = _I64(), _I64()
        n = self._call["count_perf_records"](_at(words), first, last, end, ctypes.addressof(samples),
                                             ctypes.addressof(stop))
        return samples.value, (n if n >= 0 else -1 - n) - samples.value, stop.value, n >= 0

    def fill_perf_records(self, words: NDArray[np.uint64], first: int, stop: int, samples: PerfSamples, *,
                          kind_of_id: NDArray[np.uint16], out: RecordColumns, cpu: NDArray[np.int16],
                          others: NDArray[np.int64]) -> int:
        """Fill in the columns of samples in words first..stop, and the word indices of records that are none.

        Parameters
        ----------
        words : the file as little-endian u64
        kind_of_id : uint16, shape (65536,)
        out, cpu, others : of as many rows as count_perf_records said

        Returns
        -------
        how many samples count and hold raw data: so many rows were filled in
        """
        numbers = samples.number_of_id
        n: int = self._call["fill_perf_records"](
            _at(words), len(words), first, stop, _at(samples.layouts), None if numbers is None else _at(numbers),
            0 if numbers is None else len(numbers), _at(kind_of_id), out.start.itemsize == 8, _at(out.ts), _at(cpu),
            _at(out.start), _at(out.kind), _at(out.irq_flags), _at(out.preempt_count), _at(out.tid), _at(others))
        return n


def _at(array: NDArray[Any]) -> int:
    """Return where an array's values are; they must lie one behind the other."""
    assert array.flags.c_contiguous
    address: int = array.__array_interface__["data"][0]
    return address


@cache
def _load() -> Kernel | None:
    try:
        kernel = Kernel(ctypes.CDLL(str(LIBRARY)))
    except (OSError, AttributeError):  # not built, or built from another kernel.c
        return None
    return kernel if kernel.version == VERSION else None


def loaded() -> Kernel | None:
    """Return the kernel; None where it was not built, or is switched off."""
    return None if os.environ.get(SWITCH) == "0" else _load()
