"""The capture file of the bpf back end: a header, then frames; BPF_FORMAT.md beside this file describes it."""

from __future__ import annotations

import json
import os
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

MAGIC = b"KVMTRACE-BPF-1\n\0"
FRAME_MAGIC = b"KTFR"
FRAME = struct.Struct("<4sHHQQ")  # magic, type, cpu, position, length of what follows
FRAME_SPAN, FRAME_META = 1, 2
KEPT_FRAMES = 4096  # so many are remembered: what is written in some looks at all rings
RECORD_LAYOUT = [
    ["ts_ns", 0, "u64", "CLOCK_MONOTONIC, ns"],
    ["tid", 8, "u32", "thread that was running"],
    ["pid", 12, "u32", "its process (tgid)"],
    ["lost", 16, "u32", "events lost on this CPU so far, modulo 2^32"],
    ["kind", 20, "u16", "index into kinds"],
    ["irq_flags", 22, "u8", "TRACE_FLAG_* bits; 0x02: whether interrupts were off is not known"],
    ["preempt_count", 23, "u8", "preemption depth, at most 15"],
]
RECORD_HEADER_BYTES = 24
LAYOUT = {
    "record_header": RECORD_LAYOUT,
    "record_header_bytes": RECORD_HEADER_BYTES,
    "data": "the tracepoint's record from its byte 8 on, laid out as the kind's format says",
    "span": "records: u32 length (bit 31: not finished, bit 30: discarded), u32 reserved, data; rounded up to 8",
}


def encode_json(value: dict[str, Any]) -> bytes:
    """Return the object as JSON, padded with blanks to a multiple of 8 bytes."""
    text = json.dumps(value, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def encode_header(meta: dict[str, Any], kinds: Iterable[tuple[str, str, str]], n_cpus: int) -> bytes:
    """Return the file's beginning.

    Parameters
    ----------
    meta : "kvmtrace.capture/1" as far as it is known at the start
    kinds : (name, system, format text) by kind number
    n_cpus : int
    """
    table = [{"name": name, "system": system, "format": text} for name, system, text in kinds]
    text = encode_json({"meta": meta, "layout": LAYOUT, "kinds": table, "n_cpus": n_cpus})
    return MAGIC + struct.pack("<Q", len(text)) + text


class CaptureWriter:
    """Appends frames to an open file; after each of them the file is a readable capture.

    Parameters
    ----------
    fd : int, open for writing and empty
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.size = 0
        self.whole: list[int] = []  # where the latest frames begin

    def write_header(self, header: bytes) -> None:
        """Write the file's beginning."""
        self._write([header])

    def write_span(self, cpu: int, position: int, span: memoryview) -> None:
        """Append bytes of a CPU's ring as they are."""
        self._frame(FRAME_SPAN, cpu, position, span)

    def write_meta(self, values: dict[str, Any]) -> None:
        """Append values of the metadata; later ones replace earlier ones."""
        self._frame(FRAME_META, 0, 0, memoryview(encode_json(values)))

    def _frame(self, kind: int, cpu: int, position: int, data: memoryview) -> None:
        start = self.size
        try:
            self._write([FRAME.pack(FRAME_MAGIC, kind, cpu, position, len(data)), data])
        except OSError:
            self.cut(start)
            raise
        self.whole.append(start)
        del self.whole[:-KEPT_FRAMES]

    def cut(self, size: int) -> None:
        """Make the file end after `size` bytes, and go on writing there."""
        self.size = size
        os.ftruncate(self.fd, size)
        os.lseek(self.fd, size, os.SEEK_SET)

    def _write(self, parts: list[bytes | memoryview]) -> None:
        total = sum(len(part) for part in parts)
        done = os.writev(self.fd, parts)
        self.size += done
        if done == total:
            return
        rest = memoryview(b"".join(parts))[done:]  # short writes are rare: a signal, a disk that fills up
        while rest:
            done = os.write(self.fd, rest)
            self.size += done
            rest = rest[done:]
