"""perf.data recorded with -z: records inside PERF_RECORD_COMPRESSED, one zstd stream through all of them.

Source: tools/perf/Documentation/perf.data-file-format.txt, PERF_RECORD_COMPRESSED, HEADER_COMPRESSED
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kvmtrace._native.perf_samples import end_of_perf_records
from kvmtrace.formats.common.compression import MAX_KEPT, USUAL_RATIO
from kvmtrace.formats.perf_data.perf_records import RECORD_COMPRESSED
from kvmtrace.formats.trace_dat.page_streams import Fault

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from kvmtrace.formats.perf_data.perf_layout import PerfData


PIECE_BYTES = 512  # a block of 4 bytes may stand for 128 KiB


class FaultSink(Protocol):
    """Takes what could not be read."""

    def add_faults(self, faults: Iterable[Fault], *, truncated: bool = False) -> None:
        """Take in faults."""
        ...


def _iter_outer(data: memoryview, at: int, end: int, faults: list[Fault]) -> Iterator[tuple[int, int, memoryview]]:
    """Yield (offset, type, content) of the records of the file; compressed ones have any size, at any byte.

    Each holds the samples of a whole buffer, so there are few.
    """
    while at + 8 <= end:
        kind, size = int.from_bytes(data[at : at + 4], "little"), int.from_bytes(data[at + 6 : at + 8], "little")
        if size < 8 or at + size > end:
            faults.append(Fault(at, -1, "a record with a size that fits", f"size {size} of type {kind}"))
            return
        yield at, kind, data[at + 8 : at + size]
        at += size


def decompress_records(perf: PerfData, first: int, last: int, sink: FaultSink) -> NDArray[np.uint64]:
    """Return the records of bytes first..last of the file, with compressed ones replaced by what they hold.

    Parameters
    ----------
    perf : PerfData
    sink : is told where the stream is damaged; what came before is kept

    Returns
    -------
    ndarray[uint64], whole records one after the other
    """
    import zstandard

    stream = zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj()
    limit = MAX_KEPT + USUAL_RATIO * (last - first)
    faults: list[Fault] = []
    out = bytearray()
    held = b""  # the beginning of a record that goes on in the next compressed one
    for at, kind, content in _iter_outer(perf.data, first, last, faults):
        if kind != RECORD_COMPRESSED:
            if not held:  # never within a record
                out += perf.data[at : at + 8 + len(content)]
            continue
        try:
            more = _decompress(stream, content, limit)
        except zstandard.ZstdError as error:
            faults.append(Fault(at, -1, "zstd data", str(error)))
            break
        if more is None:
            faults.append(Fault(at, -1, f"at most {MAX_KEPT >> 20} MiB and {USUAL_RATIO} times its size", "more"))
            break
        limit -= len(more)
        got = held + more
        whole = _whole_records(got)
        out += memoryview(got)[:whole]
        held = got[whole:]
    sink.add_faults(faults, truncated=True)
    return np.frombuffer(out, np.dtype("<u8"), len(out) // 8)


def _decompress(stream: Any, content: memoryview, limit: int) -> bytes | None:
    """Return what a part of the stream holds, None if it is more than `limit`; it is fed by small pieces."""
    pieces: list[bytes] = []
    for begin in range(0, len(content), PIECE_BYTES):
        pieces.append(stream.decompress(content[begin : begin + PIECE_BYTES]))
        limit -= len(pieces[-1])
        if limit < 0:
            return None
    return b"".join(pieces)


def _whole_records(data: bytes) -> int:
    """Return how many bytes of `data` are whole records."""
    words = np.frombuffer(data, np.dtype("<u8"), len(data) // 8)
    return end_of_perf_records(words) * 8
