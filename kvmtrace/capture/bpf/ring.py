"""The kernel's ring buffers, mapped: spans of raw bytes go from their pages to the file in one copy.

One ring per CPU. A record is 8 bytes of length (bit 31: being written, bit 30: discarded) and the data, rounded up
to 8. Positions only grow; the data pages are mapped twice in a row, so that a span never wraps.
Source: kernel/bpf/ringbuf.c
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import TYPE_CHECKING

from kvmtrace.capture.bpf.bpf_syscall import (
    BPF_F_MMAPABLE,
    MAP_TYPE_ARRAY,
    MAP_TYPE_ARRAY_OF_MAPS,
    MAP_TYPE_RINGBUF,
    BpfMap,
    create_map,
)

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = mmap.PAGESIZE
WAKE_SHARE = 256  # a quarter of the ring, at 64 bytes a record
MIN_BYTES = PAGE
# struct cpu_state of tracers/record.h: lost, filtered, recorded, hardirqs, softirqs, running, padding
CPU_STATE = struct.Struct("<8Q")
RUNNING_AT = 40


def round_ring_size(n_bytes: int) -> int:
    """Return the size a ring can have: a power of two of at least a page."""
    size = MIN_BYTES
    while size < n_bytes:
        size *= 2
    return size


class Ring:
    """One CPU's ring buffer.

    Parameters
    ----------
    cpu : int
    size : int, bytes, a power of two of at least a page
    """

    def __init__(self, cpu: int, size: int) -> None:
        self.cpu = cpu
        self.size = size
        self.map = create_map(f"kvmtrace_{cpu}", MAP_TYPE_RINGBUF, 0, 0, size)
        self._consumer = mmap.mmap(self.map.fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._pages = mmap.mmap(self.map.fd, PAGE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=PAGE)
        self._view = memoryview(self._pages)
        self._produced = self._view[:8].cast("Q")
        self._consumed_view = memoryview(self._consumer)
        self._consumed = self._consumed_view[:8].cast("Q")
        self.position = 0

    def produced(self) -> int:
        """Return the position behind the last record reserved; it may still be written to."""
        return self._produced[0]

    def span(self, end: int) -> memoryview:
        """Return the bytes from our position to `end`, in place."""
        start = PAGE + (self.position & self.size - 1)
        return self._view[start : start + end - self.position]

    def consume(self, end: int) -> None:
        """Give everything before `end` back to the kernel."""
        self.position = end
        self._consumed[0] = end

    def close(self) -> None:
        """Unmap and give the ring back."""
        for view in (self._produced, self._view, self._consumed, self._consumed_view):
            view.release()
        self._pages.close()
        self._consumer.close()
        self.map.close()


class Rings:
    """The rings of all CPUs and the maps that programs find them and their counters in.

    Parameters
    ----------
    size : int, bytes per CPU
    n_kinds : int, of events: there is a loss counter for each kind and CPU
    """

    def __init__(self, size: int, n_kinds: int) -> None:
        self.n_cpus = os.sysconf("SC_NPROCESSORS_CONF")
        self.n_kinds = n_kinds
        self.wake_every = max(16, size // WAKE_SHARE)  # records; a power of two, as the size is
        self.rings = [Ring(cpu, size) for cpu in range(self.n_cpus)]
        self.by_cpu = create_map(
            "kvmtrace_rings", MAP_TYPE_ARRAY_OF_MAPS, 4, 4, self.n_cpus, inner_fd=self.rings[0].map.fd
        )
        for ring in self.rings:
            self.by_cpu.update(struct.pack("<I", ring.cpu), struct.pack("<I", ring.map.fd))
        self.cpu_state = create_map(
            "kvmtrace_cpus", MAP_TYPE_ARRAY, 4, CPU_STATE.size, self.n_cpus, flags=BPF_F_MMAPABLE
        )
        self._states = mmap.mmap(self.cpu_state.fd, CPU_STATE.size * self.n_cpus)
        self.lost = create_map("kvmtrace_lost", MAP_TYPE_ARRAY, 4, 8, self.n_cpus * n_kinds)

    def drain(self, ends: list[int], write: Callable[[int, int, memoryview], None]) -> int:
        """Hand each ring's bytes up to `ends` to write(cpu, position, bytes); return how many bytes."""
        moved = 0
        for ring, end in zip(self.rings, ends, strict=True):
            if end > ring.position:
                with ring.span(end) as span:
                    write(ring.cpu, ring.position, span)
                moved += end - ring.position
                ring.consume(end)
        return moved

    def produced(self) -> list[int]:
        """Return the positions behind what each ring holds."""
        return [ring.produced() for ring in self.rings]

    def switch(self, *, on: bool) -> None:
        """Let all programs record, or stop them all within microseconds."""
        for cpu in range(self.n_cpus):
            struct.pack_into("<Q", self._states, CPU_STATE.size * cpu + RUNNING_AT, int(on))

    def counters(self) -> dict[str, int]:
        """Return recorded, lost and filtered events, all CPUs together."""
        rows = [CPU_STATE.unpack_from(self._states, CPU_STATE.size * cpu) for cpu in range(self.n_cpus)]
        return {
            "lost": sum(r[0] for r in rows),
            "filtered": sum(r[1] for r in rows),
            "recorded": sum(r[2] for r in rows),
        }

    def lost_by_cpu(self) -> dict[int, dict[int, int]]:
        """Return CPU -> kind -> events lost, zeros left out."""
        lost: dict[int, dict[int, int]] = {}
        for cpu in range(self.n_cpus):
            for kind in range(self.n_kinds):
                value = self.lost.lookup(struct.pack("<I", cpu * self.n_kinds + kind)) or bytes(8)
                count = struct.unpack("<Q", value)[0]
                if count:
                    lost.setdefault(cpu, {})[kind] = count
        return lost

    def maps(self) -> dict[str, BpfMap]:
        """Return macro -> map for the programs."""
        return {"MAP_RINGS": self.by_cpu, "MAP_CPUS": self.cpu_state, "MAP_LOST": self.lost}

    def close(self) -> None:
        """Give everything back."""
        self._states.close()
        for ring in self.rings:
            ring.close()
        for table in (self.by_cpu, self.cpu_state, self.lost):
            table.close()
