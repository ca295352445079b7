"""What the kernel itself takes: the least that any recorder built on it can cost.

`bare_ftrace` is a tracing instance with the same events that nobody reads, `empty_programs` are BPF programs that
return at once. What a recorder costs above these is its own doing.
"""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.capture.bpf import bpf_syscall as sys
from kvmtrace.capture.bpf.event_programs import read_tracepoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TRACING = Path("/sys/kernel/tracing")
BUFFER_KB = 16384
RETURN_1 = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 1, 0x95, 0, 0, 0)  # r0 = 1; exit


@contextlib.contextmanager
def bare_ftrace(tracepoints: Iterable[tuple[str, str]]) -> Iterator[None]:
    """Record (system, name) tracepoints of every process into an instance that is thrown away."""
    instance = TRACING / "instances" / f"floor-{os.getpid()}"
    instance.mkdir()
    try:
        (instance / "trace_clock").write_text("mono")
        (instance / "buffer_size_kb").write_text(str(BUFFER_KB))
        for system, name in tracepoints:
            (instance / "events" / system / name / "enable").write_text("1")
        yield
    finally:
        instance.rmdir()


@contextlib.contextmanager
def empty_programs(tracepoints: Iterable[tuple[str, str]], *, raw: bool) -> Iterator[None]:
    """Run a BPF program that does nothing at (system, name) tracepoints, plain or raw ones."""
    opened = []
    try:
        for system, name in tracepoints:
            kind = sys.PROG_TYPE_RAW_TRACEPOINT if raw else sys.PROG_TYPE_TRACEPOINT
            program = sys.load_program(f"floor_{name}", kind, RETURN_1)
            opened.append(program)
            if raw:
                opened.append(sys.open_raw_tracepoint(name, program))
            else:
                event = read_tracepoint(TRACING, system, name)
                assert event is not None
                opened.append(sys.perf_event_open(sys.PERF_TYPE_TRACEPOINT, event.tracepoint_id))
                sys.hang_program(opened[-1], program)
        yield
    finally:
        for fd in reversed(opened):
            os.close(fd)
