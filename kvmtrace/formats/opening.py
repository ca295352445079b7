"""Files -> recordings, recognised by content and never by name."""

from __future__ import annotations

import mmap
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.errors import FormatError, UsageError
from kvmtrace.formats.common.cursor import describe_bytes

if TYPE_CHECKING:
    from kvmtrace.table.recording import Recording

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
    head = bytes(data[:4096])
    for opens in (_open_columns, _open_trace_dat, _open_bpf_capture, _open_perf_data, _open_text):
        recording = opens(head, data, path)
        if recording is not None:
            return recording
    raise FormatError(path, 0, SUPPORTED, "an empty file" if not head else describe_bytes(head[:17]))


# each imports what its own format needs: reading a trace.dat loads no text patterns


def _open_trace_dat(head: bytes, data: memoryview, path: str) -> Recording | None:
    from kvmtrace.formats.trace_dat.trace_dat_layout import is_trace_dat, read_trace_dat

    if not is_trace_dat(head):
        return None
    trace = read_trace_dat(data, path)
    if trace.text is not None and not trace.buffers:  # of a latency tracer
        from kvmtrace.formats.ftrace_text.text_recording import TextRecording

        return TextRecording(memoryview(trace.text), path, "trace.dat")
    from kvmtrace.formats.trace_dat.trace_dat_recording import TraceDatRecording

    return TraceDatRecording(trace)


def _open_bpf_capture(head: bytes, data: memoryview, path: str) -> Recording | None:
    from kvmtrace.formats.bpf.bpf_layout import is_bpf_capture, read_bpf_capture

    if not is_bpf_capture(head):
        return None
    from kvmtrace.formats.bpf.bpf_recording import BpfRecording

    return BpfRecording(read_bpf_capture(data, path))


def _open_perf_data(head: bytes, data: memoryview, path: str) -> Recording | None:
    from kvmtrace.formats.perf_data.perf_layout import is_perf_data, read_perf_data

    if not is_perf_data(head):
        return None
    from kvmtrace.formats.perf_data.perf_recording import PerfDataRecording

    return PerfDataRecording(read_perf_data(data, path))


def _open_columns(head: bytes, data: memoryview, path: str) -> Recording | None:
    if not head.startswith((b"PAR1", b"ARROW1")):
        return None
    from kvmtrace.formats.arrow.arrow_reading import ArrowRecording

    return ArrowRecording(data, path)


def _open_text(head: bytes, data: memoryview, path: str) -> Recording | None:
    del head
    from kvmtrace.formats.ftrace_text.text_recording import looks_like_text, open_text

    return open_text(data, path) if looks_like_text(bytes(data[:65536])) else None
