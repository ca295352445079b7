"""What a trace.dat says of itself, whatever its version: the description `TraceDat`, and its sections.

Version 6 has the sections one after another (trace_dat_layout.py), version 7 finds them by offsets (trace_dat_v7.py).

Source: trace-cmd.dat.v6(5), trace-cmd.dat.v7(5)
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any

from kvmtrace.formats.common.compression import ALGORITHMS, Decompressor
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.table.format_text import (
    EventFormat,
    PageLayout,
    parse_event_format,
    parse_header_page,
    validate_header_event,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.formats.common.cursor import Cursor

META_MAGIC = b"KVMTRACE-META-1\n"  # ends the trailer of our recorder, see docs/capture-metadata.md
MAX_PAGE = 1 << 20

# option ids; also the section ids of version 7
(
    OPTION_DONE,
    OPTION_DATE,
    OPTION_CPUSTAT,
    OPTION_BUFFER,
    OPTION_TRACECLOCK,
    OPTION_UNAME,
    OPTION_HOOK,
    OPTION_OFFSET,
    OPTION_CPUCOUNT,
    OPTION_VERSION,
    OPTION_PROCMAPS,
    OPTION_TRACEID,
    OPTION_TIME_SHIFT,
    OPTION_GUEST,
    OPTION_TSC2NSEC,
) = range(15)
(
    SECTION_HEADER_INFO,
    SECTION_FTRACE_EVENTS,
    SECTION_EVENT_FORMATS,
    SECTION_KALLSYMS,
    SECTION_PRINTK,
    SECTION_CMDLINES,
    SECTION_BUFFER_TEXT,
) = range(16, 23)


@dataclass(frozen=True)
class CpuData:
    """The pages of one CPU: `size` bytes at file offset `offset` (as the file says: may lie outside it)."""

    cpu: int
    offset: int
    size: int


@dataclass(frozen=True)
class Buffer:
    """One ring buffer: the top one (name "") or a tracefs instance's.

    Parameters
    ----------
    name, clock : str
    page_size : int, bytes
    cpus : list of CpuData
    compressed : bool, pages are stored in compressed chunks
    """

    name: str
    clock: str
    page_size: int
    cpus: tuple[CpuData, ...]
    compressed: bool = False


@dataclass
class TraceDat:
    """All of a trace.dat but its pages.

    Parameters
    ----------
    path : str
    data : the whole file
    version : int, 6 or 7
    layout : PageLayout, of header_page
    formats : event formats of the file, ftrace's own first
    comms : tid -> comm, as the kernel had saved them
    buffers : ring buffers, the top one first
    text : the trace as text where the file holds that instead of pages (latency tracers)
    options : (id, data) of all options in file order
    clock : str, "" if not said
    n_cpus : int, CPUs of the traced machine
    decompressor : of compressed pages
    meta, meta_at, meta_broken : our recorder's metadata ({} if there are none), their offset, whether they are none
    """

    path: str
    data: memoryview
    version: int
    layout: PageLayout = field(default_factory=PageLayout)
    formats: list[EventFormat] = field(default_factory=list)
    comms: dict[int, str] = field(default_factory=dict)
    buffers: list[Buffer] = field(default_factory=list)
    text: bytes | None = None
    options: list[tuple[int, bytes]] = field(default_factory=list)
    clock: str = ""
    n_cpus: int = 0
    page_size: int = 4096
    decompressor: Decompressor | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    meta_at: int | None = None
    meta_broken: bool = False

    def option(self, number: int) -> bytes | None:
        """Return the data of the last option of this id."""
        found = [data for option, data in self.options if option == number]
        return found[-1] if found else None

    def option_text(self, number: int) -> str | None:
        """Return an option that is a string."""
        data = self.option(number)
        return None if data is None else data.split(b"\0")[0].decode("utf-8", "replace").strip()


def decode_text(part: memoryview) -> str:
    """Return a part of the file that is text, whatever it holds."""
    return bytes(part).decode("utf-8", "replace")


def read_header_info(cursor: Cursor, trace: TraceDat) -> None:
    """Read header_page and header_event."""
    cursor.expect(b"header_page\0", "the section")
    at = cursor.pos
    layout = parse_header_page(decode_text(cursor.take(cursor.number(8, "size of header_page"), "header_page")))
    if layout is None or layout.page_size > MAX_PAGE:
        cursor.pos = at
        raise cursor.fail("header_page with timestamp, commit and data", "another layout")
    trace.layout = layout
    cursor.expect(b"header_event\0", "the section")
    at = cursor.pos
    text = decode_text(cursor.take(cursor.number(8, "size of header_event"), "header_event"))
    wrong = validate_header_event(text)
    if wrong:
        cursor.pos = at
        raise cursor.fail("header_event with type_len 5 bits, time_delta 27 bits", wrong)


def read_ftrace_formats(cursor: Cursor, trace: TraceDat) -> None:
    """Read the formats of ftrace's own events."""
    _read_formats(cursor, trace, "ftrace", cursor.number(4, "count of ftrace events"))


def read_event_formats(cursor: Cursor, trace: TraceDat) -> None:
    """Read the formats of all systems."""
    for _ in range(cursor.number(4, "count of event systems")):
        system = cursor.string("system name")
        _read_formats(cursor, trace, system, cursor.number(4, f"count of {system} events"))


def _read_formats(cursor: Cursor, trace: TraceDat, system: str, count: int) -> None:
    """Read `count` formats; an untrusted count ends with the file, as each takes 8 bytes at least."""
    for _ in range(count):
        size = cursor.number(8, "size of a format")
        parsed = parse_event_format(decode_text(cursor.take(size, "event format")), system)
        if parsed is not None:
            trace.formats.append(parsed)


def skip_sized(cursor: Cursor, what: str) -> None:
    """Step over a part led by its size as u32 (kallsyms, printk formats: never needed, often large)."""
    cursor.take(cursor.number(4, f"size of {what}"), what)


def read_comms(cursor: Cursor, trace: TraceDat) -> None:
    """Read saved_cmdlines: lines of `tid comm`."""
    text = decode_text(cursor.take(cursor.number(8, "size of saved_cmdlines"), "saved_cmdlines"))
    for line in text.splitlines():
        tid, _, comm = line.partition(" ")
        if tid.isdigit() and len(tid) < 10:
            trace.comms[int(tid)] = comm


def current_clock(text: str) -> str:
    """Return the clock in brackets of a trace_clock file."""
    return text.partition("[")[2].partition("]")[0].strip()


SECTION_READERS: dict[int, Callable[[Cursor, TraceDat], None]] = {
    SECTION_HEADER_INFO: read_header_info,
    SECTION_FTRACE_EVENTS: read_ftrace_formats,
    SECTION_EVENT_FORMATS: read_event_formats,
    SECTION_CMDLINES: read_comms,
}


def choose_decompressor(name: str, cursor: Cursor) -> Decompressor | None:
    """Return the decompressor for algorithm `name`, None for "none"."""
    if name in ("none", ""):
        return None
    if name not in ALGORITHMS:
        raise cursor.fail(f"compression by {' or '.join(ALGORITHMS)}", repr(name[:32]))
    return Decompressor(name, cursor.path)
