"""perf.data's records: found by many walkers at once, and the parts of a sample.

A record says where the next one begins, so they must be followed one after the other. We follow them from
many places at once: places that look like the head of a sample. A walker's records count only if the one before
it arrived exactly where it had begun; otherwise that one walks on. The result is that of a single walk.

Source: include/uapi/linux/perf_event.h, enum perf_event_type, PERF_RECORD_SAMPLE
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

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

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.formats.perf_data.perf_layout import Attr

RECORD_LOST, RECORD_COMM, RECORD_FORK, RECORD_SAMPLE, RECORD_LOST_SAMPLES = 2, 3, 7, 9, 13
RECORD_FINISHED_ROUND, RECORD_COMPRESSED = 68, 81

LANE_WORDS = 2048  # u64 words between walkers
MAX_TABLE = 1 << 20
LOOK_WORDS = 64  # how far a walker looks for a place to begin


@dataclass(frozen=True)
class Walk:
    """Records found.

    Parameters
    ----------
    at : int64, shape (n,), u64 word index of each record's header
    stop : int, word index where the walk ended
    sound : bool, it ended at the end of the data, not at a record that cannot be
    """

    at: NDArray[np.int64]
    stop: int
    sound: bool


def is_one_of(values: NDArray[np.uint64], ids: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Say which values are event ids, by a table: the kernel numbers events one after the other."""
    top = int(ids.max(initial=0))
    if top >= MAX_TABLE:
        return np.isin(values, ids)
    table = np.zeros(top + 2, bool)
    table[ids.astype(np.int64)] = True
    return table.take(np.minimum(values, np.uint64(top + 1)).astype(np.int64))


def _lane_starts(words: NDArray[np.uint64], first: int, last: int, ids: NDArray[np.uint64] | None) -> NDArray[np.int64]:
    """Return places that look like the head of a sample, about one for each LANE_WORDS, the first of them `first`.

    `ids` are the event ids that follow the head, None where samples do not begin with one.
    """
    bases = np.arange(first + LANE_WORDS, last - LOOK_WORDS - 1, LANE_WORDS)
    if not len(bases):
        return np.array([first])
    around = bases[:, None] + np.arange(LOOK_WORDS)
    head = words[around]
    size = (head >> np.uint64(48)).astype(np.int64)
    good = (head & np.uint64(0xFFFFFFFF) == RECORD_SAMPLE) & (size >= 16) & (size % 8 == 0)
    if ids is not None:
        good &= is_one_of(words[around + 1], ids)
    found = good.any(axis=1)
    starts = bases[found] + good[found].argmax(axis=1)
    return np.concatenate(([first], starts))


def walk_records(
    words: NDArray[np.uint64], first: int, last: int, ids: NDArray[np.uint64] | None, end: int | None = None
) -> Walk:
    """Find all records that begin in words first..last.

    Parameters
    ----------
    words : the file as little-endian u64
    first, last : int, word indices
    ids : uint64, event ids that samples begin with; None where they do not
    end : int, where all records end; `last` by default
    """
    end = last if end is None else end
    if last <= first:
        return Walk(np.empty(0, np.int64), first, sound=True)
    starts = _lane_starts(words, first, last, ids)
    limit = np.append(starts[1:], last)
    lanes = _walk_lanes(words, starts, limit, end)
    return _join(words, starts, limit, lanes, end)


def _walk_lanes(
    words: NDArray[np.uint64], starts: NDArray[np.int64], limit: NDArray[np.int64], end: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Walk from each start until its limit is reached.

    Return the records lane by lane and, per lane, their number, where it stopped, and whether an impossible
    record stopped it.
    """
    pos = starts.copy()
    steps: list[NDArray[np.int64]] = []
    bad = np.zeros(len(starts), bool)
    while True:
        live = pos < limit
        if not live.any():
            break
        steps.append(pos)
        size = (words.take(pos, mode="clip") >> np.uint64(48)).astype(np.int64)
        after = pos + (size >> 3)
        wrong = live & ((size < 8) | (size & 7 != 0) | (after > end))
        if wrong.any():
            bad |= wrong
            limit = np.where(wrong, pos, limit)  # the lane ends here
            live &= ~wrong
        pos = np.where(live, after, pos)
    table = np.array(steps) if steps else np.empty((0, len(starts)), np.int64)
    valid = np.ones(table.shape, bool)
    valid[1:] = table[1:] != table[:-1]
    valid &= table < limit
    return table.T[valid.T], valid.sum(axis=0), pos, bad


def _join(
    words: NDArray[np.uint64],
    starts: NDArray[np.int64],
    limit: NDArray[np.int64],
    lanes: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]],
    end: int,
) -> Walk:
    """Keep the lanes that a single walk would have come upon."""
    records, counts, stops, bad = lanes
    last = int(limit[-1])
    if not bad.any() and np.array_equal(stops[:-1], limit[:-1]):  # every walker arrived where the next one began
        return Walk(records, int(stops[-1]), sound=True)
    ends = np.cumsum(counts)
    parts: list[NDArray[np.int64]] = []
    lane = 0
    while True:
        parts.append(records[ends[lane] - counts[lane] : ends[lane]])
        at = int(stops[lane])
        if bad[lane]:
            return Walk(np.concatenate(parts), at, sound=False)
        more, at, sound = _walk_on(words, at, starts, (last, end))
        parts.append(np.array(more, np.int64))
        if at >= last or not sound:
            return Walk(np.concatenate(parts), at, sound=sound)
        lane = int(np.searchsorted(starts, at))


def _walk_on(
    words: NDArray[np.uint64], at: int, starts: NDArray[np.int64], last_and_end: tuple[int, int]
) -> tuple[list[int], int, bool]:
    """Walk record by record from `at` to the next lane's start or the last; return (records, where, sound)."""
    last, end = last_and_end
    known = set(starts.tolist())
    out: list[int] = []
    while at < last and at not in known:
        size = int(words[at]) >> 48
        if size < 8 or size & 7 or at + size // 8 > end:
            return out, at, False
        out.append(at)
        at += size // 8
    return out, at, True


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
