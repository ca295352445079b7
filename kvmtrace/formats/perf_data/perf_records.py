"""perf.data's records: their types, and where the parts of a sample lie.

Source: include/uapi/linux/perf_event.h, enum perf_event_type, PERF_RECORD_SAMPLE
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.formats.perf_data.perf_layout import (
    READ_GROUP,
    SAMPLE_ADDR,
    SAMPLE_CALLCHAIN,
    SAMPLE_CPU,
    SAMPLE_ID,
    SAMPLE_IDENTIFIER,
    SAMPLE_IP,
    SAMPLE_PERIOD,
    SAMPLE_RAW,
    SAMPLE_READ,
    SAMPLE_STREAM_ID,
    SAMPLE_TID,
    SAMPLE_TIME,
)
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from kvmtrace.formats.perf_data.perf_layout import Attr

RECORD_LOST, RECORD_COMM, RECORD_FORK, RECORD_SAMPLE, RECORD_LOST_SAMPLES = 2, 3, 7, 9, 13
RECORD_FINISHED_ROUND, RECORD_COMPRESSED = 68, 81


@dataclass(frozen=True)
class SampleLayout:
    """Where the parts of a sample lie, in u64 words from its header; -1 if absent.

    Parameters
    ----------
    raw : of the u32 size of the raw data, counted without the call chain
    chain : of the call chain's length, which stands before the raw data
    """

    tid: int
    time: int
    cpu: int
    raw: int
    chain: int


def sample_layout(attr: Attr) -> SampleLayout | None:
    """Return the layout of an event's samples, None if it holds no raw data or values of a group (variable)."""
    kind = attr.sample_type
    at, places = 1, {}
    order = (
        SAMPLE_IDENTIFIER,
        SAMPLE_IP,
        SAMPLE_TID,
        SAMPLE_TIME,
        SAMPLE_ADDR,
        SAMPLE_ID,
        SAMPLE_STREAM_ID,
        SAMPLE_CPU,
        SAMPLE_PERIOD,
    )
    for bit in order:
        places[bit] = at if kind & bit else -1
        at += bool(kind & bit)
    if kind & SAMPLE_READ:
        if attr.read_format & READ_GROUP:
            return None
        at += 1 + (attr.read_format & ~READ_GROUP & 0x1F).bit_count()
    chain = at if kind & SAMPLE_CALLCHAIN else -1
    at += bool(kind & SAMPLE_CALLCHAIN)
    if not kind & SAMPLE_RAW or not kind & SAMPLE_TIME:
        return None
    return SampleLayout(places[SAMPLE_TID], places[SAMPLE_TIME], places[SAMPLE_CPU], at, chain)


def sample_id_places(attr: Attr) -> tuple[int, int]:
    """Return (time, cpu): where they stand in records that are no samples, in words from the record's end; 0: absent.

    Source: struct sample_id of perf_event_open(2)
    """
    order = (SAMPLE_IDENTIFIER, SAMPLE_CPU, SAMPLE_STREAM_ID, SAMPLE_ID, SAMPLE_TIME)
    back, places = 0, {}
    for bit in order:
        back += bool(attr.sample_type & bit)
        places[bit] = back if attr.sample_type & bit else 0
    return places[SAMPLE_TIME], places[SAMPLE_CPU]
