"""perf.data files to event tables."""

from __future__ import annotations

import struct
import subprocess

import numpy as np
import pytest
from writers.perf_data import (
    CALLCHAIN,
    IDENTIFIER,
    LOST_SAMPLES,
    RAW,
    TID,
    TIME,
    USUAL,
    PerfDataWriter,
    comm,
    finished_round,
    fork,
    lost,
    record,
    sample,
    sample_id,
)
from writers.ring_buffer import event

from kvmtrace.errors import FormatError
from kvmtrace.formats import open_recording
from kvmtrace.table.event_table import COMMON_DTYPES, EventTable


def entry(rip: int, tid: int = 77, flags: int = 1) -> bytes:
    return event(10, struct.pack("<IIQ", 3, 0, rip), tid=tid, flags=flags, preempt=2)


def entries(first: int, step: int, count: int, cpu: int) -> list[bytes]:
    return [sample(first + i * step, entry(i), cpu=cpu) for i in range(count)]


@pytest.fixture
def save(tmp_path):
    def write(data: bytes):
        path = tmp_path / "perf"
        path.write_bytes(data)
        return path

    return write


def test_columns_fields_and_capture(save):
    recording = open_recording(save(PerfDataWriter([sample(5, entry(0x1000), cpu=1)]).bytes()))
    events = recording.events()
    assert [getattr(events, n).tolist() for n in COMMON_DTYPES if n != "kind"] == [[5], [1], [77], [1], [2]]
    assert events.field("kvm_entry", "rip").tolist() == [0x1000]
    assert events.field("kvm_entry", "vcpu_id").tolist() == [3]
    capture = recording.capture
    assert (capture.format, capture.host, capture.clock) == ("perf.data", "box", "perf")
    assert capture.events == ("kvm:kvm_entry", "kvm:kvm_exit")
    assert recording.loss.events == 0


def test_rows_are_in_time_order_and_at_equal_times_in_file_order(save):
    records = [sample(9, entry(1), cpu=1), sample(4, entry(2)), sample(9, entry(3), cpu=0), sample(1, entry(4), cpu=2)]
    events = open_recording(save(PerfDataWriter(records).bytes())).events()
    assert events.field("kvm_entry", "rip").tolist() == [4, 2, 1, 3]


def test_threads(save):
    records = [comm(70, 77, "CPU 0/KVM"), fork(70, 78), sample(1, entry(1))]
    recording = open_recording(save(PerfDataWriter(records).bytes()))
    recording.events()
    assert (recording.comms, recording.processes) == ({77: "CPU 0/KVM"}, {77: 70, 78: 70})


def test_lost_records(save):
    records = [
        sample(1, entry(1)),
        lost(40, 5, 1),
        sample(6, entry(2), cpu=1),
        record(LOST_SAMPLES, struct.pack("<Q", 2) + sample_id(7, 0)),
        sample(8, entry(3)),
    ]
    recording = open_recording(save(PerfDataWriter(records).bytes()))
    events = recording.events()
    assert events.field("lost_events", "count").tolist() == [40, 2]
    assert events.cpu[events.rows("lost_events")].tolist() == [1, 0]
    assert (recording.loss.events, recording.loss.by_cpu) == (42, {0: 2, 1: 40})


def test_call_chains_stand_before_the_raw_data(save):
    kind = USUAL | CALLCHAIN
    records = [sample(i, entry(i), sample_type=kind, chain=i) for i in range(5)]
    events = open_recording(save(PerfDataWriter(records, attrs=[(10, kind, [1])]).bytes())).events()
    assert events.field("kvm_entry", "rip").tolist() == [0, 1, 2, 3, 4]


def test_events_of_other_layouts_are_told_apart_by_their_identifier(save):
    other = IDENTIFIER | TID | TIME
    records = [sample(1, entry(1)), sample(2, b"", ident=9, sample_type=other), sample(3, entry(2))]
    events = open_recording(save(PerfDataWriter(records, attrs=[(10, USUAL, [1]), (0, other, [9])]).bytes())).events()
    assert events.field("kvm_entry", "rip").tolist() == [1, 2]


