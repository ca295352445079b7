"""Captures of the bpf back end, decoded: whole, cut, damaged, with losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvmtrace.errors import FormatError, KvmtraceError
from kvmtrace.formats import open_recording
from kvmtrace.formats.bpf import bpf_layout as decoder
from kvmtrace.formats.bpf.bpf_recording import BpfRecording
from tests.writers.bpf_capture import (
    Record,
    encode_capture,
    encode_frame,
    encode_head,
    encode_record,
    encode_span,
    entry,
    fpu,
)

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.table.event_table import EventTable


def read(data: bytes) -> BpfRecording:
    return BpfRecording(decoder.read_bpf_capture(memoryview(data), "x.bpf"))


def test_fields_and_columns() -> None:
    table = read(encode_capture([(1, [entry(10, 3, 0xFFFFFFFF81000000, tid=7, preempt_count=2), fpu(20, 1)])])).events()
    assert table.ts_ns.tolist() == [10, 20]
    assert table.cpu.tolist() == [1, 1]
    assert table.tid.tolist() == [7, 100]
    assert table.preempt_count.tolist() == [2, 1]
    assert table.irq_flags.tolist() == [2, 2]
    assert table.field("kvm_entry", "rip").tolist() == [0xFFFFFFFF81000000]
    assert table.field("kvm_entry", "vcpu_id").tolist() == [3]
    assert table.field("kvm_fpu", "load").tolist() == [1]


def test_cpus_are_merged_by_time() -> None:
    spans = [(0, [fpu(10, 1), fpu(30, 0)]), (1, [fpu(20, 1)]), (0, [fpu(40, 1)])]
    table = read(encode_capture(spans)).events()
    assert list(zip(table.ts_ns.tolist(), table.cpu.tolist(), strict=True)) == [(10, 0), (20, 1), (30, 0), (40, 0)]


def test_streaming_gives_the_same_rows() -> None:
    rng = np.random.default_rng(5)
    times = {cpu: np.sort(rng.integers(0, 10**6, 600)).tolist() for cpu in (0, 1)}
    spans = [
        (cpu, [fpu(t, 1) if t % 3 else entry(t, rip=t) for t in times[cpu][i : i + 50]])
        for i in range(0, 600, 50)
        for cpu in (0, 1)
    ]
    data = encode_capture(spans)
    whole = read(data).events()
    parts = list(read(data).iter_events(150))
    assert len(parts) > 3
    assert np.concatenate([p.ts_ns for p in parts]).tolist() == whole.ts_ns.tolist()
    assert (
        np.concatenate([p.field("kvm_entry", "rip") for p in parts]).tolist()
        == whole.field("kvm_entry", "rip").tolist()
    )
    assert np.all(np.diff(whole.ts_ns) >= 0)


def test_losses_are_rows_before_the_event_behind_the_gap() -> None:
    recording = read(encode_capture([(0, [fpu(1, 1), fpu(2, 0), fpu(9, 1, lost=5)]), (0, [fpu(10, 1, lost=6)])]))
    table = recording.events()
    names = [table.kinds[k].name for k in table.kind.tolist()]
    assert names == ["kvm_fpu", "kvm_fpu", "lost_events", "kvm_fpu", "lost_events", "kvm_fpu"]
    assert table.field("lost_events", "count").tolist() == [5, 1]
    assert table.tid[2] == -1
    assert recording.loss.events == 6
    assert recording.loss.by_cpu == {0: 6}


def test_losses_at_the_end_come_from_the_metadata() -> None:
    last = {"loss": {"by_cpu": {"0": 12}, "events": 12}}
    recording = read(encode_capture([(0, [fpu(1, 1, lost=5)])], last=last))
    recording.events()
    assert recording.loss.events == 12


def test_the_loss_counter_wraps() -> None:
    recording = read(encode_capture([(0, [fpu(1, 1, lost=2**32 - 2), fpu(2, 1, lost=3)])]))
    assert recording.events().field("lost_events", "count").tolist() == [5]  # from 2^32-2 on; 2^32-2 is no growth


def test_a_record_that_an_interrupt_overtook_loses_nothing_twice() -> None:
    """Where an interrupt's program ran inside another, the two records may carry the counter in the wrong order."""
    spans = [
        (0, [fpu(1, 1), fpu(2, 1, lost=6), fpu(3, 1, lost=5), fpu(4, 1, lost=6)]),
        (0, [fpu(5, 1, lost=5)]),
        (0, [fpu(6, 1, lost=7)]),
    ]
    recording = read(encode_capture(spans))
    assert recording.events().field("lost_events", "count").tolist() == [6, 1]
    recording = read(encode_capture(spans))
    parts = [p.field("lost_events", "count").tolist() for p in recording.iter_events(1) if p.count("lost_events")]
    assert [count for part in parts for count in part] == [6, 1]


