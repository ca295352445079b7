"""trace.dat version 7: sections, found through chained sections of options.

Source: trace-cmd.dat.v7(5)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.formats.common.cursor import Cursor
from kvmtrace.formats.trace_dat.trace_dat_sections import (
    OPTION_BUFFER,
    OPTION_CPUCOUNT,
    OPTION_DONE,
    OPTION_TRACECLOCK,
    SECTION_BUFFER_TEXT,
    SECTION_HEADER_INFO,
    SECTION_READERS,
    Buffer,
    CpuData,
    TraceDat,
    choose_decompressor,
    current_clock,
)

if TYPE_CHECKING:
    from kvmtrace.formats.common.compression import Decompressor

SECTION_COMPRESSED = 1
MAX_OPTION_SECTIONS = 1000
MAX_OPTIONS = 100_000  # in all sections, which may overlap in a damaged file


def read_v7(cursor: Cursor, trace: TraceDat) -> None:
    """Read what follows the page size of a version 7 file into `trace`."""
    at = cursor.pos
    name = cursor.string("compression algorithm", 64)
    cursor.string("compression version", 64)
    decompressor = choose_decompressor(name, Cursor(cursor.data, cursor.path, at))
    trace.decompressor = decompressor
    options = cursor.number(8, "offset of the options")
    seen: set[int] = set()
    while options and options not in seen and len(seen) < MAX_OPTION_SECTIONS:
        seen.add(options)
        options = _read_options(cursor.data, options, trace, decompressor)
    _read_sections(trace, decompressor)
    _read_buffers(trace, decompressor)


def _section(
    data: memoryview, offset: int, path: str, number: int | None, decompressor: Decompressor | None
) -> tuple[Cursor, bool]:
    """Return a cursor into the section at `offset`, decompressed, and whether its pages are compressed.

    `number` is the section id that must stand there; None leaves pages and text, compressed in chunks, alone.
    """
    header = Cursor(data, path, offset)
    if offset > len(data) - 16:
        header.pos = min(offset, len(data))
        raise header.fail(f"a section at {offset:#x}", f"the end of the file at {len(data):#x}")
    found, flags = header.number(2, "section id"), header.number(2, "section flags")
    header.number(4, "section name")
    size = header.number(8, "section size")
    compressed = bool(flags & SECTION_COMPRESSED)
    if number is None:
        return header, compressed
    if found != number:
        header.pos = offset
        raise header.fail(f"section {number}", f"section {found}")
    if not compressed:
        end = min(header.pos + size, len(data))
        return Cursor(data[:end], path, header.pos), False
    if decompressor is None:
        raise header.fail("an uncompressed section", "a compressed one, and no algorithm named")
    packed, unpacked = header.number(4, "compressed size"), header.number(4, "uncompressed size")
    at = header.pos
    content = decompressor.decompress_kept(header.take(packed, "compressed section"), unpacked, at)
    return Cursor(memoryview(content), path, 0, at), False


def _read_options(data: memoryview, offset: int, trace: TraceDat, decompressor: Decompressor | None) -> int:
    """Read one section of options; return the offset of the next one, 0 if it is the last."""
    cursor, _ = _section(data, offset, trace.path, OPTION_DONE, decompressor)
    while True:
        number = cursor.number(2, "option id")
        content = bytes(cursor.take(cursor.number(4, "option size"), "option"))
        if number == OPTION_DONE:
            return int.from_bytes(content[:8], "little")
        if len(trace.options) >= MAX_OPTIONS:
            raise cursor.fail(f"at most {MAX_OPTIONS:,} options", "more of them")
        trace.options.append((number, content))


def _read_sections(trace: TraceDat, decompressor: Decompressor | None) -> None:
    for number, reader in SECTION_READERS.items():
        content = trace.option(number)
        if content is None or len(content) < 8:
            if number == SECTION_HEADER_INFO:
                raise Cursor(trace.data, trace.path).fail("a section of header_page", "none")
            continue
        offset = int.from_bytes(content[:8], "little")
        cursor, _ = _section(trace.data, offset, trace.path, number, decompressor)
        reader(cursor, trace)


def _read_buffers(trace: TraceDat, decompressor: Decompressor | None) -> None:
    trace.clock = current_clock(trace.option_text(OPTION_TRACECLOCK) or "")
    count = trace.option(OPTION_CPUCOUNT)
    trace.n_cpus = int.from_bytes(count[:4], "little") if count else 0
    for number, content in trace.options:
        if number == OPTION_BUFFER:
            trace.buffers.append(_read_buffer(trace, content))
        elif number == SECTION_BUFFER_TEXT and trace.text is None:
            trace.text = _read_text(trace, content, decompressor)
    trace.buffers.sort(key=lambda buffer: buffer.name != "")
    trace.clock = trace.clock or (trace.buffers[0].clock if trace.buffers else "")


def _read_buffer(trace: TraceDat, content: bytes) -> Buffer:
    option = Cursor(memoryview(content), trace.path)
    offset = option.number(8, "offset of the pages")
    name, clock = option.string("instance name"), option.string("trace clock")
    page_size, count = option.number(4, "page size of a buffer"), option.number(4, "count of CPUs")
    if count * 20 > option.left:
        raise option.fail(f"a table of {count} CPUs", f"{option.left} bytes")
    cpus = tuple(
        CpuData(option.number(4, "cpu"), option.number(8, "offset"), option.number(8, "size")) for _ in range(count)
    )
    compressed = False
    if count:
        _, compressed = _section(trace.data, offset, trace.path, None, None)
    if compressed and trace.decompressor is None:
        at = Cursor(trace.data, trace.path, offset)
        raise at.fail("uncompressed pages", "compressed ones, and no algorithm named")
    return Buffer(name, clock, page_size, cpus, compressed)


def _read_text(trace: TraceDat, content: bytes, decompressor: Decompressor | None) -> bytes:
    offset = int.from_bytes(content[:8], "little")
    cursor, compressed = _section(trace.data, offset, trace.path, None, None)
    if not compressed:
        return bytes(cursor.take(cursor.left, "text"))
    if decompressor is None:
        raise cursor.fail("uncompressed text", "compressed text, and no algorithm named")
    parts = []
    for _ in range(cursor.number(4, "count of chunks")):
        packed, size = cursor.number(4, "compressed size"), cursor.number(4, "uncompressed size")
        at = cursor.pos
        parts.append(decompressor.decompress_kept(cursor.take(packed, "compressed chunk"), size, at))
    return b"".join(parts)
