"""Perfetto traces: a track per vCPU with what it was doing, VM-exits with arguments, violations as instants.

The protobuf is written as columns. A varint may be padded with empty groups, so all fields of a packet get a
fixed width, all packets of one shape are rows of a byte matrix, and no packet costs any Python.
Sources: protos/perfetto/trace/trace_packet.proto, track_event/track_event.proto of the Perfetto project;
Protocol Buffers, "Encoding".
"""

from __future__ import annotations

import json
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from kvmtrace.spans.slices import PART_NAMES
from kvmtrace.spans.time_parts import Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from kvmtrace.check.verdict import Violation
    from kvmtrace.spans.slices import Segments

SEQUENCE = 1
CLOCK_MONOTONIC, CLOCK_BOOTTIME = 3, 6  # builtin clocks, protos/perfetto/common/builtin_clock.proto
SLICE_BEGIN, SLICE_END, INSTANT = 1, 2, 3
_CHUNK = 200_000  # packets encoded at once: bounds memory
ARG_RIP, ARG_CPU = 1, 2  # interned names of arguments


def _varint(value: int) -> bytes:
    out = bytearray()
    while True:
        out.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(out)


def _padded(values: NDArray[Any], width: int) -> NDArray[np.uint8]:
    """Return varints of exactly `width` bytes each, shape (n, width)."""
    shifts = np.arange(width, dtype=np.uint64) * np.uint64(7)
    groups = (values.astype(np.uint64)[:, None] >> shifts & np.uint64(0x7F)).astype(np.uint8)
    groups[:, :-1] |= 0x80
    return groups