def test_a_missing_span_is_a_loss_of_unknown_size() -> None:
    first, second, third = (encode_span([fpu(t, 1)]) for t in (1, 2, 3))
    data = encode_head() + encode_frame(1, 0, 0, first) + encode_frame(1, 0, len(first) + len(second), third)
    recording = read(data)
    assert recording.events().field("lost_events", "count").tolist() == [-1]
    assert recording.loss.events is None


def test_discarded_records_are_skipped_and_unfinished_ones_are_damage() -> None:
    recording = read(encode_capture([(0, [fpu(1, 1), fpu(2, 1, bits=1 << 30), fpu(3, 1)])]))
    assert recording.events().ts_ns.tolist() == [1, 3]
    assert recording.loss.events == 0
    recording = read(encode_capture([(0, [fpu(1, 1), fpu(2, 1, bits=1 << 31), fpu(3, 1)])]))
    assert recording.events().ts_ns.tolist() == [1, 3]
    assert recording.loss.events is None


def test_records_shorter_than_their_kind_and_unknown_kinds() -> None:
    table = read(encode_capture([(0, [Record(1, 0, b"\1\0\0\0"), Record(2, 77, bytes(8)), fpu(3, 1)])])).events()
    assert [table.kinds[k].name for k in table.kind.tolist()] == ["unknown_event", "unknown_event", "kvm_fpu"]


def many_records(n: int) -> list[Record]:
    rng = np.random.default_rng(n)
    return [fpu(i, i & 1) if flip else entry(i, rip=i) for i, flip in enumerate(rng.integers(0, 2, n).tolist())]


