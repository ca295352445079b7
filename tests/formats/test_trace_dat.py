"""trace.dat files to event tables: both versions, compression, instances, merging, loss, streaming."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from writers.ring_buffer import event, page, record
from writers.trace_dat import TraceDatWriter

from kvmtrace.errors import FormatError, MissingEventError
from kvmtrace.event_frame import EventFrame
from kvmtrace.formats import open_recording
from kvmtrace.table.event_table import COMMON_DTYPES, EventTable


def entry(vcpu: int = 0, rip: int = 0x1000, tid: int = 77) -> bytes:
    return event(10, struct.pack("<IIQ", vcpu, 0, rip), tid=tid)


def vm_exit(reason: int = 12, rip: int = 0x1000, tid: int = 77, flags: int = 1, preempt: int = 1) -> bytes:
    body = struct.pack("<IIQIIQQIII", reason, 0, rip, 1, 0, 0xFFFF_FFFF_0000_0001, 7, 0x800000EC, 5, 3)
    return event(11, body, tid=tid, flags=flags, preempt=preempt)


def busy_cpu(first_ts: int, step: int, pages: int, per_page: int = 30) -> bytes:
    """Pages with an entry and an exit in turn, `step` ns apart."""
    out = []
    for p in range(pages):
        records = [record(vm_exit(rip=p) if i % 2 else entry(rip=p * 1000 + i), step) for i in range(per_page)]
        out.append(page(first_ts + p * per_page * step, records))
    return b"".join(out)


@pytest.fixture
def save(tmp_path):
    def write(data: bytes):
        path = tmp_path / "trace"
        path.write_bytes(data)
        return path

    return write


ENCODINGS = [("v6", "none"), ("v7", "none"), ("v7", "zlib"), ("v7", "zstd")]


def encode(writer: TraceDatWriter, version: str, compression: str) -> bytes:
    writer.compression = compression
    return getattr(writer, version)()


@pytest.mark.parametrize(("version", "compression"), ENCODINGS)
def test_the_same_events_in_every_encoding(save, version, compression):
    writer = TraceDatWriter([busy_cpu(1000, 10, 5), busy_cpu(1003, 7, 7)], options=[(5, b"Linux box 6.1.0 x86_64\0")])
    recording = open_recording(save(encode(writer, version, compression)))
    events = recording.events()
    assert len(events) == 12 * 30
    assert (np.diff(events.ts_ns) >= 0).all()
    assert events.count("kvm_exit") == events.count("kvm_entry") == 180
    assert events.field("kvm_exit", "info1")[0] == 0xFFFF_FFFF_0000_0001
    assert recording.comms[77] == "CPU 0/KVM"
    capture = recording.capture
    assert (capture.format, capture.host, capture.kernel, capture.clock) == ("trace.dat", "box", "6.1.0", "mono")
    assert (recording.loss.events, recording.loss.truncated, recording.loss.damage) == (0, False, ())


def test_common_columns_and_fields(save):
    pages = page(5_000_000_000, [record(vm_exit(reason=0x80000021, rip=2**64 - 1, tid=-5, flags=0x0D, preempt=2), 9)])
    events = open_recording(save(TraceDatWriter([b"", pages]).v6())).events()
    assert [getattr(events, name).tolist() for name in COMMON_DTYPES if name != "kind"] == [
        [5_000_000_009],
        [1],
        [-5],
        [0x0D],
        [2],
    ]
    fields = {name: int(events.field("kvm_exit", name)[0]) for name in events.kinds[events.kind[0]].fields}
    assert fields == {
        "exit_reason": 0x80000021,
        "guest_rip": 2**64 - 1,
        "isa": 1,
        "info1": 0xFFFF_FFFF_0000_0001,
        "info2": 7,
        "intr_info": 0x800000EC,
        "error_code": 5,
        "vcpu_id": 3,
    }


def test_strings_bools_and_arrays(save):
    switch = event(12, b"qemu\0junkjunkju" + b"k" + struct.pack("<iIq", 42, 0, -7))
    execs = event(13, struct.pack("<I", 16 | 8 << 16) + b"\x02abc" + b"/bin/sh\0")
    events = open_recording(save(TraceDatWriter([page(1, [record(switch), record(execs)])]).v6())).events()
    assert events.field("sched_switch", "prev_comm").tolist() == [b"qemu"]
    assert events.field("sched_switch", "prev_state").tolist() == [-7]
    assert events.field("sched_process_exec", "filename").tolist() == [b"/bin/sh"]
    assert events.field("sched_process_exec", "ok").tolist() == [True]
    assert events.field("sched_process_exec", "bytes").tolist() == [[97, 98, 99]]


def test_absent_kinds_and_fields(save):
    events = open_recording(save(TraceDatWriter([page(1, [record(entry())])]).v6())).events()
    assert events.has("kvm_exit", "info1")
    assert len(events.field("kvm_exit", "info1")) == 0
    assert not events.has("kvm_exit", "requests")
    with pytest.raises(MissingEventError):
        events.field("kvm_exit", "requests")


def test_an_id_that_no_format_describes_keeps_its_row(save):
    events = open_recording(save(TraceDatWriter([page(1, [record(event(999)), record(entry(), 1)])]).v6())).events()
    assert events.field("unknown_event", "common_type").tolist() == [999]
    assert len(events) == 2


def test_probe_groups_of_the_recorder_are_ours_and_kvm_keeps_clashing_names(save):
    from writers.formats import KVM_ENTRY, event_format

    probe = event_format("svm_vcpu_run", 20, [("u64 vcpu", 8, 8, 0)])
    clash = KVM_ENTRY.replace(b"ID: 10", b"ID: 21")
    writer = TraceDatWriter(
        [page(1, [record(event(20, bytes(8))), record(entry())])],
        formats={"other": [clash], "kvm": [KVM_ENTRY], "kvmtrace_123": [probe]},
    )
    events = open_recording(save(writer.v6())).events()
    assert [(k.name, k.system) for k in events.kinds[:3]] == [
        ("other:kvm_entry", "other"),
        ("kvm_entry", "kvm"),
        ("svm_vcpu_run", "kvmtrace"),
    ]
    assert events.count("kvm_entry") == events.count("svm_vcpu_run") == 1


def test_ties_and_backward_stamps_keep_each_cpu_s_order(save):
    from writers.ring_buffer import time_stamp

    first = page(10, [record(entry(rip=1)), record(entry(rip=2), 10), record(entry(rip=3))])
    second = page(20, [record(entry(rip=4)), time_stamp(5), record(entry(rip=5)), record(entry(rip=6), 100)])
    events = open_recording(save(TraceDatWriter([first, second]).v6())).events()
    assert events.field("kvm_entry", "rip").tolist() == [1, 2, 3, 4, 5, 6]
    assert events.ts_ns.tolist() == [10, 20, 20, 20, 5, 105]


def test_lost_events_are_rows_before_the_first_event_after_the_gap(save):
    pages = page(10, [record(entry())]) + page(50, [record(entry(), 2)], lost=7) + page(90, [record(entry())], lost=-1)
    recording = open_recording(save(TraceDatWriter([pages, page(51, [record(entry())])]).v6()))
    events = recording.events()
    assert [
        (events.kinds[k].name, t, c, d)
        for k, t, c, d in zip(events.kind, events.ts_ns.tolist(), events.cpu.tolist(), events.tid.tolist(), strict=True)
    ] == [
        ("kvm_entry", 10, 0, 77),
        ("kvm_entry", 51, 1, 77),
        ("lost_events", 52, 0, -1),
        ("kvm_entry", 52, 0, 77),
        ("lost_events", 90, 0, -1),
        ("kvm_entry", 90, 0, 77),
    ]
    assert events.field("lost_events", "count").tolist() == [7, -1]
    assert (recording.loss.events, recording.loss.by_cpu) == (None, {0: 7})


def test_reading_twice_counts_losses_once(save):
    pages = page(10, [record(entry())]) + page(50, [record(entry())], lost=7)
    recording = open_recording(save(TraceDatWriter([pages]).v6()))
    for _ in range(2):
        list(recording.iter_events(1))
        recording.events()
    assert recording.loss.events == 7


def test_the_tracer_s_own_statistics_count_losses(save):
    stat = b"CPU: 1\nentries: 5\noverrun: 40\ncommit overrun: 1\nbytes: 9\ndropped events: 2\nread events: 3\n"
    recording = open_recording(save(TraceDatWriter([busy_cpu(1, 1, 1)], options=[(2, stat)]).v6()))
    assert (recording.loss.events, recording.loss.by_cpu) == (43, {1: 43})


def test_metadata_of_our_recorder(save):
    meta = {
        "schema": "kvmtrace.capture/1",
        "host": "h",
        "backend": "ftrace",
        "events": ["kvm:kvm_exit"],
        "loss": {"by_cpu": {"0": 12}},
        "cost_ns_per_event": 250,
        "threads": {"77": [70, "CPU 0/KVM"], "x": 3},
    }
    recording = open_recording(save(TraceDatWriter([busy_cpu(1, 1, 1)], meta=meta).v6()))
    capture = recording.capture
    assert (capture.host, capture.backend, capture.events) == ("h", "ftrace", ("kvm:kvm_exit",))
    assert (capture.tracer_cost_ns_per_event, recording.loss.events) == (250.0, 12)
    assert recording.processes == {77: 70}


def test_metadata_of_another_shape_are_ignored(save):
    meta = {"loss": 3, "events": {}, "host": 5, "threads": []}
    recording = open_recording(save(TraceDatWriter([busy_cpu(1, 1, 1)], meta=meta).v6()))
    assert (recording.loss.events, recording.capture.host) == (0, None)


@pytest.mark.parametrize("meta", [[], "x"])
def test_metadata_that_are_no_object_are_damage(save, meta):
    recording = open_recording(save(TraceDatWriter([busy_cpu(1, 1, 1)], meta=meta).v6()))
    assert [d.found for d in recording.loss.damage] == ["no JSON object"]
    assert len(recording.events()) == 30
    assert recording.loss.events is None  # what the recorder knew of losses is gone


@pytest.mark.parametrize("version", ["v6", "v7"])
def test_instances_are_merged_in(save, version):
    writer = TraceDatWriter([busy_cpu(1000, 10, 1)], instances={"guest": [page(1005, [record(entry(rip=42))])]})
    events = open_recording(save(encode(writer, version, "none"))).events()
    assert len(events) == 31
    assert events.field("kvm_entry", "rip")[0] == 42


def test_guest_and_unknown_options_are_passed_over(save):
    options = [(13, b"guest\0" + bytes(40)), (10, b"123 0 qemu\n\0"), (77, b"?"), (11, bytes(8))]
    assert len(open_recording(save(TraceDatWriter([busy_cpu(1, 1, 1)], options=options).v6())).events()) == 30


def test_tsc_and_offset_options(save):
    mult, shift = 3_000_000_001, 31
    options = [(14, struct.pack("<IIQ", mult, shift, 0)), (7, b"-100\0"), (1, b"0x10\0")]
    ts = (5 << 32) + 123_456
    events = open_recording(save(TraceDatWriter([page(ts, [record(entry())])], options=options).v6())).events()
    assert events.ts_ns.tolist() == [(123_456 * mult >> shift) + (5 * mult << 1) - 100 + 16_000]


@pytest.mark.parametrize(("version", "compression"), ENCODINGS)
@pytest.mark.parametrize("max_events", [1, 40, 100, 10_000])
def test_streaming_gives_the_same_rows(save, version, compression, max_events):
    from writers.ring_buffer import time_stamp

    odd = page(900, [record(entry(rip=1)), time_stamp(400), record(entry(rip=2), 3)])
    gap = page(2500, [record(entry())], lost=5)
    cpus = [odd + busy_cpu(1000, 10, 4), busy_cpu(1003, 7, 6) + gap, busy_cpu(1, 0, 3)]
    path = save(encode(TraceDatWriter(cpus), version, compression))
    whole = open_recording(path).events()
    recording = open_recording(path)
    tables = list(recording.iter_events(max_events))
    parts = EventTable.concat(tables)
    for name in COMMON_DTYPES:
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name
    assert np.array_equal(whole.field("kvm_entry", "rip"), parts.field("kvm_entry", "rip"))
    assert recording.loss.events == 5
    if max_events < 100:
        assert len(tables) > 3


def test_a_recording_without_events(save):
    recording = open_recording(save(TraceDatWriter([b"", b""]).v6()))
    assert len(recording.events()) == 0
    assert list(recording.iter_events()) == []
    assert EventFrame(recording.events()).to_pandas().empty


def test_to_pandas_has_nullable_fields(save):
    events = open_recording(save(TraceDatWriter([page(1, [record(entry(rip=9)), record(vm_exit(), 1)])]).v6())).events()
    frame = EventFrame(events).to_pandas()
    assert frame["event"].tolist() == ["kvm_entry", "kvm_exit"]
    assert frame["kvm_entry.rip"][0] == 9
    assert frame["kvm_entry.rip"].isna().tolist() == [False, True]


# damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("version", "compression"), ENCODINGS)
def test_cut_anywhere_it_is_read_so_far_or_refused(save, version, compression):
    data = encode(TraceDatWriter([busy_cpu(1, 1, 2), busy_cpu(5, 1, 2)]), version, compression)
    whole = len(open_recording(save(data)).events())
    for cut in [*range(0, len(data), 61), len(data) - 1]:
        try:
            recording = open_recording(save(data[:cut]))
            events = recording.events()
        except FormatError as error:
            refused = error
            assert (refused.offset or 0) <= cut
            continue
        assert len(events) <= whole
        assert recording.loss.truncated or cut >= len(data) - 4096, cut


def test_trailing_garbage_changes_nothing(save):
    data = TraceDatWriter([busy_cpu(1, 1, 2)]).v6()
    assert len(open_recording(save(data + b"\xff" * 999)).events()) == 60


def test_half_of_the_pages_missing_is_stated(save):
    data = TraceDatWriter([busy_cpu(1, 1, 4)]).v6()
    recording = open_recording(save(data[:-6000]))
    assert len(recording.events()) == 60
    assert recording.loss.truncated
    assert recording.loss.events is None
    assert recording.loss.damage[0].found.startswith("the end of the file")


def test_garbage_in_a_page_leaves_a_mark_and_the_rest(save):
    pages = bytearray(busy_cpu(1, 1, 3))
    pages[4096 + 8 : 4096 + 16] = b"\xff" * 8
    recording = open_recording(save(TraceDatWriter([bytes(pages)]).v6()))
    events = recording.events()
    assert events.count("kvm_entry") + events.count("kvm_exit") == 60
    assert events.field("lost_events", "count").tolist() == [-1]
    assert len(recording.loss.damage) == 1
    assert recording.loss.damage[0].cpu == 0


def test_a_damaged_chunk_leaves_the_others(save):
    writer = TraceDatWriter([busy_cpu(1, 1, 6)], compression="zlib")
    data = bytearray(writer.v7())
    second = data.find(b"\x78\x9c", data.find(b"\x78\x9c", len(data) // 2) + 2)
    data[second + 10 : second + 40] = b"\xff" * 30
    recording = open_recording(save(bytes(data)))
    events = recording.events()
    assert events.count("kvm_entry") + events.count("kvm_exit") in (120, 60)
    assert events.count("lost_events") > 0
    assert recording.loss.damage
    assert sum(len(part) for part in recording.iter_events(25)) == len(events)


@pytest.mark.parametrize(("at", "value"), [(10, b"9"), (12, b"\x01"), (14, b"\xff\xff\xff\xff")])
def test_wrong_version_byte_order_and_page_size(save, at, value):
    data = bytearray(TraceDatWriter([b""]).v6())
    data[at : at + len(value)] = value
    with pytest.raises(FormatError) as error:
        open_recording(save(bytes(data)))
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("marker", [b"header_page\0", b"header_event\0"])
def test_huge_sizes_are_refused_without_reading(save, marker):
    data = bytearray(TraceDatWriter([b""]).v6())
    at = data.find(marker) + len(marker)
    data[at : at + 8] = b"\xff" * 8
    with pytest.raises(FormatError, match="bytes to the end"):
        open_recording(save(bytes(data)))


def test_a_huge_number_of_cpus_is_refused(save):
    data = bytearray(TraceDatWriter([b""]).v6())
    at = data.find(b"options  \0")
    data[at - 4 : at] = b"\xff\xff\xff\x7f"
    with pytest.raises(FormatError, match="CPUs"):
        open_recording(save(bytes(data)))


def test_a_claimed_size_that_no_compression_reaches_is_refused(save):
    data = bytearray(TraceDatWriter([busy_cpu(1, 1, 2)], compression="zlib").v7())
    section = data.find(struct.pack("<HH", 16, 1))
    struct.pack_into("<I", data, section + 16 + 4, 0x7FFFFFFF)
    with pytest.raises(FormatError, match="credible"):
        open_recording(save(bytes(data)))


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"hello\n", bytes(range(256)), b"\x17\x08\x44"])
def test_files_that_are_no_trace(save, data):
    with pytest.raises(FormatError) as error:
        open_recording(save(data))
    assert error.value.offset == 0


def test_cpus_whose_pages_overlap_are_read_once_and_stated(tmp_path):
    """Else a damaged table would have the same pages decoded as often as it has rows."""
    data = bytearray(TraceDatWriter([page(100, [record(b"\x0a\0" + bytes(22), 7)]), b"", b""]).v6())
    table = data.index(b"flyrecord\0") + 10
    for cpu in (1, 2):
        data[table + 16 * cpu : table + 16 * cpu + 16] = data[table : table + 16]
    path = tmp_path / "overlap.dat"
    path.write_bytes(data)
    recording = open_recording(path)
    assert recording.events().cpu[recording.events().tid >= 0].tolist() == [0]
    assert [(d.cpu, d.found.partition(" from")[0]) for d in recording.loss.damage] == [
        (1, "those of CPU 0"),
        (2, "those of CPU 0"),
    ]
