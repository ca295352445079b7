"""perf.data in file mode: header, event attributes, features and tracepoint formats.

Source: tools/perf/Documentation/perf.data-file-format.txt; tools/perf/util/header.c;
include/uapi/linux/perf_event.h, struct perf_event_attr
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

from kvmtrace.formats.common.cursor import Cursor
from kvmtrace.formats.perf_data import MAGIC
from kvmtrace.formats.trace_dat import MAGIC as TRACING_MAGIC
from kvmtrace.formats.trace_dat.trace_dat_sections import (
    TraceDat,
    read_comms,
    read_event_formats,
    read_ftrace_formats,
    read_header_info,
    skip_sized,
)
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from kvmtrace.table.format_text import EventFormat

PIPE_HEADER_SIZE = 16  # of a file that `perf record -o -` wrote

# feature bits of the header
(FEAT_TRACING_DATA, FEAT_HOSTNAME, FEAT_OSRELEASE, FEAT_NRCPUS, FEAT_CPUDESC, FEAT_CMDLINE, FEAT_COMPRESSED) = (
    1,
    3,
    4,
    7,
    8,
    11,
    27,
)
# perf_event_attr.sample_type; the order of these is the order in a sample, but for IDENTIFIER, which leads
(
    SAMPLE_IP,
    SAMPLE_TID,
    SAMPLE_TIME,
    SAMPLE_ADDR,
    SAMPLE_READ,
    SAMPLE_CALLCHAIN,
    SAMPLE_ID,
    SAMPLE_CPU,
    SAMPLE_PERIOD,
    SAMPLE_STREAM_ID,
    SAMPLE_RAW,
) = (1 << bit for bit in range(11))
SAMPLE_IDENTIFIER = 1 << 16
# perf_event_attr.read_format
READ_GROUP = 8

ATTR_SAMPLE_ID_ALL, ATTR_USE_CLOCKID = 1 << 18, 1 << 25
CLOCK_IDS = {0: "realtime", 1: "mono", 4: "mono_raw", 7: "boot", 11: "tai"}
TYPE_TRACEPOINT = 2


@dataclass(frozen=True)
class Attr:
    """One event of the recording.

    Parameters
    ----------
    type_, config : int, PERF_TYPE_* and, for tracepoints, the event id of its format
    sample_type, read_format, flags : int, see perf_event_open(2)
    clock : str, "perf" unless another was asked for
    ids : the kernel's numbers of its per-CPU instances
    """

    type_: int
    config: int
    sample_type: int
    read_format: int
    flags: int
    clock: str
    ids: tuple[int, ...]


@dataclass
class PerfData:
    """All of a perf.data but its records.

    Parameters
    ----------
    data_offset, data_size : int, where the records are, as the header says
    features : feature bit -> (offset, size)
    """

    path: str
    data: memoryview
    data_offset: int
    data_size: int
    attrs: list[Attr] = field(default_factory=list)
    features: dict[int, tuple[int, int]] = field(default_factory=dict)
    formats: list[EventFormat] = field(default_factory=list)
    comms: dict[int, str] = field(default_factory=dict)

    def feature_text(self, bit: int) -> str | None:
        """Return a feature that is one string."""
        if bit not in self.features:
            return None
        offset, size = self.features[bit]
        if size < 4 or offset + size > len(self.data):
            return None
        length = int.from_bytes(self.data[offset : offset + 4], "little")
        text = bytes(self.data[offset + 4 : offset + 4 + min(length, size - 4)])
        return text.split(b"\0")[0].decode("utf-8", "replace") or None

    def feature_number(self, bit: int) -> int | None:
        """Return a feature that begins with a u32."""
        if bit not in self.features or self.features[bit][0] + 4 > len(self.data):
            return None
        offset = self.features[bit][0]
        return int.from_bytes(self.data[offset : offset + 4], "little")


def read_perf_data(data: memoryview, path: str) -> PerfData:
    """Read the headers of a perf.data.

    Raises
    ------
    FormatError
        It is none, is of another byte order or written to a pipe, or lacks the formats of its tracepoints.
    """
    cursor = Cursor(data, path)
    cursor.expect(MAGIC, "the magic of a little-endian perf.data,")
    size = cursor.number(8, "header size")
    if size == PIPE_HEADER_SIZE:
        raise cursor.fail("perf.data written to a file", "one written to a pipe (use perf record -o FILE)")
    attr_size = cursor.number(8, "attribute size")
    attrs_at, attrs_size = cursor.number(8, "offset of attributes"), cursor.number(8, "size of attributes")
    perf = PerfData(path, data, cursor.number(8, "offset of data"), cursor.number(8, "size of data"))
    cursor.take(16, "event types")
    bits = int.from_bytes(cursor.take(32, "feature bits"), "little")
    _read_attrs(Cursor(data, path, attrs_at), perf, attr_size, attrs_size)
    _read_features(perf, bits)
    _read_formats(perf)
    return perf


def _read_attrs(cursor: Cursor, perf: PerfData, attr_size: int, total: int) -> None:
    """Read the attributes; each takes 64 bytes at least, so their number ends with the file."""
    if not 64 + 16 <= attr_size <= 4096:
        raise cursor.fail("event attributes of 80 to 4096 bytes", f"{attr_size} bytes each")
    if total > cursor.left:
        raise cursor.fail(f"{total} bytes of event attributes", f"only {max(cursor.left, 0)} bytes to the end")
    n_ids = 0
    for _ in range(total // attr_size):
        part = bytes(cursor.take(attr_size, "event attribute"))
        numbers = [int.from_bytes(part[i : i + 8], "little") for i in range(0, len(part) - 7, 8)]
        flags = numbers[5]
        clock_id = int.from_bytes(part[88:92], "little") if attr_size >= 92 + 16 else 0
        clock = CLOCK_IDS.get(clock_id, f"clock {clock_id}") if flags & ATTR_USE_CLOCKID else "perf"
        ids = _read_ids(perf, *numbers[-2:])
        n_ids += len(ids)
        if n_ids > len(perf.data) // 8:
            raise cursor.fail("event ids of each attribute's own", "ids that overlap")
        perf.attrs.append(Attr(numbers[0] & 0xFFFFFFFF, numbers[1], numbers[3], numbers[4], flags, clock, ids))
    if not perf.attrs:
        raise cursor.fail("an event attribute", "none")


def _read_ids(perf: PerfData, offset: int, size: int) -> tuple[int, ...]:
    if offset + size > len(perf.data):
        raise Cursor(perf.data, perf.path, min(offset, len(perf.data))).fail(
            f"{size} bytes of event ids", "the end of the file"
        )
    return tuple(memoryview(bytes(perf.data[offset : offset + size // 8 * 8])).cast("Q"))


def _read_features(perf: PerfData, bits: int) -> None:
    """Read where the features are: a table behind the data, one entry for each bit."""
    cursor = Cursor(perf.data, perf.path, min(perf.data_offset + perf.data_size, len(perf.data)))
    for bit in range(256):
        if bits >> bit & 1:
            if cursor.left < 16:
                return
            perf.features[bit] = (cursor.number(8, "feature offset"), cursor.number(8, "feature size"))


def _read_formats(perf: PerfData) -> None:
    """Read the tracepoint formats, which are the beginning of a trace.dat."""
    if FEAT_TRACING_DATA not in perf.features:
        at = Cursor(perf.data, perf.path, len(perf.data))
        raise at.fail("the formats of tracepoints", "none (no tracepoint recorded, or perf did not end properly)")
    offset, size = perf.features[FEAT_TRACING_DATA]
    end = min(offset + size, len(perf.data))
    cursor = Cursor(perf.data[:end], perf.path, min(offset, end))
    cursor.expect(TRACING_MAGIC, "the magic of tracing data,")
    version = cursor.string("version", 16)
    if cursor.number(1, "byte order") != 0:
        raise cursor.fail("little-endian tracing data")
    cursor.number(1, "size of a long")
    trace = TraceDat(perf.path, perf.data, 6, page_size=cursor.number(4, "page size"))
    read_header_info(cursor, trace)
    read_ftrace_formats(cursor, trace)
    read_event_formats(cursor, trace)
    skip_sized(cursor, "kallsyms")
    skip_sized(cursor, "printk formats")
    if version not in ("0.5", "0.4") and cursor.left >= 8:
        read_comms(cursor, trace)
    perf.formats, perf.comms = trace.formats, trace.comms
