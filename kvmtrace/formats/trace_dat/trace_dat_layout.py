"""trace.dat, versions 6 and 7: where things lie in the file.

Everything but the ring-buffer pages is read here; ring_buffer.py decodes those. Both versions end in the same
description, `TraceDat`.

Source: trace-cmd.dat.v6(5), trace-cmd.dat.v7(5)
"""

from __future__ import annotations

import json

from kvmtrace.formats.common.cursor import Cursor, describe_bytes
from kvmtrace.formats.common.metadata import clean_meta
from kvmtrace.formats.trace_dat import MAGIC
from kvmtrace.formats.trace_dat.trace_dat_sections import (
    MAX_PAGE,
    META_MAGIC,
    OPTION_BUFFER,
    OPTION_CPUCOUNT,
    OPTION_DONE,
    OPTION_TRACECLOCK,
    Buffer,
    CpuData,
    TraceDat,
    current_clock,
    decode_text,
    read_comms,
    read_event_formats,
    read_ftrace_formats,
    read_header_info,
    skip_sized,
)


def read_trace_dat(data: memoryview, path: str) -> TraceDat:
    """Read the headers of a trace.dat.

    Parameters
    ----------
    data : memoryview of bytes, the whole file
    path : str, for messages

    Raises
    ------
    FormatError
        The file is no trace.dat, or is damaged before its first event.
    """
    cursor = Cursor(data, path)
    cursor.expect(MAGIC, "the magic of a trace.dat,")
    at = cursor.pos
    version = cursor.string("version", 16)
    if version not in ("6", "7"):
        cursor.pos = at
        raise cursor.fail("trace.dat version 6 or 7", f"version {version[:16]!r}")
    trace = TraceDat(path, data, int(version))
    if cursor.number(1, "byte order") != 0:
        cursor.pos -= 1
        raise cursor.fail("a little-endian trace (byte 0)")
    cursor.number(1, "size of a long")
    trace.page_size = _page_size(cursor)
    if trace.version == 6:
        _read_v6(cursor, trace)
    else:
        from kvmtrace.formats.trace_dat.trace_dat_v7 import read_v7

        read_v7(cursor, trace)
    _read_trailer(trace)
    return trace


def _page_size(cursor: Cursor) -> int:
    size = cursor.number(4, "page size")
    if not 64 <= size <= MAX_PAGE or size % 4:
        cursor.pos -= 4
        raise cursor.fail("a page size", str(size))
    return size


def _read_v6(cursor: Cursor, trace: TraceDat) -> None:
    read_header_info(cursor, trace)
    read_ftrace_formats(cursor, trace)
    read_event_formats(cursor, trace)
    skip_sized(cursor, "kallsyms")
    skip_sized(cursor, "printk formats")
    read_comms(cursor, trace)
    trace.n_cpus = n_cpus = cursor.number(4, "count of CPUs")
    kind = bytes(cursor.take(10, "options, latency or flyrecord"))
    if kind.startswith(b"options"):
        _read_v6_options(cursor, trace)
        kind = bytes(cursor.take(10, "latency or flyrecord"))
    if kind.startswith(b"latency"):
        trace.text = bytes(cursor.take(cursor.left, "text"))
        return
    if not kind.startswith(b"flyrecord"):
        cursor.pos -= 10
        raise cursor.fail("options, latency or flyrecord", describe_bytes(kind))
    top = _read_v6_buffer(cursor, trace, "")
    if n_cpus < trace.n_cpus:
        cursor.take(16, "empty CPU entry")  # left for readers that do not know the option CPUCOUNT
    _read_v6_clock(cursor, trace)
    trace.buffers.append(top)
    _read_v6_instances(trace)


def _read_v6_options(cursor: Cursor, trace: TraceDat) -> None:
    while (number := cursor.number(2, "option id")) != OPTION_DONE:
        data = bytes(cursor.take(cursor.number(4, "option size"), "option"))
        trace.options.append((number, data))
        if number == OPTION_CPUCOUNT and len(data) >= 4:
            trace.n_cpus = int.from_bytes(data[:4], "little")


def _read_v6_buffer(cursor: Cursor, trace: TraceDat, name: str) -> Buffer:
    """Read the table of CPUs: 16 bytes each, so an untrusted count ends at the end of the file."""
    if trace.n_cpus * 16 > cursor.left:
        raise cursor.fail(f"a table of {trace.n_cpus} CPUs", f"only {cursor.left} bytes to the end")
    cpus = tuple(
        CpuData(cpu, cursor.number(8, "offset of a CPU"), cursor.number(8, "size of a CPU"))
        for cpu in range(trace.n_cpus)
    )
    return Buffer(name, "", trace.layout.page_size, cpus)


def _read_v6_clock(cursor: Cursor, trace: TraceDat) -> None:
    """Read the trace_clock file that stands behind the CPU table if there is a TRACECLOCK option."""
    if trace.option(OPTION_TRACECLOCK) is None:
        return
    trace.clock = current_clock(trace.option_text(OPTION_TRACECLOCK) or "")
    size = cursor.number(8, "size of trace_clock")
    if size <= min(cursor.left, 4096):
        trace.clock = current_clock(decode_text(cursor.take(size, "trace_clock"))) or trace.clock


def _read_v6_instances(trace: TraceDat) -> None:
    for number, data in trace.options:
        if number != OPTION_BUFFER or len(data) < 9:
            continue
        name = data[8:].split(b"\0")[0].decode("utf-8", "replace")
        cursor = Cursor(trace.data, trace.path, int.from_bytes(data[:8], "little"))
        cursor.expect(b"flyrecord\0", f"the pages of instance {name[:64]!r},")
        trace.buffers.append(_read_v6_buffer(cursor, trace, name))


def _read_trailer(trace: TraceDat) -> None:
    """Read our recorder's metadata from the end of the file, if they are there."""
    data, tail = trace.data, 8 + len(META_MAGIC)
    if len(data) < tail or bytes(data[-len(META_MAGIC) :]) != META_MAGIC:
        return
    size = int.from_bytes(data[-tail : -len(META_MAGIC)], "little")
    if size > len(data) - tail:
        return
    trace.meta_at = len(data) - tail - size
    try:
        meta = json.loads(bytes(data[trace.meta_at : -tail]))
    except (ValueError, RecursionError):
        meta = None
    trace.meta_broken = not isinstance(meta, dict)
    trace.meta = clean_meta(meta)
