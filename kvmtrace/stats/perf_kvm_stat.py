"""The tables of `perf kvm stat report`, by its own rules, to the digit.

Per host thread perf keeps the start and key of one pending event. Nothing counts before the thread's first
VM-entry, losses are not looked at, and a later begin overwrites an earlier one. Ends and begins:

vmexit   kvm_exit → kvm_entry, key exit reason
ioport   kvm_pio → kvm_entry, key port and direction
msr      kvm_msr → kvm_entry, key MSR and direction
mmio     writes kvm_mmio → kvm_entry; reads kvm_exit → kvm_mmio. A read that ends while a write is pending is
         counted for the write's key, and a kvm_entry leaves a kvm_exit without key pending.

Source: tools/perf/builtin-kvm.c (handle_kvm_event), tools/perf/arch/x86/util/kvm-stat.c
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.isa.exit_reasons import ISA_NAMES, ISA_VMX, VMX_BASIC_EXIT_REASON_MASK, describe_exit_reason
from kvmtrace.spans.keys import grown
from kvmtrace.spans.lane_keys import split_pair
from kvmtrace.spans.lanes import Step
from kvmtrace.stats.mean_variance import Moments
from kvmtrace.stats.rows import PerfRow, PerfTables

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvmtrace.spans.keys import KeyIndex
    from kvmtrace.spans.lane_keys import LaneKeys
    from kvmtrace.spans.lanes import Lanes

KEY_LENGTH = 19  # perf cuts its keys to decode_str_len - 1 characters
HASH_BUCKETS = 1 << 12  # EVENTS_BITS, tools/perf/util/kvm-stat.h


_IS_BEGIN = np.zeros(256, bool)  # of what the mmio table counts
_IS_BEGIN[[Step.EXIT, Step.MMIO_READ, Step.MMIO_WRITE]] = True


@dataclass(frozen=True)
class _Closed:
    """Samples of one table: the lane rows where each begins and ends, and its key number."""

    begin: NDArray[np.intp]
    end: NDArray[np.intp]
    key: NDArray[np.int64]


class PerfAccumulator:
    """Collects the four tables over consecutive pieces of lanes."""

    def __init__(self) -> None:
        self._moments = {name: Moments() for name in ("vmexit", "mmio", "ioport", "msr")}
        self._entered = np.zeros(16, bool)  # per thread: had its first VM-entry
        self._exit_pending_ns = np.zeros(16, np.int64)  # per thread: mmio's kvm_exit that waits for a read

    def feed(self, lanes: Lanes) -> None:
        """Take in the next piece."""
        if not len(lanes):
            return
        lanes = self._after_first_entry(lanes)
        for name, step in (("vmexit", Step.EXIT), ("ioport", Step.PIO), ("msr", Step.MSR)):
            closed = _until_entry(lanes, step)
            self._add(name, lanes, closed)
        self._feed_mmio(lanes)

    def finish(self, keys: LaneKeys) -> PerfTables:
        """Return the tables, in perf's order."""
        return PerfTables(
            vmexit=self._rows("vmexit", keys.reasons, _vmexit_row, _exit_code),
            mmio=self._rows("mmio", keys.mmio, _mmio_row, lambda key: key >> 1),
            ioport=self._rows("ioport", keys.ports, _ioport_row, lambda key: key & 0xFFFFFFFF),
            msr=self._rows("msr", keys.msrs, _msr_row, lambda key: key & 0xFFFFFFFF),
        )

    def _after_first_entry(self, lanes: Lanes) -> Lanes:
        """Leave out what threads did before their first VM-entry."""
        self._entered = grown(self._entered, int(lanes.thread.max()) + 1)
        starts = lanes.starts()
        if self._entered[lanes.thread[starts]].all():
            return lanes
        keep = np.ones(len(lanes), bool)
        for start, stop in zip(starts, np.append(starts[1:], len(lanes)), strict=True):
            number = lanes.thread[start]
            if not self._entered[number]:
                entries = np.flatnonzero(lanes.step[start:stop] == Step.ENTRY)
                self._entered[number] = len(entries) > 0
                keep[start : start + entries[0] if len(entries) else stop] = False
        return lanes.take(keep)

    def _add(self, name: str, lanes: Lanes, closed: _Closed) -> None:
        """Count samples; perf drops those that end before they begin or begin at time 0."""
        dur_ns = lanes.ts_ns[closed.end] - lanes.ts_ns[closed.begin]
        kept = (dur_ns >= 0) & (lanes.ts_ns[closed.begin] != 0)
        whole = bool(kept.all())
        self._moments[name].add(closed.key if whole else closed.key[kept], dur_ns if whole else dur_ns[kept])

    def _feed_mmio(self, lanes: Lanes) -> None:
        is_mmio = (lanes.step == Step.MMIO_READ) | (lanes.step == Step.MMIO_WRITE)
        if is_mmio.any():
            rows = np.flatnonzero(is_mmio | (lanes.step == Step.ENTRY) | (lanes.step == Step.EXIT))
            steps = lanes.take(rows)
            self._add("mmio", steps, _mmio_samples(steps))
            self._add_reads_of_earlier_exits(steps)
        self._remember_exits(lanes)

    def _add_reads_of_earlier_exits(self, steps: Lanes) -> None:
        """Count reads whose kvm_exit lies in a piece before this one."""
        self._exit_pending_ns = grown(self._exit_pending_ns, int(steps.thread.max()) + 1)
        before = steps.last(steps.step != Step.ENTRY)
        first = np.flatnonzero((steps.step == Step.MMIO_READ) & (before == np.arange(len(steps))))
        earlier = _shifted(before, steps)
        first = first[earlier[first] < 0]
        begin = self._exit_pending_ns[steps.thread[first]]
        dur_ns = steps.ts_ns[first] - begin
        kept = (begin != 0) & (dur_ns >= 0)
        self._moments["mmio"].add(steps.arg[first][kept], dur_ns[kept])

    def _remember_exits(self, lanes: Lanes) -> None:
        """Keep, per thread, the time of a kvm_exit that no kvm_mmio has followed yet."""
        if not len(lanes):
            return
        starts = lanes.starts()
        self._exit_pending_ns = grown(self._exit_pending_ns, int(lanes.thread.max()) + 1)
        for start, stop in zip(starts.tolist(), np.append(starts[1:], len(lanes)).tolist(), strict=True):
            begins = _IS_BEGIN[lanes.step[start:stop]]
            last = stop - 1 - int(begins[::-1].argmax())
            if _IS_BEGIN[lanes.step[last]]:
                is_exit = lanes.step[last] == Step.EXIT
                self._exit_pending_ns[lanes.thread[start]] = lanes.ts_ns[last] if is_exit else 0

    def _rows(
        self, name: str, index: KeyIndex, row: Callable[[int], dict[str, Any]], bucket: Callable[[int], int]
    ) -> tuple[PerfRow, ...]:
        """Return a table's rows by samples, descending; ties as perf's hash table leaves them."""
        moments = self._moments[name]
        keys = index.keys()
        # keys without a single sample may lie behind the last counter
        numbers = [n for n in range(min(len(keys), len(moments.count))) if moments.count[n]]
        numbers.sort(key=lambda n: (-moments.count[n], bucket(keys[n]) % HASH_BUCKETS, -n))
        return tuple(PerfRow(**row(keys[n]), **moments.summary(n)) for n in numbers)


