"""Writing trace.dat, version 6: the version that every trace-cmd and KernelShark reads.

Version 7 adds compression and sections that may be written late; a recording needs neither, and trace-cmd
before 3.0 (Debian 11, Ubuntu 22.04) cannot read it.

Sources: trace-cmd.dat.v6(5); what the page leaves out (an empty TRACECLOCK option promises the clock's text
behind the table of CPUs) was compared with files written by trace-cmd 3.1.
"""

from __future__ import annotations

import json
import os
import struct
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.settings import META_MAGIC
from kvmtrace.capture.spool import PAGE_SIZE, Spool
from kvmtrace.kvm.tracepoints import PROBE_SYSTEM
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MAGIC = b"\x17\x08\x44tracing6\0" + b"\0" + b"\x08"  # little endian, 8-byte longs
OPTION_CPUSTAT, OPTION_TRACECLOCK, OPTION_UNAME, OPTION_VERSION = 2, 4, 5, 9
COPY_BYTES = 256 << 10


def _sized(text: bytes, size_format: str = "<Q") -> bytes:
    """Return text behind its length."""
    return struct.pack(size_format, len(text)) + text


def build_head(instance: Path, tracefs: Path, events: Iterable[tuple[str, str]], kallsyms: bytes = b"") -> bytes:
    """Return the header up to the printk formats: all that is known before the recording.

    Parameters
    ----------
    instance : Path of the tracing instance
    tracefs : Path
    events : (system, name) of the recorded events
    kallsyms : lines of /proc/kallsyms that a reader may need
    """
    kernel_events = instance / "events"
    parts = [MAGIC, struct.pack("<I", PAGE_SIZE)]
    for name in ("header_page", "header_event"):
        text = next(p for p in (tracefs / "events" / name, kernel_events / name) if p.exists()).read_bytes()
        parts.append(name.encode() + b"\0" + _sized(text))
    ftrace = sorted(path / "format" for path in (tracefs / "events" / "ftrace").iterdir() if path.is_dir())
    parts.append(struct.pack("<I", len(ftrace)))
    parts += [_sized(path.read_bytes()) for path in ftrace]
    systems: dict[str, list[bytes]] = {}
    for system, name in sorted(events):
        shown = PROBE_SYSTEM if system.startswith(PROBE_SYSTEM) else system
        systems.setdefault(shown, []).append((kernel_events / system / name / "format").read_bytes())
    parts.append(struct.pack("<I", len(systems)))
    for system, formats in systems.items():
        parts.append(system.encode() + b"\0" + struct.pack("<I", len(formats)))
        parts += [_sized(text) for text in formats]
    parts.append(_sized(kallsyms, "<I"))
    parts.append(_sized(_read_or_empty(tracefs / "printk_formats"), "<I"))
    return b"".join(parts)


def _read_or_empty(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@dataclass(frozen=True)
class Tail:
    """What the header says about the recording as a whole, known at its end.

    Parameters
    ----------
    comms : tid -> thread name
    cpu_stats : CPU -> text of its `stats` file
    clock : text of `trace_clock`, the current one in brackets
    version : who wrote the file
    """

    comms: dict[int, str]
    cpu_stats: dict[int, str]
    clock: str
    version: str

    def options(self) -> bytes:
        """Return the options section."""
        options = [(OPTION_CPUSTAT, f"CPU: {cpu}\n{text}") for cpu, text in sorted(self.cpu_stats.items())]
        uname = os.uname()
        options += [
            (OPTION_UNAME, f"{uname.sysname} {uname.nodename} {uname.release} {uname.machine}"),
            (OPTION_VERSION, self.version),
            (OPTION_TRACECLOCK, ""),
        ]
        texts = [(number, text.encode() + b"\0" if text else b"") for number, text in options]
        body = b"".join(struct.pack("<H", number) + _sized(text, "<I") for number, text in texts)
        return b"options  \0" + body + struct.pack("<H", 0)


def build_header(head: bytes, tail: Tail, sizes: dict[int, int]) -> tuple[bytes, dict[int, int]]:
    """Return the whole header and the file offset of each CPU's data.

    Parameters
    ----------
    head : from build_head
    tail : Tail
    sizes : CPU -> bytes of its pages; CPUs left out have none
    """
    lines = "".join(f"{tid} {comm}\n" for tid, comm in sorted(tail.comms.items()))
    n_cpus = max(sizes, default=0) + 1
    front = head + _sized(lines.encode("utf-8", "surrogateescape")) + struct.pack("<I", n_cpus)
    front += tail.options() + b"flyrecord\0"
    clock = _sized(tail.clock.encode())
    at = -(-(len(front) + 16 * n_cpus + len(clock)) // PAGE_SIZE) * PAGE_SIZE
    offsets = {}
    for cpu in range(n_cpus):
        offsets[cpu] = at
        front += struct.pack("<QQ", at, sizes.get(cpu, 0))
        at += sizes.get(cpu, 0)
    return front + clock, offsets


def move_pages(spool: Spool, name: str, out: int, offset: int, skip: int = 0) -> None:
    """Move a segment file but its first `skip` bytes to `offset` of `out`, from its end to its beginning.

    The source shrinks as the target grows: it takes no more room than the segments had, and after a kill
    the rest can be moved to the same place.
    """
    source = spool.open_old(name)
    try:
        left = os.fstat(source).st_size // PAGE_SIZE * PAGE_SIZE
        while left > skip:
            start = max(skip, (left - 1) // COPY_BYTES * COPY_BYTES)
            _copy(source, start, out, offset + start - skip, left - start)
            os.ftruncate(source, start)
            left = start
    finally:
        os.close(source)
    spool.unlink(name)


def _copy(source: int, start: int, out: int, at: int, size: int) -> None:
    while size:
        try:
            done = os.copy_file_range(source, out, size, start, at)
        except OSError:  # not on this file system
            done = os.pwrite(out, os.pread(source, size, start), at)
        if not done:
            raise OSError(5, "the spool is shorter than it was")
        start, at, size = start + done, at + done, size - done


def trailer(meta: dict[str, Any]) -> bytes:
    """Return the metadata trailer: JSON, its length, the magic."""
    text = json.dumps(meta, separators=(",", ":")).encode()
    return text + struct.pack("<Q", len(text)) + META_MAGIC
