"""The samples of the tables of `perf kvm stat`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace._native._loops import ffi, lib
from kvmtrace._native.arrays import filled, given

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

TABLES = ("vmexit", "ioport", "msr", "mmio")


class PerfThreads:
    """What is kept of each thread from one piece of lanes to the next.

    Parameters
    ----------
    steps : what the steps of lanes are called: entry, exit, pio, msr, mmio_read, mmio_write; and reason_mask
    """

    def __init__(self, steps: Mapping[str, int]) -> None:
        self._steps = ffi.new("PerfSteps *", dict(steps))
        self._entered, self._exit_ns = np.zeros(16, np.uint8), np.zeros(16, np.int64)

    def take_samples(
        self,
        thread: NDArray[np.uint16],
        step: NDArray[np.uint8],
        ts_ns: NDArray[np.int64],
        arg: NDArray[np.int64],
    ) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Return (keys, durations in ns) of the samples of each table.

        Parameters
        ----------
        thread, step, ts_ns, arg : of the rows of lanes, those of a thread one behind the other
        """
        n = len(thread)
        if n and (grow := int(thread.max()) + 1 - len(self._entered)) > 0:
            self._entered = np.append(self._entered, np.zeros(grow, np.uint8))
            self._exit_ns = np.append(self._exit_ns, np.zeros(grow, np.int64))
        threads, out = ffi.new("PerfThreads *"), ffi.new("PerfTables *")
        threads.entered, threads.exit_ns = filled(self._entered), filled(self._exit_ns)
        count, (key, dur_ns) = np.zeros(len(TABLES), np.int64), np.empty((2, len(TABLES), n), np.int64)
        out.capacity, out.count, out.key, out.dur_ns = n, filled(count), filled(key), filled(dur_ns)
        thread, step, ts_ns, arg = map(np.ascontiguousarray, (thread, step, ts_ns, arg))
        lib.take_perf_samples(given(thread), given(step), given(ts_ns), given(arg), n, self._steps, threads, out)
        return {name: (key[i, : count[i]], dur_ns[i, : count[i]]) for i, name in enumerate(TABLES)}