def _shifted(last: NDArray[np.int32], lanes: Lanes) -> NDArray[np.int32]:
    """Return `last` of the row before, -1 at the start of a thread: strictly before instead of up to."""
    before = np.full(len(last), -1, np.int32)
    before[1:] = np.where(lanes.same_thread(), last[:-1], np.int32(-1))
    return before


def _until_entry(lanes: Lanes, step: Step) -> _Closed:
    """Return the samples from each `step` to the VM-entry that follows with no other `step` in between."""
    begin = np.flatnonzero(lanes.step == step)
    if not len(begin):
        return _Closed(begin, begin, lanes.arg[begin])
    is_entry = lanes.step == Step.ENTRY
    entries = np.append(np.flatnonzero(is_entry), len(lanes) - 1)
    end = entries[np.cumsum(is_entry)[begin]]  # as many entries stand before it
    last_of_kind = np.append(begin[1:], len(lanes)) > end
    closes = last_of_kind & (lanes.step[end] == Step.ENTRY) & (end > begin) & (lanes.thread[end] == lanes.thread[begin])
    begin, end = begin[closes], end[closes]
    return _Closed(begin, end, lanes.reasons(begin) if step == Step.EXIT else lanes.arg[begin])


def _mmio_samples(steps: Lanes) -> _Closed:
    """Return the samples within lanes of nothing but entries, exits, MMIO reads and MMIO writes."""
    rows = np.arange(len(steps))
    before = _shifted(steps.last(steps.step != Step.ENTRY), steps)
    before_step = np.where(before >= 0, steps.step[before], Step.NONE)
    write_pending = (before_step == Step.MMIO_WRITE) & (before == rows - 1)
    read = steps.step == Step.MMIO_READ
    own_key = read & (before_step == Step.EXIT)
    end = np.flatnonzero(own_key | ((read | (steps.step == Step.ENTRY)) & write_pending))
    begin = before[end].astype(np.intp)
    return _Closed(begin, end, np.where(own_key[end], steps.arg[end], steps.arg[begin]))


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"  # as C's %#x prints it


def _exit_code(key: int) -> int:
    return key & 0xFFFFFFFF


def _vmexit_row(key: int) -> dict[str, Any]:
    isa, exit_reason = split_pair(key)
    name = describe_exit_reason(isa, exit_reason)
    known = not name.startswith("UNKNOWN") and (isa != ISA_VMX or exit_reason <= VMX_BASIC_EXIT_REASON_MASK)
    shown = name[:KEY_LENGTH] if known else "UNKNOWN"
    return {"key": shown, "exit_reason": exit_reason, "isa": ISA_NAMES.get(isa)}


def _mmio_row(key: int) -> dict[str, Any]:
    return {"key": f"{_hex(key >> 1)}:{'W' if key & 1 else 'R'}"[:KEY_LENGTH]}


def _ioport_row(key: int) -> dict[str, Any]:
    write, port = split_pair(key)
    return {"key": f"{_hex(port)}:{'POUT' if write else 'PIN'}"}


def _msr_row(key: int) -> dict[str, Any]:
    write, msr = split_pair(key)
    return {"key": f"{_hex(msr)}:{'W' if write else 'R'}"}
