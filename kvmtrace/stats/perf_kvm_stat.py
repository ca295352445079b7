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

from typing import TYPE_CHECKING, Any

from kvmtrace._native.perf_tables import TABLES, PerfThreads
from kvmtrace.isa.registry import BY_NUMBER, isa_name
from kvmtrace.spans.lane_keys import split_pair
from kvmtrace.spans.lanes import REASON_MASK, Step
from kvmtrace.stats.mean_variance import Moments
from kvmtrace.stats.rows import PerfRow, PerfTables

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.spans.keys import KeyIndex
    from kvmtrace.spans.lane_keys import LaneKeys
    from kvmtrace.spans.lanes import Lanes

KEY_LENGTH = 19  # perf cuts its keys to decode_str_len - 1 characters
HASH_BUCKETS = 1 << 12  # EVENTS_BITS, tools/perf/util/kvm-stat.h


_STEPS = {
    "entry": Step.ENTRY,
    "exit": Step.EXIT,
    "pio": Step.PIO,
    "msr": Step.MSR,
    "mmio_read": Step.MMIO_READ,
    "mmio_write": Step.MMIO_WRITE,
    "reason_mask": REASON_MASK,
}


class PerfAccumulator:
    """Collects the four tables over consecutive pieces of lanes."""

    def __init__(self) -> None:
        self._moments = {name: Moments() for name in TABLES}
        self._threads = PerfThreads(_STEPS)

    def feed(self, lanes: Lanes) -> None:
        """Take in the next piece."""
        samples = self._threads.take_samples(lanes.thread, lanes.step, lanes.ts_ns, lanes.arg)
        for name, (key, dur_ns) in samples.items():
            self._moments[name].add(key, dur_ns)

    def finish(self, keys: LaneKeys) -> PerfTables:
        """Return the tables, in perf's order."""
        return PerfTables(
            vmexit=self._rows("vmexit", keys.reasons, _vmexit_row, _exit_code),
            mmio=self._rows("mmio", keys.mmio, _mmio_row, lambda key: key >> 1),
            ioport=self._rows("ioport", keys.ports, _ioport_row, lambda key: key & 0xFFFFFFFF),
            msr=self._rows("msr", keys.msrs, _msr_row, lambda key: key & 0xFFFFFFFF),
        )

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


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"  # as C's %#x prints it


def _exit_code(key: int) -> int:
    return key & 0xFFFFFFFF


def _vmexit_row(key: int) -> dict[str, Any]:
    isa, exit_reason = split_pair(key)
    known = BY_NUMBER.get(isa)
    # perf looks the whole number up: flags make it unknown
    shown = known.names.get(exit_reason, "UNKNOWN")[:KEY_LENGTH] if known is not None else "UNKNOWN"
    return {"key": shown, "exit_reason": exit_reason, "isa": isa_name(isa)}


def _mmio_row(key: int) -> dict[str, Any]:
    return {"key": f"{_hex(key >> 1)}:{'W' if key & 1 else 'R'}"[:KEY_LENGTH]}


def _ioport_row(key: int) -> dict[str, Any]:
    write, port = split_pair(key)
    return {"key": f"{_hex(port)}:{'POUT' if write else 'PIN'}"}


def _msr_row(key: int) -> dict[str, Any]:
    write, msr = split_pair(key)
    return {"key": f"{_hex(msr)}:{'W' if write else 'R'}"}
