"""Time stamps of a trace.dat -> nanoseconds, by the options of the file, exactly as trace-cmd computes them.

Source: trace-cmd.dat.v7(5), options DATE, OFFSET, TIME_SHIFT, TSC2NSEC; trace-cmd-report(1)
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.formats.trace_dat.trace_dat_sections import OPTION_DATE, OPTION_OFFSET, OPTION_TIME_SHIFT, OPTION_TSC2NSEC
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.formats.trace_dat.trace_dat_sections import TraceDat

INTERPOLATE = 1  # TRACECMD_TSYNC_FLAG_INTERPOLATE


@dataclass(frozen=True)
class CpuShift:
    """Corrections of a guest CPU's clock towards its host's, sorted by time; all int64, same length."""

    time: NDArray[np.int64]
    offset: NDArray[np.int64]
    scaling: NDArray[np.int64]
    fraction: NDArray[np.int64]


@dataclass(frozen=True)
class TimeConverter:
    """The clock of one trace.

    Parameters
    ----------
    mult, shift : int, ns = ts * mult >> shift; mult 0 if the clock counts nanoseconds
    offset_ns : int, added at last
    shifts : per CPU, for guests recorded together with their host
    flags : int, of the synchronisation protocol
    """

    mult: int = 0
    shift: int = 0
    offset_ns: int = 0
    shifts: tuple[CpuShift, ...] = field(default=())
    flags: int = 0

    def to_ns(self, ts: NDArray[np.uint64], cpu: int) -> NDArray[np.int64]:
        """Return time stamps of one CPU in ns."""
        if cpu < len(self.shifts):
            ts = self._synchronise(ts, self.shifts[cpu])
        if self.mult:
            ts = self._scale(ts)
        out = ts.view(np.int64)
        return out + np.int64(self.offset_ns) if self.offset_ns else out

    def _scale(self, ts: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Multiply the halves of the stamp apart, as the kernel does (mul_u64_u32_shr)."""
        mult, shift = np.uint64(self.mult), np.uint64(min(self.shift, 63))
        low: NDArray[np.uint64] = np.right_shift((ts & np.uint64(0xFFFFFFFF)) * mult, shift)
        high = (ts >> np.uint64(32)) * mult
        up = 32 - self.shift
        low += high << np.uint64(up) if up >= 0 else high >> np.uint64(min(-up, 63))
        return low

    def _synchronise(self, ts: NDArray[np.uint64], shift: CpuShift) -> NDArray[np.uint64]:
        signed = ts.view(np.int64)
        count = len(shift.time)
        if count == 0:
            return ts
        if count == 1:
            shifted: NDArray[np.int64] = signed + shift.offset[0]
            return shifted.view(np.uint64)
        low = np.clip(np.searchsorted(shift.time, signed, side="right") - 1, 0, count - 2)
        correction = shift.offset[low]
        if self.flags & INTERPOLATE:
            delta = shift.time[low + 1] - shift.time[low]
            slope = (signed - shift.time[low]) * (shift.offset[low + 1] - shift.offset[low])
            top = slope + delta // 2
            correction = correction + np.where(top < 0, -(-top // delta), top // delta)  # C rounds to zero
        scaled = ts * shift.scaling[low].view(np.uint64) >> shift.fraction[low].view(np.uint64)
        return (scaled.view(np.int64) + correction).view(np.uint64)


def _number_text(data: bytes) -> int:
    """Return a number written as text, decimal or 0x hexadecimal, as strtoll reads it; 0 where it is none."""
    text = data.split(b"\0")[0].strip()[:24]
    try:
        value = int(text, 0)
    except ValueError:
        return 0
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _read_shifts(data: bytes) -> tuple[tuple[CpuShift, ...], int]:
    """Return the corrections per CPU and the protocol flags of a TIME_SHIFT option."""
    if len(data) < 16:
        return (), 0
    flags, n_cpus = (int.from_bytes(data[i : i + 4], "little") for i in (8, 12))
    at, tables = 16, []
    for _ in range(n_cpus):
        count = int.from_bytes(data[at : at + 4], "little")
        if at + 4 + count * 24 > len(data):
            return (), 0
        tables.append(np.frombuffer(data, "<i8", count * 3, at + 4).reshape(3, count))
        at += 4 + count * 24
    shifts = []
    for time, offset, scaling in tables:
        fraction = np.zeros(len(time), np.int64)
        if at + 8 * len(time) <= len(data):
            fraction = np.frombuffer(data, "<i8", len(time), at).copy()
            at += 8 * len(time)
        _, order = np.unique(time, return_index=True)  # of equal times the first is kept
        shifts.append(CpuShift(time[order], offset[order], scaling[order], np.clip(fraction[order], 0, 63)))
    return tuple(shifts), flags


def read_time_converter(trace: TraceDat) -> TimeConverter:
    """Return how the time stamps of `trace` become nanoseconds."""
    offset_ns = sum(
        _number_text(data) * (1000 if number == OPTION_DATE else 1)
        for number, data in trace.options
        if number in (OPTION_DATE, OPTION_OFFSET)
    )
    offset_ns = (offset_ns + (1 << 63)) % (1 << 64) - (1 << 63)
    mult = shift = 0
    tsc = trace.option(OPTION_TSC2NSEC)
    if tsc is not None and len(tsc) >= 16:
        mult, shift = (int.from_bytes(tsc[i : i + 4], "little") for i in (0, 4))
    shifts, flags = _read_shifts(trace.option(OPTION_TIME_SHIFT) or b"")
    return TimeConverter(mult, shift, offset_ns, shifts, flags)
