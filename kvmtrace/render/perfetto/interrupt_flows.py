"""Interrupts followed from acceptance by the local APIC over injection to their end, as moments joined by flows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.render.perfetto.trace_content import Slices
from kvmtrace.spans.lane_keys import u64

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kvmtrace.render.perfetto.trace_content import Names
    from kvmtrace.table.event_table import EventTable

ACCEPT, INJECT, AGAIN, EOI = range(4)
_WORDS = ("accept", "inject", "inject again", "EOI")
# events -> the fields that they may have their vector in, newest first
_VECTOR = {"kvm_apic_accept_irq": ("vec",), "kvm_inj_virq": ("vector", "irq"), "kvm_eoi": ("vector",)}


class InterruptFlows:
    """Makes the moments of consecutive tables.

    An accepted vector belongs to the next injection of it (several may merge), an end to the latest one.
    """

    def __init__(self, names: Names) -> None:
        self._names = names
        self._injected: dict[int, int] = {}  # thread number << 8 | vector -> injections so far

    def feed(self, table: EventTable, threads: Mapping[int, int], apics: Mapping[int, int]) -> Slices | None:
        """Return the moments of a table, None for none.

        Parameters
        ----------
        threads : tid of each vCPU -> its number
        apics : APIC id -> number of the vCPU thread, of those that only one VM has
        """
        parts = [self._accepted(table, apics), self._of_threads(table, threads), self._ended(table, threads, apics)]
        row, what, key = (np.concatenate([part[i] for part in parts]) for i in range(3))
        if not len(row):
            return None
        order = np.lexsort((row, key))
        row, what, key = row[order], what[order], key[order]
        number = self._numbers(what, key)
        flow = np.where(number >= 0, (key + 1) << 32 | (number + 1), 0).astype(np.uint64)
        return Slices(
            track=key >> 8,
            name=self._moment_names(what, key & 0xFF),
            ts_ns=table.ts_ns[row],
            dur_ns=np.zeros(len(row), np.int64),
            flow=flow,
            begins=(what == ACCEPT) & (flow != 0),
            ends=(what == EOI) & (flow != 0),
        )

    def _numbers(self, what: NDArray[np.int64], key: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return which injection of its vector each moment belongs to, from 0; -1: to none that was seen."""
        first = np.append(True, key[1:] != key[:-1])
        group = np.cumsum(first) - 1
        injects = np.cumsum(what == INJECT)
        begin = np.flatnonzero(first)
        before = np.array([self._injected.get(int(one), 0) for one in key[begin]], np.int64)
        offset = before - (injects[begin] - (what[begin] == INJECT))
        count = injects + offset[group]  # injections of the key up to and with this moment
        last = np.append(begin[1:], len(key)) - 1
        self._injected.update(zip(key[last].tolist(), count[last].tolist(), strict=True))
        numbers: NDArray[np.int64] = np.where(what == ACCEPT, count, count - 1)
        return numbers

    def _moment_names(self, what: NDArray[np.int64], vector: NDArray[np.int64]) -> NDArray[np.int64]:
        code = what << 8 | vector
        values, inverse = np.unique(code, return_inverse=True)
        numbers = [self._names.number(f"{_WORDS[value >> 8]} {value & 0xFF:#x}") for value in values.tolist()]
        found: NDArray[np.int64] = np.array(numbers, np.int64)[inverse.reshape(-1)]
        return found

    @staticmethod
    def _accepted(table: EventTable, apics: Mapping[int, int]) -> tuple[NDArray[np.int64], ...]:
        rows = table.rows("kvm_apic_accept_irq")
        threads = _looked_up(u64(table, "kvm_apic_accept_irq", "apicid").astype(np.int64), apics)
        return _moments(rows, np.full(len(rows), ACCEPT), threads, _vector(table, "kvm_apic_accept_irq"))

    @staticmethod
    def _of_threads(table: EventTable, threads: Mapping[int, int]) -> tuple[NDArray[np.int64], ...]:
        rows = table.rows("kvm_inj_virq")
        again = u64(table, "kvm_inj_virq", "reinjected") & np.uint64(1) != 0
        own = _looked_up(table.tid[rows].astype(np.int64), threads)
        own[u64(table, "kvm_inj_virq", "soft") & np.uint64(1) != 0] = -1  # INT n comes from no APIC
        return _moments(rows, np.where(again, AGAIN, INJECT), own, _vector(table, "kvm_inj_virq"))

    @staticmethod
    def _ended(
        table: EventTable, threads: Mapping[int, int], apics: Mapping[int, int]
    ) -> tuple[NDArray[np.int64], ...]:
        rows = table.rows("kvm_eoi")
        own = _looked_up(table.tid[rows].astype(np.int64), threads)
        by_apic = _looked_up(u64(table, "kvm_eoi", "apicid").astype(np.int64), apics)
        return _moments(rows, np.full(len(rows), EOI), np.where(own < 0, by_apic, own), _vector(table, "kvm_eoi"))


def _vector(table: EventTable, event: str) -> NDArray[np.int64]:
    name = next((name for name in _VECTOR[event] if table.has(event, name)), "")
    return u64(table, event, name).astype(np.int64) & 0xFF


def _moments(
    rows: NDArray[np.intp], what: NDArray[np.int64], threads: NDArray[np.int64], vector: NDArray[np.int64]
) -> tuple[NDArray[np.int64], ...]:
    """Return (row, what, key) of the moments whose thread is known."""
    known = threads >= 0
    return rows[known], what[known], (threads << 8 | vector)[known]


def _looked_up(values: NDArray[np.int64], numbers: Mapping[int, int]) -> NDArray[np.int64]:
    """Return the number of each value, -1 for those that have none."""
    if not numbers or not len(values):
        return np.full(len(values), -1, np.int64)
    known = np.array(sorted(numbers), np.int64)
    at = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.where(known[at] == values, np.array([numbers[one] for one in known.tolist()])[at], -1)
