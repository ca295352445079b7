"""Make a large trace.dat (version 6) of a small real one: its pages again and again, each time later."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.formats.trace_dat.trace_dat_layout import read_trace_dat
from kvmtrace.formats.trace_dat.trace_dat_sections import META_MAGIC

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 4096


def repeat_trace_dat(source: Path, target: Path, times: int) -> None:
    """Write `source` to `target` with its pages `times` over; clock, order and duration stay plausible."""
    data = source.read_bytes()
    trace = read_trace_dat(memoryview(data), str(source))
    assert trace.version == 6
    (top,) = trace.buffers
    cpus = [np.frombuffer(data, np.uint8, c.size, c.offset).reshape(-1, PAGE) for c in top.cpus]
    stamps = [c[:, :8].copy().view("<u8").reshape(-1) for c in cpus]
    span = max(int(s[-1]) for s in stamps if len(s)) - min(int(s[0]) for s in stamps if len(s)) + 10**9
    first = min(c.offset for c in top.cpus if c.size)
    head = bytearray(data[:first])
    table = head.rindex(b"flyrecord\0") + 10
    at = first
    for i, cpu in enumerate(top.cpus):
        struct.pack_into("<QQ", head, table + 16 * i, at, cpu.size * times)
        at += cpu.size * times
    with target.open("wb") as out:
        out.write(head)
        for pages, ts in zip(cpus, stamps, strict=True):
            for k in range(times):
                part = pages.copy()
                part[:, :8] = (ts + np.uint64(k * span)).reshape(-1, 1).view(np.uint8)
                out.write(part.tobytes())
        if data.endswith(META_MAGIC):
            size = struct.unpack("<Q", data[-24:-16])[0]
            meta = json.loads(data[-24 - size : -24])
            meta["duration_ns"] += (times - 1) * span
            text = json.dumps(meta).encode()
            out.write(text + struct.pack("<Q", len(text)) + META_MAGIC)
