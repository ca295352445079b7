"""Injected vectors and emulated instructions: counts that need no pairing of events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.kvm.vectors import describe_vector
from kvmtrace.spans.keys import Counter, KeyIndex
from kvmtrace.spans.lane_keys import NOT_TOLD, told, u64
from kvmtrace.stats.rows import EmulatedRow, InterruptRow
from kvmtrace.table.distinct import run_starts

if TYPE_CHECKING:
    from kvmtrace.table.event_table import EventTable

# kvm_emulate_insn.flags, arch/x86/kvm/trace.h
_PROTECTED, _VM86, _CS_D, _CS_L = 1, 2, 4, 8
_WIDE = np.uint64(_PROTECTED | _CS_L)
_INSN_BYTES = 15


class InjectionAccumulator:
    """Counts kvm_inj_virq and kvm_inj_exception by vector."""

    def __init__(self) -> None:
        self._count = {kind: Counter() for kind in ("irq", "soft", "exception")}
        self._again = {kind: Counter() for kind in ("irq", "soft", "exception")}
        self._knows_again: set[str] = set()

    def feed(self, table: EventTable) -> None:
        """Take in the next table."""
        if table.count("kvm_inj_virq"):
            name = "vector" if table.has("kvm_inj_virq", "vector") else "irq"  # renamed in 6.0
            vectors = u64(table, "kvm_inj_virq", name).astype(np.int64) & 0xFF
            soft = u64(table, "kvm_inj_virq", "soft") & np.uint64(1) != 0
            self._add(table, "kvm_inj_virq", vectors, {"irq": ~soft, "soft": soft})
        if table.count("kvm_inj_exception"):
            vectors = u64(table, "kvm_inj_exception", "exception").astype(np.int64) & 0xFF
            self._add(table, "kvm_inj_exception", vectors, {"exception": np.ones(len(vectors), bool)})

    def _add(
        self,
        table: EventTable,
        event: str,
        vectors: np.ndarray[tuple[int], np.dtype[np.int64]],
        kinds: dict[str, np.ndarray[tuple[int], np.dtype[np.bool_]]],
    ) -> None:
        again = u64(table, event, "reinjected") & np.uint64(1) != 0
        for kind, rows in kinds.items():
            self._count[kind].add(vectors[rows])
            self._again[kind].add(vectors[rows & again])
            if table.has(event, "reinjected"):
                self._knows_again.add(kind)

    def rows(self) -> tuple[InterruptRow, ...]:
        """Return the rows by count, descending."""
        rows = [
            InterruptRow(
                vector,
                kind,
                describe_vector(vector) if kind == "exception" else f"IRQ {vector:#x}",
                count[vector],
                self._again[kind][vector] if kind in self._knows_again else None,
            )
            for kind, count in self._count.items()
            for vector in range(256)
            if count[vector]
        ]
        return tuple(sorted(rows, key=lambda row: -row.count))


class InstructionAccumulator:
    """Counts kvm_emulate_insn by instruction bytes."""

    def __init__(self) -> None:
        self._index = KeyIndex()  # hash of bytes, length and mode
        self._samples: list[tuple[bytes, int]] = []  # instruction bytes and mode of each number
        self._count = Counter()
        self._failed = Counter()

    def feed(self, table: EventTable) -> None:
        """Take in the next table."""
        event = "kvm_emulate_insn"
        if not table.count(event) or not table.has(event, "insn"):
            return
        raw, lengths = table.field(event, "insn"), told(table, event, "len")
        flags, failed = told(table, event, "flags"), u64(table, event, "failed") != 0
        # beyond 4 GiB only 64-bit code runs
        flags = np.where((flags == NOT_TOLD) & (u64(table, event, "rip") >> np.uint64(32) != 0), _WIDE, flags)
        known = lengths != NOT_TOLD  # a disassembler's words in place of the bytes
        raw, lengths, flags, failed = raw[known], lengths[known], flags[known], failed[known]
        if not len(raw):
            return
        # what equals the instruction before counts with it: loops meet the same one again and again
        at = run_starts(_bytes(raw), lengths, flags)
        insn = _padded(raw[at])
        length = np.minimum(lengths[at], np.uint64(_INSN_BYTES)).astype(np.int64)
        insn[np.arange(16) >= length[:, None]] = 0
        mode = np.where(flags[at] == NOT_TOLD, 0, _bits(flags[at].astype(np.int64)))
        words = insn.view(np.uint64)
        tail = (mode << 8 | length).astype(np.uint64) << np.uint64(48)
        ids = self._index.encode(words[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ (words[:, 1] | tail))
        for number in range(len(self._samples), len(self._index)):
            row = int(np.argmax(ids == number))
            self._samples.append((insn[row, : length[row]].tobytes(), int(mode[row])))
        self._count.add(ids, np.diff(at, append=len(raw)))
        self._failed.add(ids, np.add.reduceat(failed, at, dtype=np.int64))

    def rows(self) -> tuple[EmulatedRow, ...]:
        """Return the rows by count, descending."""
        rows = [
            EmulatedRow(
                insn.hex(" "), str(mode or "?"), _disassembled(insn, mode), self._count[number], self._failed[number]
            )
            for number, (insn, mode) in enumerate(self._samples)
        ]
        return tuple(sorted(rows, key=lambda row: -row.count))


def _disassembled(insn: bytes, mode: int) -> str:
    """Return an instruction as text; of an unknown mode (0) only what is the same in all of them."""
    if not insn:
        return "(not fetched)"
    texts = {disassemble(insn, bits) for bits in ((mode,) if mode else (16, 32, 64))}
    return texts.pop() if len(texts) == 1 else "?"


def _bytes(insn: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Return instruction bytes as (n, size) uint8."""
    raw = np.ascontiguousarray(insn)
    return raw.view(np.uint8).reshape(len(raw), -1) if raw.dtype.kind == "S" or raw.ndim == 1 else raw


def _padded(insn: np.ndarray[tuple[int, int], np.dtype[np.uint8]]) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """Return instruction bytes as (n, 16) uint8."""
    raw = _bytes(insn)
    padded = np.zeros((len(raw), 16), np.uint8)
    width = min(raw.shape[1], _INSN_BYTES)
    padded[:, :width] = raw[:, :width]
    return padded


def _bits(flags: np.ndarray[tuple[int], np.dtype[np.int64]]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the code segment's width of each instruction; source: kei_decode_mode, arch/x86/kvm/trace.h."""
    protected = (flags & _PROTECTED != 0) & (flags & _VM86 == 0)
    wide = np.where(flags & _CS_L != 0, 64, np.where(flags & _CS_D != 0, 32, 16))
    return np.where(protected, wide, 16)


def disassemble(insn: bytes, bits: int) -> str:
    """Return an instruction in Intel syntax, "(bad)" if the bytes are none."""
    from iced_x86 import Decoder, Formatter, FormatterSyntax

    decoded = Decoder(bits, insn).decode()
    if decoded.is_invalid or not insn:
        return "(bad)"
    formatter = Formatter(FormatterSyntax.INTEL)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    return str(formatter.format(decoded))