def _field(number: int, value: int | bytes) -> bytes:
    """Encode one field: an int as varint, bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _packet(*fields: bytes) -> bytes:
    return _field(1, b"".join(fields))  # Trace.packet


class _Layout:
    """Packets of one shape: constant bytes with padded varints between them."""

    def __init__(self) -> None:
        self._parts: list[bytes | int] = []

    def const(self, data: bytes) -> _Layout:
        """Append constant bytes."""
        self._parts.append(data)
        return self

    def slot(self, width: int) -> _Layout:
        """Append a varint of `width` bytes."""
        self._parts.append(width)
        return self

    def __len__(self) -> int:
        return sum(part if isinstance(part, int) else len(part) for part in self._parts)

    def fill(self, columns: Sequence[NDArray[Any]]) -> NDArray[np.uint8]:
        """Return the packets, shape (n, len(self)), slots filled with `columns` in order."""
        matrix = np.empty((len(columns[0]), len(self)), np.uint8)
        at, slot = 0, iter(columns)
        for part in self._parts:
            width = part if isinstance(part, int) else len(part)
            matrix[:, at : at + width] = (
                _padded(next(slot), part) if isinstance(part, int) else np.frombuffer(part, np.uint8)
            )
            at += width
        return matrix


def _event_layout(kind: int, *, named: bool, arguments: bool) -> _Layout:
    """Lay out a TracePacket with a TrackEvent: timestamp, track, then name and arguments."""
    event = _Layout().const(_field(9, kind) + _varint(11 << 3)).slot(3)  # type, track_uuid
    if named:
        event.const(_varint(10 << 3)).slot(3)  # name_iid
    if arguments:
        for name, number, width in ((ARG_RIP, 7, 10), (ARG_CPU, 3, 3)):  # pointer_value, uint_value
            size = len(_field(1, name)) + 1 + width
            event.const(_varint(4 << 3 | 2) + _varint(size) + _field(1, name) + _varint(number << 3)).slot(width)
    head = _Layout().const(_varint(8 << 3)).slot(9)  # timestamp: 63 bits
    head.const(_field(10, SEQUENCE) + _field(13, 2))  # trusted_packet_sequence_id, needs the interned names
    head.const(_varint(11 << 3 | 2) + _varint(len(event)))
    packet = _Layout().const(_varint(1 << 3 | 2) + _varint(len(head) + len(event)))
    packet._parts += head._parts + event._parts  # noqa: SLF001 (layouts of this module are joined here only)
    return packet


def _slice_names(segments: Segments) -> tuple[NDArray[np.int64], dict[int, str]]:
    """Return an interned name for each segment and the names themselves."""
    code = segments.part.astype(np.int64) << 32 | (segments.reason.astype(np.int64) + 1)
    values, inverse = np.unique(code, return_inverse=True)
    names = {}
    for i, value in enumerate(values.tolist()):
        part, reason = PART_NAMES[Part(value >> 32)], (value & 0xFFFFFFFF) - 1
        names[i + 1] = part if reason < 0 else f"{part}: {segments.reasons[reason]}"
    return inverse.reshape(-1) + 1, names


def _descriptors(segments: Segments, labels: Mapping[int, str], names: Mapping[int, str], clock: int) -> bytes:
    """Return the packets that say what the tracks and names are."""
    interned = b"".join(_field(2, _field(1, i) + _field(2, name.encode())) for i, name in names.items())
    interned += b"".join(
        _field(3, _field(1, i) + _field(2, name)) for i, name in ((ARG_RIP, b"guest_rip"), (ARG_CPU, b"cpu"))
    )
    defaults = _field(59, _field(58, clock))  # trace_packet_defaults.timestamp_clock_id
    # Perfetto's own time is boottime: without a snapshot it drops events of other clocks
    clocks = b"".join(_field(1, _field(1, number) + _field(2, 1)) for number in (CLOCK_MONOTONIC, CLOCK_BOOTTIME))
    out = [_packet(_field(6, clocks)), _packet(_field(10, SEQUENCE), _field(13, 1), _field(12, interned), defaults)]
    for i, tid in enumerate(segments.tids):
        name = labels.get(tid, f"vCPU thread {tid}").encode()
        out.append(_packet(_field(10, SEQUENCE), _field(60, _field(1, i + 1) + _field(2, name))))
    return b"".join(out)


def _slices(segments: Segments, name: NDArray[np.int64]) -> Iterator[bytes]:
    """Yield the packets of all segments: begin and end of each, side by side."""
    plain = _event_layout(SLICE_BEGIN, named=True, arguments=False)
    argued = _event_layout(SLICE_BEGIN, named=True, arguments=True)
    end = _event_layout(SLICE_END, named=False, arguments=False)
    track = segments.thread.astype(np.int64) + 1
    for has_rip in (False, True):
        chosen = np.flatnonzero((segments.guest_rip != 0) == has_rip)
        for start in range(0, len(chosen), _CHUNK):
            rows = chosen[start : start + _CHUNK]
            columns: list[NDArray[Any]] = [segments.ts_ns[rows], track[rows], name[rows]]
            if has_rip:
                columns += [segments.guest_rip[rows], np.maximum(segments.cpu[rows], 0)]
            begins = (argued if has_rip else plain).fill(columns)
            ends = end.fill([segments.ts_ns[rows] + segments.dur_ns[rows], track[rows]])
            yield np.hstack((begins, ends)).tobytes()


def _instant(violation: Violation, track: int) -> bytes:
    """Return the packet of one violation."""
    arguments = {
        "expected": violation.expected,
        "observed": violation.observed,
        "why": violation.why,
        "source": violation.source,
    }
    notes = b"".join(_field(4, _field(10, key.encode()) + _field(6, text.encode())) for key, text in arguments.items())
    event = _field(9, INSTANT) + _field(11, track) + _field(23, f"{violation.severity} {violation.rule}".encode())
    return _packet(_field(8, violation.ts_ns), _field(10, SEQUENCE), _field(13, 2), _field(11, event + notes))


def write_pftrace(
    out: IO[bytes], segments: Segments, *, labels: Mapping[int, str], violations: Iterable[Violation] = (),
    clock: str | None = None,
) -> None:  # fmt: skip
    """Write a Perfetto protobuf trace.

    Parameters
    ----------
    out : binary file
    segments : from collect_segments
    labels : tid -> name of its track
    violations : become instants
    clock : the capture's trace clock; Perfetto is told of mono and boot, others pass for monotonic
    """
    name, names = _slice_names(segments)
    out.write(_descriptors(segments, labels, names, CLOCK_BOOTTIME if clock == "boot" else CLOCK_MONOTONIC))
    for chunk in _slices(segments, name):
        out.write(chunk)
    number = {tid: i + 1 for i, tid in enumerate(segments.tids)}
    for violation in violations:
        if violation.tid in number:
            out.write(_instant(violation, number[violation.tid]))


def write_trace_json(
    out: IO[str], segments: Segments, *, labels: Mapping[int, str], violations: Iterable[Violation] = (),
) -> None:  # fmt: skip
    """Write the same in the Trace Event Format (JSON, microseconds), which older viewers read too."""
    import pyarrow as pa
    import pyarrow.compute as pc

    out.write('{"displayTimeUnit":"ns","traceEvents":[\n')
    heads = [
        {
            "ph": "M",
            "name": "thread_name",
            "pid": 1,
            "tid": tid,
            "args": {"name": labels.get(tid, f"vCPU thread {tid}")},
        }
        for tid in segments.tids
    ]
    heads += [
        {
            "ph": "i",
            "s": "t",
            "name": f"{v.severity} {v.rule}",
            "pid": 1,
            "tid": v.tid,
            "ts": v.ts_ns / 1000,
            "args": {"expected": v.expected, "observed": v.observed, "why": v.why},
        }
        for v in violations
    ]
    out.write(",\n".join(json.dumps(head) for head in heads))
    name, names = _slice_names(segments)
    quoted = pa.array([json.dumps(text) for _, text in sorted(names.items())])
    tids = np.array(segments.tids, np.int64)
    for start in range(0, len(segments), _CHUNK):
        rows = slice(start, start + _CHUNK)
        us: list[NDArray[np.int64]] = [segments.ts_ns[rows], segments.dur_ns[rows]]
        parts = [
            ',\n{"ph":"X","pid":1,"tid":',
            tids[segments.thread[rows]],
            ',"ts":',
            us[0] // 1000,
            ".",
            us[0] % 1000,
            ',"dur":',
            us[1] // 1000,
            ".",
            us[1] % 1000,
            ',"name":',
            None,
            ',"args":{"guest_rip":',
            segments.guest_rip[rows],
            ',"cpu":',
            segments.cpu[rows],
            "}}",
        ]
        columns = [
            quoted.take(pa.array(name[rows] - 1))
            if part is None
            else part
            if isinstance(part, str)
            else _decimal(part, padded=parts[i - 1] == ".")
            for i, part in enumerate(parts)
        ]
        out.write("".join(pc.binary_join_element_wise(*columns, "").to_pylist()))
    out.write("\n]}\n")


def _decimal(values: NDArray[Any], *, padded: bool) -> Any:
    """Return numbers as text, with `padded` as three digits behind the point."""
    import pyarrow as pa
    import pyarrow.compute as pc

    text = pc.cast(pa.array(values), pa.string())
    return pc.utf8_lpad(text, 3, "0") if padded else text
