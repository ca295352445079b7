"""The end of a bpf capture on a full disk: complete on all CPUs up to one time, and what is missing is counted.

The disk may fill up between two CPUs' spans. A thread that moved between them would seem to leave the guest twice,
so what other CPUs recorded after the first event that could not be written is marked as discarded.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from typing import TYPE_CHECKING

from kvmtrace.capture.bpf.bpf_writer import FRAME, FRAME_SPAN

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.capture.bpf.bpf_writer import CaptureWriter
    from kvmtrace.capture.bpf.ring import Rings

BUSY, DISCARDED = 1 << 31, 1 << 30  # kernel/bpf/ringbuf.c
RECORD = struct.Struct("<I4xQ12xH")  # length, ts_ns and kind of BPF_FORMAT.md's record
RING_HEADER_BYTES = 8


def iter_records(span: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Yield (offset, time stamp, kind) of a span's records; those discarded or not finished are left out."""
    at = 0
    while at + RECORD.size <= len(span):
        word, ts_ns, kind = RECORD.unpack_from(span, at)
        if not word & (BUSY | DISCARDED):
            yield at, ts_ns, kind
        at += RING_HEADER_BYTES + (word & ~(BUSY | DISCARDED)) + 7 & ~7


class Unkept:
    """Events that the programs recorded and that are not in the file.

    Attributes
    ----------
    by_cpu : CPU -> Counter of kinds
    from_ns : int or None, time of the first of them
    """

    def __init__(self) -> None:
        self.by_cpu: dict[int, Counter[int]] = {}
        self.from_ns: int | None = None

    @property
    def total(self) -> int:
        """Return how many there are."""
        return sum(kinds.total() for kinds in self.by_cpu.values())

    def add_rings(self, rings: Rings) -> None:
        """Count what the rings still hold; no program may be running any more."""
        for ring, end in zip(rings.rings, rings.produced(), strict=True):
            with ring.span(end) as span:
                self._add(ring.cpu, span)

    def cut_frame(self, writer: CaptureWriter) -> bool:
        """Take the latest frame from the file; False if there is none."""
        if not writer.whole:
            return False
        start = writer.whole.pop()
        cpu, data = _span_at(writer.fd, start)
        self._add(cpu, data)
        writer.cut(start)
        return True

    def discard_newer(self, writer: CaptureWriter) -> None:
        """Mark as discarded what is in the file and not older than the first event that is not."""
        if self.from_ns is None:
            return
        done = set()
        for start in reversed(writer.whole):
            cpu, data = _span_at(writer.fd, start)
            if not data or cpu in done:
                continue
            kinds = Counter[int]()
            for at, ts_ns, kind in iter_records(data):
                if ts_ns >= self.from_ns:
                    kinds[kind] += 1
                    _mark(writer.fd, start + FRAME.size + at)
                elif not kinds:
                    done.add(cpu)  # spans before this one are older
            self.by_cpu.setdefault(cpu, Counter()).update(kinds)

    def _add(self, cpu: int, span: bytes | memoryview) -> None:
        for _, ts_ns, kind in iter_records(span):
            self.by_cpu.setdefault(cpu, Counter())[kind] += 1
            if self.from_ns is None or ts_ns < self.from_ns:
                self.from_ns = ts_ns


def _span_at(fd: int, start: int) -> tuple[int, bytes]:
    """Return CPU and bytes of the span whose frame begins at `start`; no bytes of other frames."""
    _, kind, cpu, _, length = FRAME.unpack(os.pread(fd, FRAME.size, start))
    return cpu, os.pread(fd, length, start + FRAME.size) if kind == FRAME_SPAN else b""


def _mark(fd: int, at: int) -> None:
    """Set the bit that says `discarded` in a record's length."""
    word = struct.unpack("<I", os.pread(fd, 4, at))[0]
    os.pwrite(fd, struct.pack("<I", word | DISCARDED), at)