def test_several_layouts_without_identifier_are_refused(save):
    writer = PerfDataWriter([], attrs=[(10, TIME | RAW, [1]), (11, TIME | TID | RAW, [2])])
    with pytest.raises(FormatError, match="one layout"):
        open_recording(save(writer.bytes()))


def test_samples_without_identifier(save):
    kind = TIME | TID | RAW
    records = [sample(i, entry(i), sample_type=kind) for i in range(300)]
    events = open_recording(save(PerfDataWriter(records, attrs=[(10, kind, [1])]).bytes())).events()
    assert events.field("kvm_entry", "rip").tolist() == list(range(300))
    assert set(events.cpu.tolist()) == {-1}


def test_copies_that_perf_wrote_are_left_out_and_noted(save):
    records = entries(0, 10, 8, 0)
    recording = open_recording(save(PerfDataWriter([*records, *records[5:], *entries(100, 10, 3, 0)]).bytes()))
    assert recording.events().ts_ns.tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 100, 110, 120]
    assert (recording.loss.repeated, recording.loss.events) == (3, 0)


def test_a_copy_beside_its_sample_counts_once(save):
    """No time steps back; another thread, CPU, kind or content at that time is no copy."""
    records = entries(0, 10, 400, 0)
    same_time = [sample(30, entry(3)), sample(30, entry(3), cpu=1), sample(30, entry(99)), sample(30, entry(3))]
    recording = open_recording(save(PerfDataWriter([*records[:4], *same_time, *records[4:]]).bytes()))
    events = recording.events()
    assert (len(events), recording.loss.repeated) == (402, 2)
    assert events.field("kvm_entry", "rip")[events.ts_ns == 30].tolist() == [3, 3, 99]
    parts = EventTable.concat(list(recording.iter_events(10)))
    assert parts.ts_ns.tolist() == events.ts_ns.tolist()


