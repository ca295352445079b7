"""Perfetto traces are read back with Perfetto's own protobuf definitions; both formats have the same content."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmtrace.formats import open_recording
from kvmtrace.render.perfetto.exit_rates import MAX_BINS, ExitRates
from kvmtrace.render.perfetto.trace_file import write_trace
from kvmtrace.spans.vm_exits import collect_vm_exits

from .tables import recording

FIXTURES = Path(__file__).parents[2] / "fixtures"
SOME = ["svm-6.12-interrupt.dat", "vmx-6.1-smp.dat", "svm-6.1-mmio-split.dat"]


def written(source: Any, *, as_json: bool) -> bytes:
    out = io.BytesIO()
    write_trace(source, out, as_json=as_json)
    return out.getvalue()


class Trace:
    """What a trace holds, whichever format it came from."""

    def __init__(self) -> None:
        self.slices: list[tuple[Any, ...]] = []  # tid, ts, dur, name, arguments, flow
        self.counters: list[tuple[Any, ...]] = []
        self.moments: list[tuple[Any, ...]] = []
        self.threads: dict[int, str] = {}
        self.processes: dict[int, str] = {}


def of_json(data: bytes) -> Trace:
    trace = Trace()
    for event in json.loads(data)["traceEvents"]:
        if event["ph"] == "X":
            flow = event.get("bind_id"), event.get("flow_in", False) and not event.get("flow_out", False)
            ts, dur = round(event["ts"] * 1000), round(event["dur"] * 1000)
            trace.slices.append((event["tid"], ts, dur, event["name"], tuple(sorted(event["args"].items())), flow))
        elif event["ph"] == "C":
            trace.counters.append((event["name"], round(event["ts"] * 1000), event["args"]["VM-exits/s"]))
        elif event["ph"] == "i":
            trace.moments.append((event["tid"], round(event["ts"] * 1000), event["name"], event["args"]))
        elif event["name"] == "thread_name":
            trace.threads[event["tid"]] = event["args"]["name"]
        else:
            trace.processes[event["pid"]] = event["args"]["name"]
    return trace


def value_of(note: Any, texts: dict[int, str]) -> Any:
    which = note.WhichOneof("value")
    if which == "pointer_value":
        return f"{note.pointer_value:#x}"
    return texts[note.string_value_iid] if which == "string_value_iid" else getattr(note, which)


def of_protobuf(data: bytes) -> Trace:
    from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as proto

    found, trace = proto.Trace(), Trace()
    found.ParseFromString(data)
    names: dict[int, str] = {}
    texts: dict[int, str] = {}
    notes: dict[int, str] = {}
    tids: dict[int, int] = {}
    counters: dict[int, str] = {}
    open_slices: dict[int, list[tuple[Any, ...]]] = {}
    for packet in found.packet:
        names.update({one.iid: one.name for one in packet.interned_data.event_names})
        notes.update({one.iid: one.name for one in packet.interned_data.debug_annotation_names})
        texts.update({one.iid: one.str.decode() for one in packet.interned_data.debug_annotation_string_values})
        track = packet.track_descriptor
        if packet.HasField("track_descriptor"):
            if track.HasField("thread"):
                tids[track.uuid] = track.thread.tid
                trace.threads[track.thread.tid] = track.thread.thread_name
            elif track.HasField("process"):
                trace.processes[track.process.pid] = track.process.process_name
            else:
                counters[track.uuid] = track.name
        if not packet.HasField("track_event"):
            continue
        event = packet.track_event
        if event.type == event.TYPE_COUNTER:
            trace.counters.append((counters[event.track_uuid], packet.timestamp, event.counter_value))
            continue
        tid = tids[event.track_uuid]
        if event.type == event.TYPE_SLICE_END:
            start, *rest = open_slices[tid].pop()
            trace.slices.append((tid, start, packet.timestamp - start, *rest))
        elif event.name:
            trace.moments.append(
                (tid, packet.timestamp, event.name, {n.name: n.string_value for n in event.debug_annotations})
            )
        else:
            arguments = {notes[note.name_iid]: value_of(note, texts) for note in event.debug_annotations}
            flows = [*event.flow_ids, *event.terminating_flow_ids]
            flow = f"{flows[0]:#x}" if flows else None, bool(event.terminating_flow_ids)
            found_slice = packet.timestamp, names[event.name_iid], tuple(sorted(arguments.items())), flow
            if event.type == event.TYPE_INSTANT:
                trace.slices.append((tid, packet.timestamp, 0, *found_slice[1:]))
            else:
                open_slices.setdefault(tid, []).append(found_slice)
    return trace


@pytest.fixture(scope="module", params=SOME)
def both(request: pytest.FixtureRequest) -> tuple[Path, Trace, Trace]:
    path = FIXTURES / request.param
    traces = [of(written(open_recording(path), as_json=as_json)) for of, as_json in READERS]
    return path, traces[0], traces[1]


READERS = ((of_json, True), (of_protobuf, False))


def test_both_formats_have_the_same_content(both: tuple[Path, Trace, Trace]) -> None:
    _, first, second = both
    for part in ("slices", "counters"):
        assert sorted(getattr(first, part), key=repr) == sorted(getattr(second, part), key=repr), part
    assert first.threads == second.threads
    assert first.processes == second.processes
    assert len(first.slices) > 50


def test_slices_of_vm_exits_say_what_they_were(both: tuple[Path, Trace, Trace]) -> None:
    path, trace, _ = both
    rows = collect_vm_exits(open_recording(path).iter_events())
    exits = {(tid, dict(arguments).get("vm_exit")): dict(arguments) for tid, _, _, _, arguments, _ in trace.slices}
    for row in rows[rows["dur_ns"] > 0]:
        arguments = exits[int(row["tid"]), int(row["number"])]
        assert arguments["guest_rip"] == f"{row['guest_rip']:#x}"
        assert arguments.get("port") == (f"{row['port']:#x}" if row["port"] >= 0 else None)
        assert arguments.get("gpa") == (f"{row['gpa']:#x}" if row["has_gpa"] else None)
        assert arguments.get("data") == (f"{row['data']:#x}" if row["has_data"] else None)
        assert arguments.get("access") == ("read", "write", None)[row["write"]]


def test_interrupts_flow_from_acceptance_to_their_end(both: tuple[Path, Trace, Trace]) -> None:
    path, trace, _ = both
    flows: dict[str, list[tuple[int, str, bool]]] = {}
    for _, ts, _, name, _, (flow, last) in trace.slices:
        if flow is not None:
            flows.setdefault(flow, []).append((ts, name, last))
    table = open_recording(path).events()
    injected = table.count("kvm_inj_virq")
    named = [sorted(moments) for moments in flows.values() if any(name.startswith("inject ") for _, name, _ in moments)]
    assert len(named) == injected
    for moments in named:
        assert len({name.rsplit(" ", 1)[1] for _, name, _ in moments}) == 1, moments
        words = [name.rsplit(" ", 1)[0] for _, name, _ in moments]
        assert [last for _, _, last in moments] == [word == "EOI" for word in words]


def test_vms_vcpus_and_rates_are_named(both: tuple[Path, Trace, Trace]) -> None:
    _, trace, _ = both
    assert any(name.startswith("vCPU 0 (") for name in trace.threads.values())
    assert all(name.startswith("VM") for name in trace.processes.values())
    assert {name for name, _, _ in trace.counters} <= {
        f"exits/s: {name.split(': ')[1]}" for _, _, _, name, _, _ in trace.slices if ": " in name
    }


def test_flows_over_pieces_merge_and_number_injections() -> None:
    vcpu = [(10, 0, 7, "kvm_entry", {}), (20, 0, 7, "kvm_exit", {})]
    moments = [
        (30, 0, 7, "kvm_inj_virq", {"vector": 0x30}), (40, 0, 7, "kvm_entry", {}), (50, 0, 7, "kvm_exit", {}),
        (60, 0, 7, "kvm_inj_virq", {"vector": 0x30, "reinjected": True}), (70, 0, 7, "kvm_entry", {}),
        (80, 0, 7, "kvm_exit", {}), (90, 0, 7, "kvm_inj_virq", {"vector": 0x30}), (95, 0, 7, "kvm_entry", {}),
    ]  # fmt: skip
    for cuts in ((), (3,), (2, 4, 6, 8)):
        trace = of_json(written(recording(vcpu + moments, cuts), as_json=True))
        found = [(ts, name, flow) for _, ts, _, name, _, (flow, _) in trace.slices if "0x30" in name]
        assert [(ts, name) for ts, name, _ in sorted(found)] == [
            (30, "inject 0x30"), (60, "inject again 0x30"), (90, "inject 0x30"),
        ]  # fmt: skip
        flows = [flow for _, _, flow in sorted(found)]
        assert flows[0] == flows[1] != flows[2]


def test_rates_add_up_however_long_the_recording() -> None:
    rng, rates = np.random.default_rng(4), ExitRates()
    total = np.zeros(3, np.int64)
    for piece in range(20):
        ts_ns = piece * 10**9 + rng.integers(0, 10**9, 100)
        reasons = rng.integers(0, 3, 100)
        total += np.bincount(reasons, minlength=3)
        rates.feed(reasons, ts_ns)
    assert rates._counts.shape[1] <= MAX_BINS
    assert rates._counts.sum(axis=1).tolist() == total.tolist()
    for _, ts_ns, values in rates.finish():
        assert values[-1] == 0
        assert (np.diff(ts_ns) > 0).all()


def test_nothing_to_show_is_still_a_trace() -> None:
    empty = recording([], kinds=["kvm_exit", "kvm_entry"])
    assert json.loads(written(empty, as_json=True)) == {"displayTimeUnit": "ns", "traceEvents": []}
    assert of_protobuf(written(empty, as_json=False)).slices == []


def test_hostile_names_are_escaped() -> None:
    rows = [(10, 0, 7, "kvm_entry", {}), (20, 0, 7, "kvm_exit", {}), (30, 0, 7, "kvm_entry", {})]
    source = recording(rows)
    source.comms = {7: 'x", "ph": "\x1b[2J</script>'}
    names = [of(written(source, as_json=as_json)).threads[7] for of, as_json in READERS]
    assert names[0] == names[1] == f"vCPU 0 ({source.comms[7]}, thread 7)"
