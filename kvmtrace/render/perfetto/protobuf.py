"""A Perfetto trace as protobuf, written as columns.

A varint may be padded with empty groups, so all fields of a packet get a fixed width, all packets of one shape are
rows of a byte matrix, and no packet costs any Python.
Sources: protos/perfetto/trace/trace_packet.proto, track_event/track_event.proto of the Perfetto project;
Protocol Buffers, "Encoding".
"""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

import numpy as np

from kvmtrace.render.perfetto.trace_content import HEX, TEXT, flow_kind, violation_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvmtrace.check.verdict import Violation
    from kvmtrace.render.perfetto.trace_content import CounterValues, Names, Slices, Track

SEQUENCE = 1
CLOCK_MONOTONIC, CLOCK_BOOTTIME = 3, 6  # builtin clocks, protos/perfetto/common/builtin_clock.proto
SLICE_BEGIN, SLICE_END, INSTANT, COUNTER = 1, 2, 3, 4  # TrackEvent.Type
_CHUNK = 100_000  # packets encoded at once: bounds memory
_POINTER, _INT, _STRING = 7, 4, 17  # fields of DebugAnnotation


def _varint(value: int) -> bytes:
    out = bytearray()
    value &= (1 << 64) - 1
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


def _width(values: NDArray[Any]) -> int:
    """Return the bytes that the largest value takes as a varint."""
    return max(-(-int(values.astype(np.uint64).max()).bit_length() // 7), 1) if len(values) else 1


def _field(number: int, value: int | bytes) -> bytes:
    """Encode one field: an int as varint, bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _packet(*fields: bytes) -> bytes:
    return _field(1, b"".join(fields))  # Trace.packet


Part = bytes | tuple[str, "NDArray[Any]", int]  # constant bytes, or ("varint" or "fixed64", column, bytes)


def _slot(values: NDArray[Any]) -> Part:
    return "varint", values, _width(values)


def _size(parts: Sequence[Part]) -> int:
    return sum(len(part) if isinstance(part, bytes) else part[2] for part in parts)


def _matrix(parts: Sequence[Part], n: int) -> NDArray[np.uint8]:
    """Return `n` packets of the same shape, one a row."""
    matrix = np.empty((n, _size(parts)), np.uint8)
    at = 0
    for part in parts:
        if isinstance(part, bytes):
            width = len(part)
            matrix[:, at : at + width] = np.frombuffer(part, np.uint8)
        else:
            kind, values, width = part
            as_bytes = np.ascontiguousarray(values.astype("<u8")).view(np.uint8).reshape(n, 8)
            matrix[:, at : at + width] = as_bytes if kind == "fixed64" else _padded(values, width)
        at += width
    return matrix


def _event(ts_ns: NDArray[np.int64], event: Sequence[Part]) -> list[Part]:
    """Return the parts of a TracePacket with a TrackEvent."""
    stamp = ("varint", ts_ns, 9)  # 63 bits
    head: list[Part] = [_varint(8 << 3), stamp, _field(10, SEQUENCE) + _field(13, 2)]  # 13: needs the interned names
    head.append(_varint(11 << 3 | 2) + _varint(_size(event)))
    return [_varint(1 << 3 | 2) + _varint(_size(head) + _size(event)), *head, *event]


class PftraceWriter:
    """Writes a protobuf trace.

    Parameters
    ----------
    out : binary file
    clock : the capture's trace clock; Perfetto is told of mono and boot, others pass for monotonic
    """

    def __init__(self, out: IO[bytes], clock: str | None = None) -> None:
        self._out = out
        self._argument_names: dict[str, int] = {}
        self._n_names = 1
        number = CLOCK_BOOTTIME if clock == "boot" else CLOCK_MONOTONIC
        # Perfetto's own time is boottime: without a snapshot it drops events of other clocks
        clocks = b"".join(_field(1, _field(1, one) + _field(2, 1)) for one in (CLOCK_MONOTONIC, CLOCK_BOOTTIME))
        defaults = _field(59, _field(58, number))  # trace_packet_defaults.timestamp_clock_id
        out.write(_packet(_field(6, clocks)) + _packet(_field(10, SEQUENCE), _field(13, 1), defaults))

    def tracks(self, tracks: list[Track]) -> None:
        """Write new tracks."""
        for track in tracks:
            uuid = _field(1, track.number) + _field(2, track.name.encode())
            if track.counter:
                about = _field(8, _field(6, b"VM-exits/s"))
            else:
                name = track.name.encode()
                about = _field(4, _field(1, track.pid) + _field(2, track.tid) + _field(5, name))
                process = _field(3, _field(1, track.pid) + _field(6, track.process.encode()))
                self._write(_field(60, _field(1, 1 << 40 | track.pid) + process))
            self._write(_field(60, uuid + about))

    def slices(self, slices: Slices, names: Names) -> None:
        """Write slices: begin and end of each, side by side."""
        self._intern(slices, names)
        for rows, arguments, lasting in slices.alike():
            for start in range(0, len(rows), _CHUNK):
                self._write_alike(slices, rows[start : start + _CHUNK], arguments, lasting=lasting)

    def _write_alike(
        self, slices: Slices, rows: NDArray[np.intp], arguments: tuple[str, ...], *, lasting: bool
    ) -> None:
        track = _slot(slices.track[rows])
        event: list[Part] = [_field(9, SLICE_BEGIN if lasting else INSTANT) + _varint(11 << 3), track]
        event += [_varint(10 << 3), _slot(slices.name[rows])]  # name_iid
        for name in arguments:
            argument = slices.arguments[name]
            of = {HEX: _POINTER, TEXT: _STRING}.get(argument.kind, _INT)
            note: list[Part] = [_field(1, self._argument_names[name]) + _varint(of << 3), _slot(argument.values[rows])]
            event += [_varint(4 << 3 | 2) + _varint(_size(note)), *note]
        has_flow, _, last = flow_kind(slices, int(rows[0]))
        if has_flow:
            assert slices.flow is not None
            number = 48 if last else 47  # terminating_flow_ids, flow_ids
            event += [_varint(number << 3 | 1), ("fixed64", slices.flow[rows], 8)]
        packets = _matrix(_event(slices.ts_ns[rows], event), len(rows))
        if lasting:
            stop: list[Part] = [_field(9, SLICE_END) + _varint(11 << 3), track]
            ends = _matrix(_event(slices.ts_ns[rows] + slices.dur_ns[rows], stop), len(rows))
            packets = np.hstack((packets, ends))
        self._out.write(packets.tobytes())

    def _intern(self, slices: Slices, names: Names) -> None:
        """Write the names that are new; a text may be a slice's name or an argument's value."""
        interned = b""
        for number in range(self._n_names, len(names.texts)):
            entry = _field(1, number) + _field(2, names.texts[number].encode())
            interned += _field(2, entry) + _field(29, entry)
        self._n_names = len(names.texts)
        for name in slices.arguments:
            if name not in self._argument_names:
                number = self._argument_names.setdefault(name, len(self._argument_names) + 1)
                interned += _field(3, _field(1, number) + _field(2, name.encode()))
        if interned:
            self._write(_field(12, interned) + _field(13, 2))

    def counter(self, values: CounterValues) -> None:
        """Write a counter's values."""
        event: list[Part] = [_field(9, COUNTER) + _field(11, values.track) + _varint(30 << 3), _slot(values.values)]
        self._out.write(_matrix(_event(values.ts_ns, event), len(values.ts_ns)).tobytes())

    def violation(self, violation: Violation, track: Track) -> None:
        """Write a violation as a moment."""
        texts = violation_texts(violation).items()
        notes = b"".join(_field(4, _field(10, key.encode()) + _field(6, text.encode())) for key, text in texts)
        name = _field(23, f"{violation.severity} {violation.rule}".encode())
        event = _field(9, INSTANT) + _field(11, track.number) + name + notes
        self._write(_field(8, violation.ts_ns) + _field(13, 2) + _field(11, event))

    def _write(self, fields: bytes) -> None:
        self._out.write(_packet(_field(10, SEQUENCE), fields))

    def finish(self) -> None:
        """Do nothing: a trace has no end."""
