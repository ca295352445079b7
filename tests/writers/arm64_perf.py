"""The kvm_entry and kvm_exit events of an arm64 recording as a perf.data, which arm64's perf reads."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from writers.formats import event_format
from writers.perf_data import USUAL, PerfDataWriter, comm, finished_round, sample

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.table.event_table import EventTable

ENTRY, EXIT = 10, 11
FORMATS = {
    "kvm": [
        event_format("kvm_entry", ENTRY, [("unsigned long vcpu_pc", 8, 8, 0)], '"PC: 0x%016lx", REC->vcpu_pc'),
        event_format(
            "kvm_exit",
            EXIT,
            [("int ret", 8, 4, 1), ("unsigned int esr_ec", 12, 4, 0), ("unsigned long vcpu_pc", 16, 8, 0)],
            '"%d: HSR_EC: 0x%04x, PC: 0x%016lx", REC->ret, REC->esr_ec, REC->vcpu_pc',
        ),
    ]
}
RELEASE, ARCH, CPUID = 4, 6, 9  # of the features: perf asks for the processor before it reports


def _text(words: str) -> bytes:
    padded = words.encode().ljust(64, b"\0")
    return struct.pack("<I", len(padded)) + padded


def write_perf_data(events: EventTable, path: Path) -> None:
    """Write the entries and exits of a recording."""
    made: list[tuple[int, bytes]] = []
    for ident, (name, number) in enumerate((("kvm_entry", ENTRY), ("kvm_exit", EXIT)), 1):
        fields = [events.field(name, field).tolist() for field in ("ret", "esr_ec") if events.has(name, field)]
        words = "<Q" if number == ENTRY else "<iIQ"
        for row, *values in zip(
            events.rows(name).tolist(), *fields, events.field(name, "vcpu_pc").tolist(), strict=True
        ):
            tid, cpu = int(events.tid[row]), int(events.cpu[row])
            raw = struct.pack("<HBBi", number, 0, 0, tid) + struct.pack(words, *values)
            made.append((row, sample(int(events.ts_ns[row]), raw, tid=tid, cpu=cpu, ident=ident)))
    names = [comm(tid, tid, "CPU 0/KVM") for tid in sorted({int(events.tid[row]) for row, _ in made})]
    features = {RELEASE: _text("6.1.0-56-arm64"), ARCH: _text("aarch64"), CPUID: _text("0x00000000000f0510")}
    attrs = [(ENTRY, USUAL, [1]), (EXIT, USUAL, [2])]
    records = [*names, *(data for _, data in sorted(made)), finished_round()]
    path.write_bytes(PerfDataWriter(records, attrs, formats=FORMATS, features=features).bytes())
