"""Encode trace.dat files, versions 6 and 7 (trace-cmd.dat.v6(5), trace-cmd.dat.v7(5))."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import zstandard

from writers.formats import FORMATS, HEADER_EVENT, header_page

PAGE_SIZE = 4096


@dataclass
class TraceDatWriter:
    """What goes into the file; cpus: pages of each CPU, instances: name -> the same."""

    cpus: list[bytes]
    formats: dict[str, list[bytes]] = field(default_factory=lambda: FORMATS)
    options: list[tuple[int, bytes]] = field(default_factory=list)
    comms: dict[int, str] = field(default_factory=lambda: {1: "init", 77: "CPU 0/KVM"})
    instances: dict[str, list[bytes]] = field(default_factory=dict)
    compression: str = "none"
    chunk_pages: int = 2
    meta: dict[str, Any] | None = None
    clock: str = "mono"

    def comm_text(self) -> bytes:
        return "".join(f"{tid} {comm}\n" for tid, comm in self.comms.items()).encode()

    def event_formats(self) -> bytes:
        out = struct.pack("<I", len(self.formats))
        for system, texts in self.formats.items():
            out += system.encode() + b"\0" + struct.pack("<I", len(texts))
            out += b"".join(struct.pack("<Q", len(t)) + t for t in texts)
        return out

    def header_info(self) -> bytes:
        page = header_page()
        return (
            b"header_page\0"
            + struct.pack("<Q", len(page))
            + page
            + b"header_event\0"
            + struct.pack("<Q", len(HEADER_EVENT))
            + HEADER_EVENT
        )

    def trailer(self) -> bytes:
        if self.meta is None:
            return b""
        text = json.dumps(self.meta).encode()
        return text + struct.pack("<Q", len(text)) + b"KVMTRACE-META-1\n"

    def clock_text(self) -> bytes:
        return f"local global [{self.clock}] x86-tsc".encode()

    def v6(self) -> bytes:
        head = b"\x17\x08\x44tracing6\0\x00\x08" + struct.pack("<I", PAGE_SIZE) + self.header_info()
        head += struct.pack("<I", 0) + self.event_formats()
        head += struct.pack("<I", 3) + b"abc" + struct.pack("<I", 0)  # kallsyms, printk formats
        comms = self.comm_text()
        head += struct.pack("<Q", len(comms)) + comms + struct.pack("<I", len(self.cpus)) + b"options  \0"
        options = [*self.options, (4, b"")]
        size = sum(6 + len(data) for _, data in options) + 2
        size += sum(6 + 8 + len(name) + 1 for name in self.instances)
        clock = self.clock_text()
        table = len(head) + size + 10 + 16 * len(self.cpus) + 8 + len(clock)
        blocks, at = [(table + 10, self.cpus)], table
        instance_tables = []
        for name, cpus in self.instances.items():
            instance_tables.append((name, at, cpus))
            at += 10 + 16 * len(cpus)
        data_at = -(-at // PAGE_SIZE) * PAGE_SIZE
        body = b""

        def place(cpus: list[bytes]) -> bytes:
            nonlocal body
            rows = b""
            for pages in cpus:
                rows += struct.pack("<QQ", data_at + len(body), len(pages))
                body += pages
            return rows

        top = place(self.cpus)
        for name, offset, _ in instance_tables:
            options.append((3, struct.pack("<Q", offset) + name.encode() + b"\0"))
        head += b"".join(struct.pack("<HI", n, len(d)) + d for n, d in options) + struct.pack("<H", 0)
        head += b"flyrecord\0" + top + struct.pack("<Q", len(clock)) + clock
        for _, offset, cpus in instance_tables:
            assert len(head) == offset
            head += b"flyrecord\0" + place(cpus)
        assert blocks
        return head.ljust(data_at, b"\0") + body + self.trailer()

    def _pack(self, data: bytes) -> bytes:
        if self.compression == "zlib":
            return zlib.compress(data)
        return zstandard.ZstdCompressor(write_content_size=False).compress(data)

    def _section(self, number: int, data: bytes) -> bytes:
        flags = 0
        if self.compression != "none":
            packed = self._pack(data)
            data, flags = struct.pack("<II", len(packed), len(data)) + packed, 1
        return struct.pack("<HHIQ", number, flags, 0, len(data)) + data

    def _chunks(self, pages: bytes) -> bytes:
        step = self.chunk_pages * PAGE_SIZE
        parts = [pages[i : i + step] for i in range(0, len(pages), step)]
        out = struct.pack("<I", len(parts))
        for part in parts:
            packed = self._pack(part)
            out += struct.pack("<II", len(packed), len(part)) + packed
        return out

    def v7(self) -> bytes:
        out = b"\x17\x08\x44tracing7\0\x00\x08" + struct.pack("<I", PAGE_SIZE)
        out += self.compression.encode() + b"\x001.0\0"
        where = len(out)
        out += bytes(8)
        options = [*self.options, (4, self.clock_text()), (8, struct.pack("<I", len(self.cpus)))]
        comms = self.comm_text()
        for number, data in (
            (16, self.header_info()),
            (17, struct.pack("<I", 0)),
            (18, self.event_formats()),
            (21, struct.pack("<Q", len(comms)) + comms),
        ):
            options.append((number, struct.pack("<Q", len(out))))
            out += self._section(number, data)
        for name, cpus in {"": self.cpus, **self.instances}.items():
            out, option = self._buffer(out, name, cpus)
            options.append((3, option))
        # the options in two chained sections
        half = len(options) // 2
        first, second = options[:half], options[half:]
        second_at = len(out)
        out += self._options(second, 0)
        out = out[:where] + struct.pack("<Q", len(out)) + out[where + 8 :]
        return out + self._options(first, second_at) + self.trailer()

    def _options(self, options: list[tuple[int, bytes]], after: int) -> bytes:
        data = b"".join(struct.pack("<HI", n, len(d)) + d for n, d in options)
        return self._section(0, data + struct.pack("<HIQ", 0, 8, after))

    def _buffer(self, out: bytes, name: str, cpus: list[bytes]) -> tuple[bytes, bytes]:
        section = len(out)
        packed = self.compression != "none"
        out += struct.pack("<HHIQ", 3, int(packed), 0, 0)
        rows = b""
        for cpu, pages in enumerate(cpus):
            if not packed:
                out = out.ljust(-(-len(out) // PAGE_SIZE) * PAGE_SIZE, b"\0")
            data = self._chunks(pages) if packed else pages
            rows += struct.pack("<IQQ", cpu, len(out), len(data))
            out += data
        option = struct.pack("<Q", section) + name.encode() + b"\0" + self.clock.encode() + b"\0"
        return out, option + struct.pack("<II", PAGE_SIZE, len(cpus)) + rows