@pytest.mark.parametrize("n", [1, 500, 3000])
def test_long_spans_are_walked_in_parts_with_the_same_result(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_capture([(0, many_records(n))])
    source = decoder.read_bpf_capture(memoryview(data), "x")
    parts = decoder.walk_records(source.words, source.spans, source.slots_of_kind)
    monkeypatch.setattr(decoder, "PART_SLOTS", 1 << 40)
    serial = decoder.walk_records(source.words, source.spans, source.slots_of_kind)
    assert len(serial.at) == n
    assert parts.at.tolist() == serial.at.tolist()


def test_data_that_looks_like_records_does_not_mislead_the_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records whose data are themselves records: every guess within them is wrong."""
    monkeypatch.setattr(decoder, "PART_SLOTS", 16)
    bait = b"".join(encode_record(fpu(7, 1)) for _ in range(40))
    records = [Record(i, 0, struct_entry() + bait) for i in range(1, 40)]
    source = decoder.read_bpf_capture(memoryview(encode_capture([(0, records)])), "x")
    walk = decoder.walk_records(source.words, source.spans, source.slots_of_kind)
    assert len(walk.at) == 39
    assert read(encode_capture([(0, records)])).events().ts_ns.tolist() == list(range(1, 40))


def struct_entry() -> bytes:
    return entry(0).data.ljust(24, b"\0")


def test_cut_at_every_byte(tmp_path: Path) -> None:
    data = encode_capture([(0, [fpu(1, 1), entry(2)]), (1, [fpu(3, 0)])], last={"duration_ns": 5})
    head = len(encode_head())
    first = head + 24 + len(encode_span([fpu(1, 1), entry(2)]))
    boundaries = (head, first, first + 24 + len(encode_span([fpu(3, 0)])))
    whole = read(data)
    assert (len(whole.events()), whole.loss.truncated, whole.loss.events) == (3, False, 0)
    for size in range(len(data)):
        path = tmp_path / "cut.bpf"
        path.write_bytes(data[:size])
        if size < head:
            with pytest.raises(FormatError):
                open_recording(path)
            continue
        recording = open_recording(path)
        assert len(recording.events()) - recording.events().count("lost_events") <= 3
        assert recording.loss.truncated is (size not in boundaries), size


def test_flipped_bytes_never_escape_as_other_errors() -> None:
    data = encode_capture([(0, many_records(60)), (1, many_records(40))], last={"duration_ns": 5})
    rng = np.random.default_rng(1)
    for _ in range(400):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), 3).tolist():
            damaged[at] = int(rng.integers(0, 256))
        try:
            table = read(bytes(damaged)).events()
        except KvmtraceError:
            continue
        for kind in table.kinds:
            for name in kind.fields:
                assert len(table.field(kind.name, name)) == table.count(kind.name)


def test_damage_between_frames_is_stepped_over_and_located() -> None:
    head, first, second = encode_head(), encode_frame(1, 0, 0, encode_span([fpu(1, 1)])), encode_span([fpu(2, 1)])
    data = head + first + b"garbage!" * 3 + encode_frame(1, 0, len(first) - 24, second)
    recording = read(data)
    assert recording.events().ts_ns.tolist() == [1, 2]
    assert [d.offset for d in recording.loss.damage] == [len(head) + len(first)]
    assert recording.loss.events is None


def test_held_exits_are_put_in_order() -> None:
    meta = {"schema": "kvmtrace.capture/1", "filters": {"slower_than_ns": "..."}}
    table = read(encode_capture([(0, [fpu(5, 1), entry(2), fpu(9, 1)])], meta=meta)).events()
    assert table.ts_ns.tolist() == [2, 5, 9]


def test_a_broken_chain_is_a_gap_where_it_breaks() -> None:
    """The record before the break may be damaged too; what follows on the CPU begins behind the gap."""
    data = bytearray(
        encode_capture(
            [(0, [fpu(ts, 1) for ts in (1, 2, 3, 4)]), (1, [fpu(10, 1)]), (0, [fpu(20, 0)])], last={"duration_ns": 30}
        )
    )
    third = len(encode_head()) + 24 + 2 * len(encode_span([fpu(1, 1)]))
    data[third : third + 4] = b"\xff\xff\xff\x3f"
    recording = read(bytes(data))
    table = recording.events()
    assert rows(table) == [("kvm_fpu", 1, 0), ("lost_events", 1, 0), ("kvm_fpu", 10, 1), ("kvm_fpu", 20, 0)]
    assert recording.loss.events is None
    assert [damage.offset for damage in recording.loss.damage] == [third]
    assert [row for part in read(bytes(data)).iter_events(1) for row in rows(part)] == rows(table)


@pytest.mark.parametrize(("cut", "n_lost"), [(0, 0), (1, 2)])
def test_an_end_that_may_be_missing_is_a_gap_on_every_cpu(cut: int, n_lost: int) -> None:
    data = encode_capture([(0, [fpu(1, 1)]), (1, [fpu(2, 1)]), (0, [fpu(3, 1)])], last={"duration_ns": 9})
    table = read(data[: len(data) - cut]).events()
    assert table.count("lost_events") == n_lost
    assert table.count("kvm_fpu") == 3


def rows(table: EventTable) -> list[tuple[str, int, int]]:
    names = [table.kinds[kind].name for kind in table.kind]
    return list(zip(names, table.ts_ns.tolist(), table.cpu.tolist(), strict=True))
