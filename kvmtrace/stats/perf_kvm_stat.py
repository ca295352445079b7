"""The tables of `perf kvm stat report`, by its own rules, to the digit.

Per host thread perf keeps the start and key of one pending event. Nothing counts before the thread's first
VM-entry, losses are not looked at, and a later begin overwrites an earlier one. Ends and begins:

vmexit   kvm_exit → kvm_entry, key exit reason
ioport   kvm_pio → kvm_entry, key port and direction
msr      kvm_msr → kvm_entry, key MSR and direction
mmio     writes kvm_mmio → kvm_entry; reads kvm_exit → kvm_mmio. A read that ends while a write is pending is
         counted for the write's key, and a kvm_entry leaves a kvm_exit without key pending.

On architectures whose exit reason perf learns from kvm_exit alone it measures guest mode instead, kvm_entry → kvm_exit,
and has no other table (Isa.perf_guest_key).

Source: tools/perf/builtin-kvm.c (handle_kvm_event), tools/perf/arch/x86/util/kvm-stat.c, arch/arm64/util/kvm-stat.c
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace._native import perf_tables
from kvmtrace._native.perf_tables import PerfKind
from kvmtrace.isa.registry import BY_NUMBER, isa_name, recognise
from kvmtrace.spans.lane_builder import MAX_THREADS, MAX_TID, MMIO_READ, MMIO_WRITE
from kvmtrace.spans.lane_keys import KEYED, split_pair
from kvmtrace.stats.durations import REL_STDERR_DIGITS
from kvmtrace.stats.rows import PerfRow, PerfTables

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable

KEY_LENGTH = 19  # perf cuts its keys to decode_str_len - 1 characters
HASH_BUCKETS = 1 << 12  # EVENTS_BITS, tools/perf/util/kvm-stat.h

# event -> (what it is to perf, the table of its keys)
_EVENTS = {
    "kvm_entry": (perf_tables.ENTRY, ""),
    "kvm_exit": (perf_tables.EXIT, "vmexit"),
    "kvm_pio": (perf_tables.PIO, "ioport"),
    "kvm_msr": (perf_tables.MSR, "msr"),
    "kvm_mmio": (perf_tables.KEY_ONLY, "mmio"),
}
_OF_GUEST_MODE = {"kvm_entry": (perf_tables.ENTERS, ""), "kvm_exit": (perf_tables.LEAVES, "vmexit")}


class PerfAccumulator:
    """Collects the four tables over consecutive tables of events."""

    def __init__(self) -> None:
        self._tables = perf_tables.PerfTables(MAX_TID, MAX_THREADS)

    def feed(self, table: EventTable) -> None:
        """Take in the next table."""
        events = _OF_GUEST_MODE if _measures_guest_mode(table) else _EVENTS
        kinds = {
            table.kind_index[name]: _kind(table, name, *told) for name, told in events.items() if table.count(name)
        }
        if kinds:
            self._tables.take(table.ts_ns, table.tid, table.kind, len(table.kinds), kinds)

    @property
    def isas(self) -> set[int]:
        """The numbers of the ISAs that the VM-exits so far name."""
        return {split_pair(key)[0] for key in self._tables.keys("vmexit")}

    def finish(self) -> PerfTables:
        """Return the tables, in perf's order."""
        return PerfTables(
            vmexit=self._rows("vmexit", _vmexit_row, _exit_code),
            mmio=self._rows("mmio", _mmio_row, lambda key: key >> 1),
            ioport=self._rows("ioport", _ioport_row, lambda key: key & 0xFFFFFFFF),
            msr=self._rows("msr", _msr_row, lambda key: key & 0xFFFFFFFF),
        )

    def _rows(
        self, name: str, row: Callable[[int], dict[str, Any]], bucket: Callable[[int], int]
    ) -> tuple[PerfRow, ...]:
        """Return a table's rows by samples, descending; ties as perf's hash table leaves them."""
        keys, sums = self._tables.keys(name), self._tables.sums(name)
        if name == "vmexit":
            keys, sums = _as_perf_counts(keys, sums)
        count = sums["count"].tolist()
        numbers = [n for n in range(len(keys)) if count[n]]
        numbers.sort(key=lambda n: (-count[n], bucket(keys[n]) % HASH_BUCKETS, -n))
        return tuple(PerfRow(**row(keys[n]), **_summary(sums[n])) for n in numbers)


def _measures_guest_mode(table: EventTable) -> bool:
    if "kvm_exit" not in table.kind_index:
        return False
    isa = recognise(table.kinds[table.kind_index["kvm_exit"]].fields)
    return isa is not None and isa.perf_guest_key is not None


def _kind(table: EventTable, name: str, what: int, keys_of: str) -> PerfKind:
    """Return what perf sees of a kind's events."""
    if not keys_of:
        return PerfKind(what)
    keys = KEYED[name][1](table)
    if name != "kvm_mmio":
        return PerfKind(what, keys_of, keys)
    whats = np.full(len(keys), what, np.uint8)  # what userspace has yet to answer is none
    if table.has(name, "type"):
        kind = table.field(name, "type")
        whats[kind == MMIO_READ], whats[kind == MMIO_WRITE] = perf_tables.MMIO_READ, perf_tables.MMIO_WRITE
    return PerfKind(what, keys_of, keys, whats)


def _summary(sums: NDArray[np.void]) -> dict[str, Any]:
    """Return the fields of a PerfRow for the sums of at least one sample."""
    n, total_ns, mean, squares = int(sums["count"]), int(sums["total"]), float(sums["mean"]), float(sums["squares"])
    spread = 100 * math.sqrt(squares / (n - 1) / n) / mean if n > 1 and mean else 0.0
    return {
        "samples": n,
        "total_ns": total_ns,
        "min_ns": int(sums["min_ns"]),
        "max_ns": int(sums["max_ns"]),
        "mean_ns": round(total_ns / n),
        "rel_stderr": round(spread, REL_STDERR_DIGITS),
    }


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"  # as C's %#x prints it


def _exit_code(key: int) -> int:
    """Return the number by which perf finds a VM-exit's row."""
    isa, exit_reason = split_pair(key)
    known = BY_NUMBER.get(isa)
    return exit_reason if known is None or known.perf_guest_key is None else known.perf_guest_key(exit_reason)


def _as_perf_counts(keys: list[int], sums: NDArray[np.void]) -> tuple[list[int], NDArray[np.void]]:
    """Add up the exit reasons that perf takes for one: the first of them names the row."""
    first: dict[int, int] = {}
    for number, key in enumerate(keys):
        first.setdefault(_exit_code(key), number)
    if len(first) == len(keys):
        return keys, sums
    merged = sums.copy()
    for number, key in enumerate(keys):
        if (to := first[_exit_code(key)]) != number:
            _add_samples(merged[to : to + 1], sums[number : number + 1])
    kept = sorted(first.values())
    return [keys[number] for number in kept], merged[kept]


def _add_samples(to: NDArray[np.void], more: NDArray[np.void]) -> None:
    """Add the samples of one row to another's."""
    n, m = int(to["count"][0]), int(more["count"][0])
    if not m:
        return
    off = float(more["mean"][0] - to["mean"][0])
    to["squares"] += more["squares"] + off * off * n * m / (n + m)
    to["mean"] += off * m / (n + m)
    to["min_ns"] = more["min_ns"] if not n else np.minimum(to["min_ns"], more["min_ns"])
    for field in ("count", "total"):
        to[field] += more[field]
    to["max_ns"] = np.maximum(to["max_ns"], more["max_ns"])


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
