"""The tables of `perf kvm stat`, summed event by event."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace._native._loops import ffi, lib
from kvmtrace._native.arrays import filled, given
from kvmtrace._native.key_numbers import SEED, KeyNumbers
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

TABLES = ("vmexit", "ioport", "msr", "mmio")
# what an event is to perf
_WHATS = ("ENTRY", "ENTERS", "EXIT", "PIO", "MSR", "MMIO_READ", "MMIO_WRITE", "KEY_ONLY", "LEAVES")
ENTRY, ENTERS, EXIT, PIO, MSR, MMIO_READ, MMIO_WRITE, KEY_ONLY, LEAVES = (
    int(getattr(lib, f"PERF_{name}")) for name in _WHATS
)
_SUMS = np.dtype(
    [
        ("count", np.int64),
        ("total", np.int64),
        ("min_ns", np.int64),
        ("max_ns", np.int64),
        ("mean", np.float64),
        ("squares", np.float64),
    ]
)
_THREAD_BYTES = ffi.sizeof("PerfThread")
_NO_KEYS = np.zeros(0, np.uint64)


@dataclass(frozen=True)
class PerfKind:
    """The events of a kind.

    Parameters
    ----------
    what : what they are; of kinds whose events differ, what none of them is but for `whats`
    table : of TABLES; "" for events without keys
    keys : uint64, of each event
    whats : uint8, what each event is; None: all are `what`
    """

    what: int
    table: str = ""
    keys: NDArray[np.uint64] = _NO_KEYS
    whats: NDArray[np.uint8] | None = None


class PerfTables:
    """The four tables, and what is pending of each thread, over consecutive tables of events.

    Parameters
    ----------
    max_tid : larger thread ids are damage
    max_threads : so many threads with VM-entries count
    """

    def __init__(self, max_tid: int, max_threads: int) -> None:
        self._number = np.zeros(max_tid + 1, np.int32)  # what is never touched takes no memory
        self._state = np.zeros(max_threads * _THREAD_BYTES, np.uint8)
        self._n_threads = np.zeros(1, np.int64)
        self._keys = [KeyNumbers() for _ in TABLES]
        self._sums = [np.zeros(keys.room, _SUMS) for keys in self._keys]
        self._tables = ffi.new("PerfTable[]", len(TABLES))
        for i in range(len(TABLES)):
            self._tables[i].latest = -1
            self._attach(i)

    def _attach(self, i: int) -> None:
        self._tables[i].keys = self._keys[i].as_c()[0]
        self._tables[i].sums = ffi.from_buffer("PerfSums[]", self._sums[i], require_writable=True)

    def _grow(self) -> None:
        """Make room where it has run out."""
        for i, keys in enumerate(self._keys):
            if (n := self._tables[i].n_known) >= keys.room:
                keys.grow(n)
                self._sums[i] = np.append(self._sums[i], np.zeros(keys.room - len(self._sums[i]), _SUMS))
                self._attach(i)

    def take(
        self,
        ts_ns: NDArray[np.int64],
        tid: NDArray[np.int32],
        kind: NDArray[np.uint16],
        n_kinds: int,
        kinds: Mapping[int, PerfKind],
    ) -> None:
        """Take in the next rows.

        Parameters
        ----------
        kind : below n_kinds
        kinds : those that perf looks at; each must have a key for each of its rows

        Raises
        ------
        ValueError
            There are more rows of a kind than keys, or a kind is none of n_kinds.
        """
        rows, threads, of_kind = ffi.new("PerfRows *"), ffi.new("PerfThreads *"), ffi.new("PerfKind[]", n_kinds)
        ts_ns, tid, kind = np.ascontiguousarray(ts_ns), np.ascontiguousarray(tid), np.ascontiguousarray(kind)
        rows.n_rows, rows.n_kinds = len(ts_ns), n_kinds
        rows.ts, rows.tid, rows.kind = given(ts_ns), given(tid), given(kind)
        kept = []
        for index, one in kinds.items():
            to = of_kind[index]
            keys = np.ascontiguousarray(one.keys, np.uint64)
            to.what, to.table, to.n = one.what, TABLES.index(one.table) if one.table else 0, len(keys)
            to.keys, to.whats = given(keys), ffi.NULL
            if one.whats is not None:
                if len(one.whats) != len(keys):
                    raise ValueError("as many keys as events")
                to.whats = given(one.whats)
            kept.append((keys, one.whats))
        threads.n_tids, threads.n_threads = len(self._number), len(self._state) // _THREAD_BYTES
        threads.number, threads.n_known = filled(self._number), filled(self._n_threads)
        threads.state = ffi.from_buffer("PerfThread[]", self._state, require_writable=True)
        position, done = np.zeros(max(n_kinds, 1), np.int64), 0
        while done < len(ts_ns):
            done = lib.take_perf_events(rows, done, of_kind, filled(position), threads, self._tables, SEED)
            if done < 0:
                raise ValueError("a row of no kind, or without a key")
            self._grow()

    def keys(self, table: str) -> list[int]:
        """Return the keys of a table in the order of their appearance, whether they have samples or not."""
        i = TABLES.index(table)
        found: list[int] = self._keys[i].first(self._tables[i].n_known).tolist()
        return found

    def sums(self, table: str) -> NDArray[np.void]:
        """Return (count, total, min_ns, max_ns, mean, squares about the mean) of each key's samples, ns."""
        i = TABLES.index(table)
        return self._sums[i][: self._tables[i].n_known]
