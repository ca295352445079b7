"""Perfetto traces are read back with Perfetto's own protobuf definitions."""

from __future__ import annotations

import io
import json

import numpy as np

from kvmtrace.check.verdict import Violation
from kvmtrace.render.perfetto import write_pftrace, write_trace_json
from kvmtrace.spans.slices import Segments
from kvmtrace.spans.time_parts import Part

HOSTILE = 'x", "ph": "\x1b[2J</script>'


def segments(n: int = 7) -> Segments:
    index = np.arange(n)
    return Segments(
        (101, 102),
        ("io", HOSTILE),
        (index % 2).astype(np.uint16),
        2**50 + index * 1_000_003,
        500 + index,
        np.where(index % 3, Part.HANDLER, Part.GUEST).astype(np.uint8),
        np.where(index % 3, index % 2, -1).astype(np.int32),
        np.zeros(n, np.int16),
        np.where(index % 3, 0xFFFFFFFF81000000 + index.astype(np.uint64), 0).astype(np.uint64),
    )


VIOLATION = Violation(
    "V6", "violation", 2**50 + 5, 101, 0, 0, 3, "kvm_entry", "rip 0x10", "rip 0x11", "because", "here"
)


def packets(made: Segments, **options: object):
    from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as proto

    out = io.BytesIO()
    write_pftrace(out, made, labels={101: "vCPU 0"}, **options)
    trace = proto.Trace()
    trace.ParseFromString(out.getvalue())
    return list(trace.packet)


def test_every_segment_is_a_slice_with_its_name_and_arguments() -> None:
    made = segments()
    found = packets(made)
    interned = next(p.interned_data for p in found if p.HasField("interned_data"))
    names = {entry.iid: entry.name for entry in interned.event_names}
    argument = {entry.iid: entry.name for entry in interned.debug_annotation_names}
    begins = {p.timestamp: p.track_event for p in found if p.HasField("track_event") and p.track_event.type == 1}
    ends = {
        (p.track_event.track_uuid, p.timestamp) for p in found if p.HasField("track_event") and p.track_event.type == 2
    }
    assert len(begins) == len(made)
    for i in range(len(made)):
        event = begins[int(made.ts_ns[i])]
        expected = "guest" if made.part[i] == Part.GUEST else f"kernel: {made.reasons[made.reason[i]]}"
        assert names[event.name_iid] == expected
        assert event.track_uuid == made.thread[i] + 1
        assert (event.track_uuid, int(made.ts_ns[i] + made.dur_ns[i])) in ends
        values = {argument[note.name_iid]: note.pointer_value or note.uint_value for note in event.debug_annotations}
        assert values.get("guest_rip", 0) == made.guest_rip[i]


def test_tracks_and_violations_are_named() -> None:
    found = packets(segments(), violations=[VIOLATION])
    tracks = {p.track_descriptor.uuid: p.track_descriptor.name for p in found if p.HasField("track_descriptor")}
    assert tracks == {1: "vCPU 0", 2: "vCPU thread 102"}
    instant = next(p for p in found if p.HasField("track_event") and p.track_event.type == 3)
    assert instant.timestamp == VIOLATION.ts_ns
    assert instant.track_event.name == "violation V6"
    assert {note.name: note.string_value for note in instant.track_event.debug_annotations}["observed"] == "rip 0x11"


def test_json_holds_the_same_slices_and_escapes_names() -> None:
    made, out = segments(), io.StringIO()
    write_trace_json(out, made, labels={101: HOSTILE}, violations=[VIOLATION])
    events = json.loads(out.getvalue())["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert [round(event["ts"] * 1000) for event in slices] == made.ts_ns.tolist()
    assert [round(event["dur"] * 1000) for event in slices] == made.dur_ns.tolist()
    assert f"kernel: {HOSTILE}" in {event["name"] for event in slices}
    assert [event["name"] for event in events if event["ph"] == "i"] == ["violation V6"]
    assert events[0]["args"]["name"] == HOSTILE


def test_nothing_to_show_is_still_a_trace() -> None:
    empty = segments(0)
    assert [p for p in packets(empty) if p.HasField("track_event")] == []
    out = io.StringIO()
    write_trace_json(out, empty, labels={})
    assert len(json.loads(out.getvalue())["traceEvents"]) == 2