def test_equal_samples_of_a_coarse_clock_stay(save):
    records = [sample(i // 40, entry(i % 7)) for i in range(400)]
    recording = open_recording(save(PerfDataWriter(records).bytes()))
    assert (len(recording.events()), recording.loss.repeated) == (400, 0)


@pytest.mark.parametrize("compressed", [False, True])
def test_copies_are_the_same_in_one_piece_and_in_parts(save, compressed):
    """A damaged file's records stand in it again, next to and far behind where they were, at once and in parts."""
    records = rounds(12)
    n_round = len(records) // 12
    again = [*records[: 3 * n_round], *records[2 * n_round : 3 * n_round], *records[3 * n_round :], *records[5:15]]
    path = save(PerfDataWriter(again, compressed=compressed).bytes())
    recording = open_recording(path)
    n_events, loss = len(recording.events()), recording.loss
    assert (n_events, loss.repeated) == (12 * 80 + 10, 80)  # what comes rounds too late is not known for a copy
    for max_events in (1, 7, 50, 300):
        assert sum(map(len, recording.iter_events(max_events))) == n_events
        assert recording.loss == loss


@pytest.mark.parametrize("max_events", [1, 20, 1000])
def test_the_files_beginning_tells_whether_its_clock_is_coarse(save, max_events):
    fine = [finished_round() if i % 41 == 40 else sample(i, entry(i)) for i in range(2000)]
    equal = [[sample(2000 + i, entry(k)) for k in (1, 2, 2)] + [finished_round()] for i in range(60)]
    for written, repeated in ((fine + equal[0] + equal[1], 2), ([r for some in equal for r in some], 0)):
        recording = open_recording(save(PerfDataWriter(written).bytes()))
        n_events = sum(map(len, recording.iter_events(max_events)))
        n_samples = len(written) - written.count(finished_round())
        assert (n_events, recording.loss.repeated) == (n_samples - repeated, repeated)


def test_late_records_that_are_no_copies_stay(save):
    recording = open_recording(save(PerfDataWriter([*entries(50, 0, 3, 0), sample(10, entry(9))]).bytes()))
    assert recording.events().field("kvm_entry", "rip").tolist() == [9, 0, 1, 2]


def rounds(count: int) -> list[bytes]:
    """Two CPUs, whose rounds overlap in time by one round."""
    out = []
    for r in range(1, count + 1):
        out += entries(r * 1000, 10, 40, 0) + entries(r * 1000 - 500, 9, 40, 1) + [finished_round()]
    return out


@pytest.mark.parametrize("max_events", [1, 50, 300, 100_000])
@pytest.mark.parametrize("compressed", [False, True])
def test_streaming_gives_the_same_rows(save, max_events, compressed):
    path = save(PerfDataWriter(rounds(12), compressed=compressed).bytes())
    whole = open_recording(path).events()
    tables = list(open_recording(path).iter_events(max_events))
    parts = EventTable.concat(tables)
    for name in COMMON_DTYPES:
        assert np.array_equal(getattr(whole, name), getattr(parts, name)), name
    assert np.array_equal(whole.field("kvm_entry", "rip"), parts.field("kvm_entry", "rip"))
    assert len(tables) > 3 or max_events > 50 or compressed


def test_compressed_records(save):
    plain = open_recording(save(PerfDataWriter(rounds(5)).bytes())).events()
    packed = open_recording(save(PerfDataWriter(rounds(5), compressed=True).bytes())).events()
    assert np.array_equal(plain.ts_ns, packed.ts_ns)
    assert np.array_equal(plain.field("kvm_entry", "rip"), packed.field("kvm_entry", "rip"))


def test_a_file_that_perf_did_not_finish_lacks_its_formats(save):
    data = PerfDataWriter(rounds(3)).bytes()
    with pytest.raises(FormatError, match="perf did not end properly") as error:
        open_recording(save(data[:3000]))
    assert error.value.exit_code == 3


def test_damage_within_the_records_ends_them_and_is_located(save):
    data = bytearray(PerfDataWriter(entries(0, 1, 100, 0)).bytes())
    at = data.find(sample(50, entry(50)))
    data[at + 6 : at + 8] = b"\x03\x00"
    recording = open_recording(save(bytes(data)))
    assert len(recording.events()) == 50
    assert recording.loss.truncated
    assert [d.offset for d in recording.loss.damage] == [at]


def test_cut_at_every_byte(save):
    data = PerfDataWriter([*entries(0, 1, 3, 0), lost(3, 5, 1)]).bytes()
    for cut in range(len(data)):
        try:
            events = open_recording(save(data[:cut])).events()
        except FormatError as error:
            assert (error.offset or 0) <= cut  # noqa: PT017
        else:
            assert len(events) == 4
            assert cut > len(data) - 60  # only the host's name is missing


def test_trailing_garbage_changes_nothing(save):
    assert len(open_recording(save(PerfDataWriter(entries(0, 1, 9, 0)).bytes() + b"\xfe" * 777)).events()) == 9


@pytest.mark.parametrize(
    ("at", "value", "match"),
    [
        (8, struct.pack("<Q", 16), "to a pipe"),
        (16, struct.pack("<Q", 8), "80 to 4096"),
        (32, b"\xff" * 8, "bytes of event attributes"),
        (40, b"\xff" * 8, "expected"),
        (0, b"2ELIFREP", "little-endian"),
    ],
)
def test_impossible_headers(save, at, value, match):
    data = bytearray(PerfDataWriter(entries(0, 1, 9, 0)).bytes())
    data[at : at + 8] = value
    with pytest.raises(FormatError, match=match):
        open_recording(save(bytes(data)))


@pytest.mark.kvm
def test_what_perf_records_here(tmp_path):
    path = tmp_path / "perf.data"
    subprocess.run(
        ["perf", "record", "-q", "-a", "-e", "sched:sched_switch", "-o", str(path), "sleep", "0.2"],
        check=True,
        capture_output=True,
    )
    script = subprocess.run(
        ["perf", "script", "--ns", "-i", str(path), "-F", "cpu,time,event"], check=True, capture_output=True, text=True
    ).stdout
    lines = [line.split() for line in script.splitlines()]
    want = [(int(cpu[1:-1]), int(time.rstrip(":").replace(".", ""))) for cpu, time, _ in lines]
    events = open_recording(path).events()
    assert list(zip(events.cpu.tolist(), events.ts_ns.tolist(), strict=True)) == want
