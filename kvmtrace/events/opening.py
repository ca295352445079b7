"""Files -> recordings, recognised by content and never by name."""

from __future__ import annotations

import mmap
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.decode.cursor import describe_bytes
from kvmtrace.errors import FormatError, UsageError

if TYPE_CHECKING:
    from kvmtrace.events.recording import Recording

SUPPORTED = "trace.dat, perf.data, ftrace text, a kvmtrace recording, Parquet or Arrow"


# files up to this size are read: a mapped file that somebody truncates meanwhile kills the process (SIGBUS)
READ_LIMIT = 64 << 20


def open_recording(path: str | Path) -> Recording:
    """Open a recording of any supported format.

    Parameters
    ----------
    path : str or Path; "-" is standard input

    Raises
    ------
    FormatError
        It is no trace, or is damaged before its first event.
    UsageError
        There is no such file, or it may not be read.
    """
    data = _read(str(path))
    return recognise(data, str(path))


def _read(path: str) -> memoryview:
    """Return the bytes of a file: mapped if it is large, read if it is small or a pipe."""
    if path == "-":
        return memoryview(sys.stdin.buffer.read())
    try:
        with Path(path).open("rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return memoryview(file.read())
            if os.fstat(file.fileno()).st_size <= READ_LIMIT:
                return memoryview(file.read())
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error


def recognise(data: memoryview, path: str) -> Recording:
    """Return the recording that `data` is; `path` is for messages. Raises FormatError if it is none."""
    from kvmtrace.decode.bpf_capture import is_bpf_capture, read_bpf_capture
    from kvmtrace.decode.perf_data import is_perf_data, read_perf_data
    from kvmtrace.decode.trace_dat import is_trace_dat, read_trace_dat
    from kvmtrace.events.ftrace_text import TextRecording, looks_like_text, open_text

    head = bytes(data[:4096])
    if is_trace_dat(head):
        from kvmtrace.events.trace_dat import TraceDatRecording

        trace = read_trace_dat(data, path)
        if trace.text is not None and not trace.buffers:  # of a latency tracer
            return TextRecording(memoryview(trace.text), path, "trace.dat")
        return TraceDatRecording(trace)
    if is_bpf_capture(head):
        from kvmtrace.events.bpf_capture import BpfRecording

        return BpfRecording(read_bpf_capture(data, path))
    if is_perf_data(head):
        from kvmtrace.events.perf_data import PerfDataRecording

        return PerfDataRecording(read_perf_data(data, path))
    if head.startswith((b"PAR1", b"ARROW1")):
        from kvmtrace.events.arrow_reading import ArrowRecording

        return ArrowRecording(data, path)
    if looks_like_text(bytes(data[:65536])):
        return open_text(data, path)
    raise FormatError(path, 0, SUPPORTED, "an empty file" if not head else describe_bytes(head[:17]))
