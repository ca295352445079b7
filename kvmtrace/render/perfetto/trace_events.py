"""A Perfetto trace in the Trace Event Format (JSON, microseconds), which older viewers read too."""

from __future__ import annotations

import json
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from kvmtrace.render.perfetto.trace_content import HEX, TEXT, flow_kind, violation_texts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.check.verdict import Violation
    from kvmtrace.render.perfetto.trace_content import CounterValues, Names, Slices, Track

_CHUNK = 100_000  # events made at once: bounds memory


class TraceEventsWriter:
    """Writes the JSON.

    Parameters
    ----------
    out : binary file
    """

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._tracks: dict[int, Track] = {}
        self._begun = False
        out.write(b'{"displayTimeUnit":"ns","traceEvents":[\n')

    def _event(self, **event: Any) -> None:
        self._write(json.dumps(event))

    def _write(self, text: str) -> None:
        self._out.write(((",\n" if self._begun else "") + text).encode())
        self._begun = True

    def tracks(self, tracks: list[Track]) -> None:
        """Write new tracks."""
        for track in tracks:
            self._tracks[track.number] = track
            if not track.counter:
                about = {"ph": "M", "pid": track.pid, "tid": track.tid}
                self._event(name="process_name", args={"name": track.process}, **about)
                self._event(name="thread_name", args={"name": track.name}, **about)

    def slices(self, slices: Slices, names: Names) -> None:
        """Write slices."""
        import pyarrow as pa
        import pyarrow.compute as pc

        quoted = pa.array([json.dumps(text) for text in names.texts])
        for rows, arguments, _ in slices.alike():
            for start in range(0, len(rows), _CHUNK):
                columns = self._columns(slices, rows[start : start + _CHUNK], arguments, quoted)
                self._write(",\n".join(pc.binary_join_element_wise(*columns, "").to_pylist()))

    def _columns(self, slices: Slices, rows: NDArray[np.intp], arguments: tuple[str, ...], quoted: Any) -> list[Any]:
        """Return the parts of each event's text, which are to be joined."""
        import pyarrow as pa

        numbers, inverse = np.unique(slices.track[rows], return_inverse=True)
        tracks = [self._tracks[number] for number in numbers.tolist()]
        heads = pa.array([f'{{"ph":"X","pid":{track.pid},"tid":{track.tid},"ts":' for track in tracks])
        columns: list[Any] = [heads.take(pa.array(inverse.reshape(-1))), *_microseconds(slices.ts_ns[rows])]
        columns += [
            ',"dur":',
            *_microseconds(slices.dur_ns[rows]),
            ',"name":',
            quoted.take(pa.array(slices.name[rows])),
        ]
        has_flow, first, last = flow_kind(slices, int(rows[0]))
        if has_flow:
            assert slices.flow is not None
            columns += [',"bind_id":', _hexadecimal(slices.flow[rows])]
            columns.append(("" if first else ',"flow_in":true') + ("" if last else ',"flow_out":true'))
        columns.append(',"args":{')
        for i, name in enumerate(arguments):
            argument = slices.arguments[name]
            columns.append(("," if i else "") + json.dumps(name) + ":")
            values = argument.values[rows]
            if argument.kind == TEXT:
                columns.append(quoted.take(pa.array(values.astype(np.int64))))
            else:
                columns.append(_hexadecimal(values) if argument.kind == HEX else _decimal(values.view(np.int64)))
        columns.append("}}")
        return columns

    def counter(self, values: CounterValues) -> None:
        """Write a counter's values."""
        track = self._tracks[values.track]
        for ts_ns, value in zip(values.ts_ns.tolist(), values.values.tolist(), strict=True):
            self._event(ph="C", pid=track.pid, name=track.name, ts=ts_ns / 1000, args={"VM-exits/s": value})

    def violation(self, violation: Violation, track: Track) -> None:
        """Write a violation as a moment."""
        name = f"{violation.severity} {violation.rule}"
        about = {"ph": "i", "s": "t", "pid": track.pid, "tid": track.tid, "ts": violation.ts_ns / 1000}
        self._event(name=name, args=violation_texts(violation), **about)

    def finish(self) -> None:
        """Write the end."""
        self._out.write(b"\n]}\n")


def _microseconds(ns: NDArray[np.int64]) -> list[Any]:
    """Return the parts of times in microseconds with three digits behind the point."""
    import pyarrow.compute as pc

    return [_decimal(ns // 1000), ".", pc.utf8_lpad(_decimal(ns % 1000), 3, "0")]


def _decimal(values: NDArray[Any]) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.cast(pa.array(values), pa.string())


def _hexadecimal(values: NDArray[np.uint64]) -> Any:
    """Return numbers as quoted hexadecimal: most are among a few."""
    import pyarrow as pa

    distinct, inverse = np.unique(values, return_inverse=True)
    return pa.array([f'"{value:#x}"' for value in distinct.tolist()]).take(pa.array(inverse.reshape(-1)))
