"""The capture file of the bpf back end: frames, metadata and where its records are.

The format is described in capture/bpf/BPF_FORMAT.md. Records chain by their lengths, so all spans are walked side by
side: step k finds the k-th record of every span.
"""

from __future__ import annotations

import json
import struct
from dataclasses import field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.errors import FormatError
from kvmtrace.formats.bpf import MAGIC
from kvmtrace.formats.common.cursor import Cursor, describe_bytes
from kvmtrace.formats.common.metadata import clean_meta
from kvmtrace.formats.trace_dat.page_streams import Fault
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.table.format_text import STATIC, EventFormat, parse_event_format

if TYPE_CHECKING:
    from numpy.typing import NDArray

FRAME_MAGIC = b"KTFR"
FRAME = struct.Struct("<4sHHQQ")
FRAME_SPAN, FRAME_META = 1, 2
RING_HEADER_BYTES = 8
RECORD_HEADER_BYTES = 24
FIELD_SHIFT = RING_HEADER_BYTES + RECORD_HEADER_BYTES - 8  # a field at offset o of its format stands at shift + o
LENGTH_MASK, BUSY, DISCARDED = 0x3FFFFFFF, 1 << 31, 1 << 30
MAX_CPU = 1 << 13
MAX_KINDS = 1 << 14
RESYNC_BYTES = 1 << 20
PART_SLOTS = 2048  # of 8 bytes: the parts of long spans that are walked side by side
GUESS_SLOTS = 128  # in which a record's beginning is looked for


@dataclass(frozen=True)
class Spans:
    """The spans of a capture in file order, shape (n,) each.

    Parameters
    ----------
    cpu : int64
    position : int64, within the CPU's ring
    start, end : int64, file offsets of its bytes, multiples of 8
    """

    cpu: NDArray[np.int64]
    position: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]


@dataclass
class BpfCapture:
    """A capture whose frames have been found.

    Parameters
    ----------
    path : str
    words : uint32, shape (n,), the file as far as it is whole words
    meta : the recorder's metadata; "kvmtrace.capture/1" if it is what it should be
    formats : one per kind; event_id is the kind's number
    slots_of_kind : int64, shape (n_kinds,), length of a record in 8 bytes, ring header included
    n_cpus : int
    spans : Spans
    faults : damaged places
    truncated : bool, the file ends within a frame
    """

    path: str
    words: NDArray[np.uint32]
    meta: dict[str, Any]
    formats: list[EventFormat]
    slots_of_kind: NDArray[np.int64]
    n_cpus: int
    spans: Spans
    faults: list[Fault] = field(default_factory=list)
    truncated: bool = False


@dataclass(frozen=True)
class Walk:
    """The records of some spans, in file order.

    Parameters
    ----------
    at : int64, shape (n,), file offset of each record divided by 8
    span : int64, shape (n,), which span it is of
    unfinished : int64, shape (n_spans,), records that were never finished
    faults : spans whose chain breaks
    """

    at: NDArray[np.int64]
    span: NDArray[np.int64]
    unfinished: NDArray[np.int64]
    faults: list[Fault]


def read_bpf_capture(data: memoryview, path: str) -> BpfCapture:
    """Find the frames of a capture.

    Parameters
    ----------
    data : the whole file
    path : str, for messages

    Raises
    ------
    FormatError
        The header is damaged.
    """
    cursor = Cursor(data, path)
    cursor.expect(MAGIC, "a kvmtrace bpf capture, magic")
    header_bytes = cursor.number(8, "length of the header")
    head = _parse_object(bytes(cursor.take(header_bytes, "header")), path, 24)
    meta = head.get("meta")
    kinds = head.get("kinds")
    if not isinstance(meta, dict) or not isinstance(kinds, list) or len(kinds) > MAX_KINDS:
        raise FormatError(path, 24, "metadata and kinds in the header", "something else")
    n_cpus = head.get("n_cpus")
    words = np.frombuffer(data, np.uint8, len(data) & ~3).view("<u4")
    formats = _formats(kinds, path)
    ends = [max((f.offset + f.size for f in fmt.fields.values()), default=8) for fmt in formats]
    slots = (np.array(ends, np.int64) + FIELD_SHIFT + 7) >> 3
    formats = [replace(fmt, fields={name: f for name, f in fmt.fields.items() if f.place == STATIC}) for fmt in formats]
    capture = BpfCapture(
        path,
        words,
        clean_meta(meta),
        formats,
        slots,
        n_cpus if isinstance(n_cpus, int) else 0,
        Spans(*(np.empty(0, np.int64) for _ in range(4))),
    )
    _read_frames(capture, data, cursor.pos)
    return capture


