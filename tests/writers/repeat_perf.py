"""Make a large perf.data of a small real one: its samples again and again, each time later."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.formats.perf_data.perf_layout import TYPE_TRACEPOINT, read_perf_data
from kvmtrace.formats.perf_data.perf_records import RECORD_FINISHED_ROUND, RECORD_SAMPLE, sample_layout

if TYPE_CHECKING:
    from pathlib import Path

DATA_SIZE_AT = 48  # in the file header


def repeat_perf_data(source: Path, target: Path, times: int) -> int:
    """Write `source` to `target` with its samples `times` over; return how many samples that makes.

    What is no sample (mappings, thread names) stays as it is, once.
    """
    data = source.read_bytes()
    perf = read_perf_data(memoryview(data), str(source))
    (layout,) = {sample_layout(attr) for attr in perf.attrs if attr.type_ == TYPE_TRACEPOINT}
    assert layout is not None
    end = perf.data_offset + perf.data_size
    words = np.frombuffer(data, np.dtype("<u8"), len(data) // 8)
    at, here = [], perf.data_offset // 8
    while here < end // 8:
        at.append(here)
        here += int(words[here]) >> 51
    at = np.array(at)
    kind = words[at] & np.uint64(0xFFFFFFFF)
    keep = (kind == RECORD_SAMPLE) | (kind == RECORD_FINISHED_ROUND)
    part = words[at[0] : end // 8][np.repeat(keep, np.diff(at, append=end // 8))]
    shifted = np.cumsum(np.diff(at, append=end // 8)[keep]) - np.diff(at, append=end // 8)[keep]
    times_at = shifted[kind[keep] == RECORD_SAMPLE] + layout.time
    span = int(part[times_at].max() - part[times_at].min()) + 10**9
    grown = part.nbytes * (times - 1)
    with target.open("wb") as out:
        head = bytearray(data[:end])
        struct.pack_into("<Q", head, DATA_SIZE_AT, perf.data_size + grown)
        out.write(head)
        for k in range(1, times):
            later = part.copy()
            later[times_at] += np.uint64(k * span)
            out.write(later.tobytes())
        table = len(perf.features) * 16
        for offset, size in (perf.features[bit] for bit in sorted(perf.features)):
            out.write(struct.pack("<QQ", offset + grown, size))
        out.write(data[end + table :])
    return len(times_at) * times
