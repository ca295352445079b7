"""Encode perf.data files in file mode (tools/perf/Documentation/perf.data-file-format.txt)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import zstandard

from writers.formats import FORMATS, HEADER_EVENT, header_page

IP, TID, TIME, CALLCHAIN, CPU, PERIOD, RAW, IDENTIFIER = 1, 2, 4, 32, 128, 256, 1024, 1 << 16
USUAL = IP | TID | TIME | CPU | PERIOD | RAW | IDENTIFIER
LOST, COMM, FORK, SAMPLE, LOST_SAMPLES, FINISHED_ROUND, COMPRESSED = 2, 3, 7, 9, 13, 68, 81


def record(kind: int, body: bytes = b"") -> bytes:
    body += bytes(-len(body) % 8)
    return struct.pack("<IHH", kind, 0, 8 + len(body)) + body


def sample(
    ts: int, raw: bytes, *, tid: int = 77, cpu: int = 0, ident: int = 1, sample_type: int = USUAL, chain: int = 3
) -> bytes:
    body = b""
    for bit, data in (
        (IDENTIFIER, struct.pack("<Q", ident)),
        (IP, struct.pack("<Q", 0xFFFF)),
        (TID, struct.pack("<ii", tid, tid)),
        (TIME, struct.pack("<Q", ts)),
        (CPU, struct.pack("<II", cpu, 0)),
        (PERIOD, struct.pack("<Q", 1)),
        (CALLCHAIN, struct.pack("<Q", chain) + bytes(8 * chain)),
    ):
        body += data if sample_type & bit else b""
    if sample_type & RAW:
        raw += bytes(-(len(raw) + 4) % 8)
        body += struct.pack("<I", len(raw)) + raw
    return record(SAMPLE, body)


def sample_id(ts: int, cpu: int, ident: int = 1) -> bytes:
    """What ends other records (sample_id_all) under USUAL: tid, time, cpu, identifier."""
    return struct.pack("<iiQIIQ", 1, 1, ts, cpu, 0, ident)


def comm(pid: int, tid: int, name: str) -> bytes:
    text = name.encode() + b"\0"
    return record(COMM, struct.pack("<ii", pid, tid) + text + bytes(-len(text) % 8) + sample_id(0, 0))


def fork(pid: int, tid: int) -> bytes:
    return record(FORK, struct.pack("<iiiiQ", pid, 1, tid, 1, 5) + sample_id(0, 0))


def lost(count: int, ts: int, cpu: int) -> bytes:
    return record(LOST, struct.pack("<QQ", 1, count) + sample_id(ts, cpu))


def finished_round() -> bytes:
    return record(FINISHED_ROUND)


@dataclass
class PerfDataWriter:
    """What goes into the file; attrs: (config, sample_type, ids)."""

    records: list[bytes]
    attrs: list[tuple[int, int, list[int]]] = field(default_factory=lambda: [(10, USUAL, [1]), (11, USUAL, [2])])
    compressed: bool = False
    hostname: str = "box"
    formats: dict[str, list[bytes]] = field(default_factory=lambda: FORMATS)
    features: dict[int, bytes] = field(default_factory=dict)

    def tracing_data(self) -> bytes:
        page = header_page()
        out = b"\x17\x08\x44tracing0.6\0\x00\x08" + struct.pack("<I", 4096)
        out += b"header_page\0" + struct.pack("<Q", len(page)) + page
        out += b"header_event\0" + struct.pack("<Q", len(HEADER_EVENT)) + HEADER_EVENT + struct.pack("<I", 0)
        out += struct.pack("<I", len(self.formats))
        for system, texts in self.formats.items():
            out += system.encode() + b"\0" + struct.pack("<I", len(texts))
            out += b"".join(struct.pack("<Q", len(t)) + t for t in texts)
        return out + struct.pack("<IIQ", 0, 0, 0)

    def _body(self) -> bytes:
        if not self.compressed:
            return b"".join(self.records)
        # records of odd sizes, and one record's bytes in two of them
        stream = zstandard.ZstdCompressor().compressobj()
        data, out = b"".join(self.records), b""
        for i in range(0, len(data), 1000):
            part = stream.compress(data[i : i + 1000]) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
            out += struct.pack("<IHH", COMPRESSED, 0, 8 + len(part)) + part
        return out

    def bytes(self) -> bytes:
        ids_at = 104
        ids = b"".join(struct.pack(f"<{len(i)}Q", *i) for _, _, i in self.attrs)
        attrs_at = ids_at + len(ids)
        attrs, at = b"", ids_at
        for config, sample_type, own in self.attrs:
            attr = struct.pack("<IIQQQQQ", 2, 128, config, 1, sample_type, 0, 1 << 18).ljust(128, b"\0")
            attrs += attr + struct.pack("<QQ", at, 8 * len(own))
            at += 8 * len(own)
        data_at, body = attrs_at + len(attrs), self._body()
        features = {1: self.tracing_data(), 3: struct.pack("<I", 16) + self.hostname.encode().ljust(16, b"\0")}
        if self.compressed:
            features[27] = bytes(20)
        features = dict(sorted({**features, **self.features}.items()))
        bits = sum(1 << bit for bit in features)
        head = b"PERFILE2" + struct.pack("<11Q", 104, 144, attrs_at, len(attrs), data_at, len(body), 0, 0, bits, 0, 0)
        head += struct.pack("<Q", 0)
        table = data_at + len(body)
        offset, rows, content = table + 16 * len(features), b"", b""
        for data in features.values():
            rows += struct.pack("<QQ", offset + len(content), len(data))
            content += data
        return head + ids + attrs + body + rows + content
