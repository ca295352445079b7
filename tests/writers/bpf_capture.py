"""Writes captures of the bpf back end, by the format's description and not by the recorder's code."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

FORMAT_ENTRY = """name: kvm_entry
ID: 115
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:unsigned int vcpu_id;\toffset:8;\tsize:4;\tsigned:0;
\tfield:unsigned long rip;\toffset:16;\tsize:8;\tsigned:0;
\tfield:bool immediate_exit;\toffset:24;\tsize:1;\tsigned:0;

print fmt: "vcpu %u, rip 0x%lx", REC->vcpu_id, REC->rip
"""
FORMAT_FPU = """name: kvm_fpu
ID: 37
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;

\tfield:u32 load;\toffset:8;\tsize:4;\tsigned:0;

print fmt: "%u", REC->load
"""
KINDS = [
    {"name": "kvm_entry", "system": "kvm", "format": FORMAT_ENTRY},
    {"name": "kvm_fpu", "system": "kvm", "format": FORMAT_FPU},
]


@dataclass
class Record:
    ts_ns: int
    kind: int
    data: bytes
    tid: int = 100
    pid: int = 90
    lost: int = 0
    irq_flags: int = 2
    preempt_count: int = 1
    bits: int = 0


def entry(ts_ns: int, vcpu_id: int = 0, rip: int = 0x1000, **more: Any) -> Record:
    return Record(ts_ns, 0, struct.pack("<IIQB", vcpu_id, 0, rip, 0), **more)


def fpu(ts_ns: int, load: int, **more: Any) -> Record:
    return Record(ts_ns, 1, struct.pack("<I", load), **more)


def encode_record(record: Record) -> bytes:
    head = struct.pack(
        "<QIIIHBB",
        record.ts_ns,
        record.tid,
        record.pid,
        record.lost,
        record.kind,
        record.irq_flags,
        record.preempt_count,
    )
    body = head + record.data
    text = struct.pack("<II", len(body) | record.bits, 0) + body
    return text + bytes(-len(text) % 8)


def encode_span(records: list[Record]) -> bytes:
    return b"".join(map(encode_record, records))


def encode_frame(kind: int, cpu: int, position: int, data: bytes) -> bytes:
    return b"KTFR" + struct.pack("<HHQQ", kind, cpu, position, len(data)) + data


def encode_json(value: dict[str, Any]) -> bytes:
    text = json.dumps(value).encode()
    return text + b" " * (-len(text) % 8)


def encode_head(meta: dict[str, Any] | None = None, kinds: list[dict[str, str]] | None = None) -> bytes:
    text = encode_json(
        {
            "meta": meta or {"schema": "kvmtrace.capture/1", "backend": "bpf"},
            "layout": {},
            "kinds": KINDS if kinds is None else kinds,
            "n_cpus": 2,
        }
    )
    return b"KVMTRACE-BPF-1\n\0" + struct.pack("<Q", len(text)) + text


def encode_capture(
    spans: list[tuple[int, list[Record]]], meta: dict[str, Any] | None = None, last: dict[str, Any] | None = None
) -> bytes:
    """Return a capture whose spans (cpu, records) follow one another in their rings."""
    text, positions = encode_head(meta), {}
    for cpu, records in spans:
        data = encode_span(records)
        text += encode_frame(1, cpu, positions.get(cpu, 0), data)
        positions[cpu] = positions.get(cpu, 0) + len(data)
    return text + (encode_frame(2, 0, 0, encode_json(last)) if last is not None else b"")