def _parse_object(text: bytes, path: str, offset: int) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError(path, offset, "a JSON object", describe_bytes(text)) from None
    if not isinstance(value, dict):
        raise FormatError(path, offset, "a JSON object", describe_bytes(text))
    return value


def _formats(kinds: list[Any], path: str) -> list[EventFormat]:
    """Return the formats of the kinds."""
    formats = []
    for number, kind in enumerate(kinds):
        text, system = (kind.get("format"), kind.get("system")) if isinstance(kind, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(system, str):
            raise FormatError(path, 24, f"name, system and format of kind {number}", repr(kind)[:60])
        parsed = parse_event_format(text, system)
        if parsed is None:
            raise FormatError(path, 24, f"the format text of kind {number}", repr(text)[:60])
        formats.append(replace(parsed, event_id=number))
    return formats


def _read_frames(capture: BpfCapture, data: memoryview, position: int) -> None:
    """Note the spans, take in the metadata; damage is stepped over."""
    rows: list[tuple[int, int, int, int]] = []
    size = len(data)
    while position < size:
        if size - position < FRAME.size:
            capture.truncated = True
            break
        magic, kind, cpu, ring_position, length = FRAME.unpack_from(data, position)
        body = position + FRAME.size
        if (
            magic != FRAME_MAGIC
            or kind not in (FRAME_SPAN, FRAME_META)
            or length % 8
            or cpu >= MAX_CPU
            or ring_position >> 62
        ):
            found = describe_bytes(data[position : position + 17])
            capture.faults.append(Fault(position, None, "a frame", found))
            position = _resync(data, position + 8)
            continue
        end = body + length
        if end > size:
            capture.truncated = True
            end = size & ~7
        if kind == FRAME_SPAN:
            rows.append((cpu, ring_position, body, max(end, body)))
        elif not capture.truncated:
            _take_meta(capture, bytes(data[body:end]), body)
        position = end if not capture.truncated else size
    table = np.array(rows, np.int64).reshape(-1, 4)
    capture.spans = Spans(*(np.ascontiguousarray(column) for column in table.T))


def _take_meta(capture: BpfCapture, text: bytes, offset: int) -> None:
    try:
        capture.meta |= clean_meta(_parse_object(text, capture.path, offset))
    except FormatError as error:
        capture.faults.append(Fault(offset, None, error.expected, error.found))


def _resync(data: memoryview, position: int) -> int:
    """Return where the next frame begins, or the file's end."""
    size = 256  # the next frame is seldom far
    while position < len(data):
        chunk = bytes(data[position : position + size])
        found = chunk.find(FRAME_MAGIC)
        while found >= 0 and (position + found) % 8:
            found = chunk.find(FRAME_MAGIC, found + 1)
        if found >= 0:
            return position + found
        position += max(len(chunk) - 8, 8)  # a magic may lie across the end; positions are multiples of 8
        size = min(2 * size, RESYNC_BYTES)
    return len(data)


def walk_records(words: NDArray[np.uint32], spans: Spans, slots_of_kind: NDArray[np.int64]) -> Walk:
    """Find all records of spans.

    A record's place follows from the one before it. To walk long spans in parts side by side, places that look like
    records are guessed; a part that does not end exactly where the next begins shows the guess wrong, and is walked
    again without it. So the result is the same as that of walking each span from its start.

    Parameters
    ----------
    words : the file as little-endian u32
    spans : Spans, within the file
    slots_of_kind : int64, shape (n_kinds,), length of a record of each kind in 8 bytes, ring header included
    """
    first, end = spans.start >> 3, spans.end >> 3
    guesses = _guess_starts(words, first, end, slots_of_kind)
    while True:
        parts = np.union1d(first, guesses)
        span = np.searchsorted(first, parts, side="right") - 1
        stop = np.minimum(np.append(parts[1:], np.iinfo(np.int64).max), end[span])
        walk, ends = _walk_parts(words, spans, parts, stop, span)
        wrong = np.unique(np.concatenate((stop[ends > stop], parts[ends < 0])))
        wrong = np.intersect1d(wrong, guesses)
        if not len(wrong):
            return walk
        guesses = np.setdiff1d(guesses, wrong)


def _guess_starts(
    words: NDArray[np.uint32], first: NDArray[np.int64], end: NDArray[np.int64], slots_of_kind: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return places, in 8 bytes, in the spans that look like the beginning of a record, one per PART_SLOTS."""
    n_parts = np.maximum((end - first) // PART_SLOTS - 1, 0)
    span = np.repeat(np.arange(len(first)), n_parts)
    number = np.arange(len(span)) - np.repeat(np.cumsum(n_parts) - n_parts, n_parts)
    near = first[span] + (number + 1) * PART_SLOTS
    guesses = np.zeros(len(near), np.int64)
    for step in range(GUESS_SLOTS):
        open_ = np.flatnonzero(guesses == 0)
        if not len(open_):
            break
        at = near[open_] + step
        length = words.take(2 * at, mode="clip").astype(np.int64)
        kind = (words.take(2 * at + 7, mode="clip") & 0xFFFF).astype(np.int64)
        known = kind < len(slots_of_kind)
        slots = slots_of_kind[np.where(known, kind, 0)] if len(slots_of_kind) else np.zeros(len(at), np.int64)
        fits = known & (length < LENGTH_MASK) & ((length + RING_HEADER_BYTES + 7) >> 3 == slots)
        guesses[open_[fits]] = at[fits]
    kept: NDArray[np.int64] = guesses[guesses != 0]
    return kept


def _walk_parts(
    words: NDArray[np.uint32], spans: Spans, first: NDArray[np.int64], stop: NDArray[np.int64], span: NDArray[np.int64]
) -> tuple[Walk, NDArray[np.int64]]:
    """Walk parts of spans side by side; also return where each part ended, -1 where its chain broke."""
    room = (stop - first) // ((RING_HEADER_BYTES + RECORD_HEADER_BYTES) >> 3) + 1
    base = np.cumsum(room) - room
    found = np.zeros(int(room.sum()), np.int64)
    unfinished = np.zeros(len(spans.start), np.int64)
    ends = first.copy()
    faults: list[Fault] = []
    limit = (spans.end >> 3)[span]
    active = np.flatnonzero(first < stop)
    here, slot = first[active], base[active]
    while len(active):
        word = words.take(2 * here).astype(np.int64)
        length = word & LENGTH_MASK
        after = here + ((length + RING_HEADER_BYTES + 7) >> 3)
        good = (length >= RECORD_HEADER_BYTES) & (after <= limit[active])
        if not good.all():
            faults += _broken(words, spans, span[active[~good]], here[~good])
            ends[active[~good]] = -1
            active, here, slot, word, after = (x[good] for x in (active, here, slot, word, after))
        skipped = word & (BUSY | DISCARDED)
        if skipped.any():
            np.add.at(unfinished, span[active[(word & BUSY) != 0]], 1)
            kept = skipped == 0
            found[slot[kept]] = here[kept]
        else:
            found[slot] = here
        ends[active] = after
        going = after < stop[active]
        active, here, slot = active[going], after[going], slot[going] + 1
    at = found[found != 0]
    return Walk(at, np.searchsorted(spans.start >> 3, at, side="right") - 1, unfinished, faults), ends


def _broken(words: NDArray[np.uint32], spans: Spans, which: NDArray[np.int64], at: NDArray[np.int64]) -> list[Fault]:
    """Return the faults of chains that break at `at`."""
    return [
        Fault(
            int(a) * 8,
            int(spans.cpu[s]),
            "a record's length",
            describe_bytes(words[2 * int(a) : 2 * int(a) + 4].tobytes()),
        )
        for s, a in zip(which.tolist(), at.tolist(), strict=True)
    ]
