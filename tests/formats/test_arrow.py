"""Recordings written as Parquet, Arrow and CSV, read back by us and by others."""

from __future__ import annotations

import functools
import io
import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from writers.ring_buffer import event, page, record
from writers.trace_dat import TraceDatWriter

from kvmtrace.errors import FormatError
from kvmtrace.formats import open_recording
from kvmtrace.formats.arrow import arrow_groups, arrow_schema, arrow_window
from kvmtrace.formats.arrow import arrow_writing as arrow
from kvmtrace.formats.arrow.arrow_schema import dtype_text, text_dtype
from kvmtrace.formats.arrow.arrow_values import field_values
from kvmtrace.table.event_table import COMMON_DTYPES

WRITERS = {"parquet": functools.partial(arrow.write_parquet, grouped=True), "arrow": arrow.write_arrow}


def exit_fields(rip: int, info2: int, vcpu: int) -> bytes:
    return struct.pack("<IIQIIQQIII", 12, 0, rip, 2, 0, 2**64 - 1, info2, 0, 0, vcpu)


def pages(cpu: int, tid: int, count: int) -> bytes:
    out = []
    for p in range(count):
        records = []
        for i in range(20):
            rip = p * 100 + i
            records += [
                record(event(10, struct.pack("<IIQ", cpu, 0, rip), tid=tid), 5),
                record(event(11, exit_fields(rip, i, cpu), tid=tid), 3),
            ]
        out.append(page(p * 1000 + cpu, records, lost=4 if p == 2 else None))
    return b"".join(out)


@pytest.fixture
def recording(tmp_path):
    switch = record(event(12, b"qe\xffmu\0".ljust(16, b"x") + struct.pack("<iIq", 42, 0, -7)), 9)
    execs = record(event(13, struct.pack("<I", 16 | 8 << 16) + b"\x02abc" + b"/bin/sh\0"), 9)
    meta = {"schema": "kvmtrace.capture/1", "host": "h", "events": ["kvm:kvm_exit"], "threads": {"7": [70, "v"]}}
    path = tmp_path / "trace.dat"
    path.write_bytes(TraceDatWriter([pages(0, 7, 6), pages(1, 8, 5), page(900, [switch, execs])], meta=meta).v6())
    return open_recording(path)


def save(recording, tmp_path, form: str):
    path = tmp_path / "exported"
    with path.open("wb") as out:
        WRITERS[form](recording, out)
    return path


def assert_same(got, want):
    for name in COMMON_DTYPES:
        assert np.array_equal(getattr(got, name), getattr(want, name)), name
    for kind in want.kinds:
        for field in kind.fields if want.count(kind.name) else ():
            a, b = got.field(kind.name, field), want.field(kind.name, field)
            assert a.tolist() == b.tolist() or field == "prev_comm", (kind.name, field)
            assert a.dtype == b.dtype or b.dtype.kind in "SO"


@pytest.mark.parametrize("form", WRITERS)
def test_what_is_written_is_read_back(recording, tmp_path, form):
    again = open_recording(save(recording, tmp_path, form))
    assert_same(again.events(), recording.events())
    assert [(k.name, k.system, k.fields) for k in again.kinds] == [
        (k.name, k.system, k.fields) for k in recording.kinds
    ]
    assert (again.capture.format, again.capture.host, again.capture.events) == (form, "h", ("kvm:kvm_exit",))
    assert again.capture.meta == recording.capture.meta
    assert (again.loss, again.comms, again.processes) == (recording.loss, recording.comms, recording.processes)
    assert again.loss.events == 8


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("max_events", [1, 150, 10_000])
def test_windows_and_row_groups(recording, tmp_path, form, max_events, monkeypatch):
    monkeypatch.setattr(arrow, "WINDOW_ROWS", 100)
    monkeypatch.setattr(arrow, "GROUPED_WINDOWS", 1)
    monkeypatch.setattr(arrow_schema, "WINDOW_ROWS", 100)
    monkeypatch.setattr(arrow, "MIN_GROUP_ROWS", 10)
    monkeypatch.setattr(arrow._Windows.__init__, "__defaults__", (100, 0))
    again = open_recording(save(recording, tmp_path, form))
    assert_same(again.events(), recording.events())
    tables = list(again.iter_events(max_events))
    assert sum(map(len, tables)) == len(recording.events())
    assert np.array_equal(
        np.concatenate([t.field("kvm_exit", "info2") for t in tables]), recording.events().field("kvm_exit", "info2")
    )
    assert all(len(t) <= max(max_events, 100) for t in tables)


def test_row_groups_hold_one_kind_of_one_vcpu_thread(recording, tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "MIN_GROUP_ROWS", 10)
    path = save(recording, tmp_path, "parquet")
    file = pq.ParquetFile(path)

    def ranges(column):
        at = file.schema_arrow.get_field_index(column)
        found = [file.metadata.row_group(i).column(at).statistics for i in range(file.num_row_groups)]
        return [(s.min, s.max) for s in found]

    assert ranges("tid") == [(7, 7), (7, 7), (8, 8), (8, 8), (-1, 1)]
    assert ranges("event")[:4] == [("kvm_entry",) * 2, ("kvm_exit",) * 2] * 2
    again = open_recording(path)
    assert_same(again.events(), recording.events())
    for table in again.iter_events(100):
        assert_same(table, recording.events().take(np.flatnonzero(np.isin(recording.events().ts_ns, table.ts_ns))))


def test_two_threads_may_ask_for_fields_of_one_table(recording, tmp_path):
    events = open_recording(save(recording, tmp_path, "parquet")).events()
    want = recording.events()
    names = [(kind.name, field) for kind in want.kinds if want.count(kind.name) for field in kind.fields]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda name: events.field(*name).tolist(), names * 4))
    assert got == [want.field(*name).tolist() if name[1] != "prev_comm" else got[i] for i, name in enumerate(names * 4)]


def test_what_was_asked_of_one_table_is_read_ahead_in_the_next(recording):
    first, second = recording.events().slice(0, 100), recording.events().slice(100, 200)
    first.field("kvm_exit", "info2")
    assert first.asked_for == [(first.kind_index["kvm_exit"], "info2")]
    second.read_ahead([*first.asked_for, (first.kind_index["kvm_exit"], "not recorded"), (10_000, "no kind")])
    assert second.asked_for == first.asked_for
    assert (
        second.field("kvm_exit", "info2").tolist()
        == recording.events().take(np.arange(100, 200)).field("kvm_exit", "info2").tolist()
    )


@pytest.mark.parametrize("row", [[3, 1, 2], [5, 5, 4], [2**63 - 1, -(2**63), 0], [0, 1, 2], [7, 1, 3]])
def test_recorded_order_also_of_garbage(row):
    numbers = np.array(row, np.int64)
    for parts in ([numbers], [numbers[:1], numbers[1:1], numbers[1:]]):
        places, lowest = arrow_window.recorded_places(parts)
        assert [len(place) for place in places] == [len(part) for part in parts]
        place = np.concatenate(places)
        assert sorted(place.tolist()) == [lowest, lowest + 1, lowest + 2]
    assert np.argsort(place).tolist() == np.argsort(numbers, kind="stable").tolist()


def test_others_read_it(recording, tmp_path):
    path = save(recording, tmp_path, "parquet")
    events = recording.events()
    query = f"""SELECT count(*), max("kvm_exit.info1") FROM read_parquet('{path}') WHERE event = 'kvm_exit'"""
    rows = duckdb.sql(query).fetchall()
    assert rows == [(events.count("kvm_exit"), 2**64 - 1)]
    frame = pd.read_parquet(path).sort_values("row")
    assert frame["ts_ns"].tolist() == events.ts_ns.tolist()
    assert frame["sched_process_exec.filename"].dropna().tolist() == ["/bin/sh"]
    assert frame["sched_process_exec.bytes"].dropna().tolist() == [b"abc"]
    assert frame["sched_switch.prev_comm"].dropna().tolist() == ["qe\ufffdmu"]


def test_csv(recording):
    out = io.BytesIO()
    arrow.write_csv(recording, out)
    frame = pd.read_csv(io.BytesIO(out.getvalue()), low_memory=False)
    assert frame["ts_ns"].tolist() == recording.events().ts_ns.tolist()
    assert frame["event"].value_counts()["kvm_exit"] == recording.events().count("kvm_exit")
    assert frame["sched_process_exec.bytes"].dropna().tolist() == [616263]


@pytest.mark.parametrize("text", ["<u8", "|u1", "|S16", "|S0", "|b1", "|O"])
def test_dtypes_as_text(text):
    assert dtype_text(text_dtype(text)) == text
    assert text_dtype(dtype_text(np.dtype(("u1", (15,))))) == np.dtype(("u1", (15,)))


@pytest.mark.parametrize("text", ["", ",", "u1,", "2|,", "15|u1,u2", "x|u1", "u1\n", "datetime64", "<U4", "object"])
def test_texts_that_are_no_dtypes(text):
    with pytest.raises(ValueError, match=r"dtype|int"):
        text_dtype(text)


@pytest.mark.parametrize("form", WRITERS)
def test_a_recording_without_events(tmp_path, form):
    path = tmp_path / "empty"
    path.write_bytes(TraceDatWriter([b""]).v6())
    again = open_recording(save(open_recording(path), tmp_path, form))
    assert len(again.events()) == 0
    assert list(again.iter_events()) == []


def test_others_parquet_is_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(FormatError, match="written by kvmtrace export"):
        open_recording(path)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("tid", pa.array([1, 2], pa.int64())),
        ("event", pa.array([1, 2])),
        ("kvm_exit.info1", pa.array(["a", "b"])),
        ("row", pa.array([0.5, 1.5])),
        ("sched_switch.prev_comm", pa.array([1, 2])),
    ],
)
def test_columns_of_other_types_are_refused(recording, tmp_path, column, values):
    table = pq.read_table(save(recording, tmp_path, "parquet")).slice(0, 2)
    table = table.set_column(table.schema.get_field_index(column), column, values)
    pq.write_table(table, tmp_path / "other.parquet")
    with pytest.raises(FormatError, match=f"column {column} of"):
        open_recording(tmp_path / "other.parquet")


def test_an_event_without_its_string_is_damage(recording, tmp_path):
    path = save(recording, tmp_path, "parquet")
    table = pq.read_table(path)
    names = pa.nulls(len(table), pa.string())
    pq.write_table(
        table.set_column(table.schema.get_field_index("sched_switch.prev_comm"), "sched_switch.prev_comm", names), path
    )
    events = open_recording(path).events()
    assert events.field("sched_switch", "prev_pid").tolist() == [42]
    with pytest.raises(FormatError, match="without a value"):
        events.field("sched_switch", "prev_comm")


@pytest.mark.parametrize("form", WRITERS)
def test_cut_and_overwritten_files_are_refused_or_read(recording, tmp_path, form):
    data = save(recording, tmp_path, form).read_bytes()
    rng = np.random.default_rng(5)
    damaged = [data[:cut] for cut in range(4, len(data), len(data) // 40)]
    for at in rng.integers(4, len(data) - 8, 60):
        damaged.append(data[:at] + rng.bytes(8) + data[at + 8 :])
    for i, bad in enumerate(damaged):
        path = tmp_path / f"bad{i}"
        path.write_bytes(bad)
        try:
            events = open_recording(path).events()
            for kind in events.kinds:
                for field in kind.fields:
                    events.field(kind.name, field)
        except FormatError as error:
            assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(("kind", "dtype"), [(pa.string(), "S16"), (pa.string(), "S"), (pa.binary(), "O")])
@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("coded", [False, True])
def test_texts_of_sliced_chunks_are_found(kind, dtype, chosen, coded):
    rng = np.random.default_rng(5)
    words = ["", "a", "bc", "é", "kvm-1"]
    for n_chunks in range(4):
        parts = [[words[i] for i in rng.integers(0, len(words), 9)] for _ in range(n_chunks)]
        arrays = [pa.array(part if kind == pa.string() else [w.encode() for w in part], kind) for part in parts]
        if coded:
            arrays = [array.dictionary_encode() for array in arrays]
        column = pa.chunked_array([array.slice(3, 5) for array in arrays], arrays[0].type if arrays else kind)
        expected = [word.encode() for part in parts for word in part[3:8]]
        rows = rng.integers(0, len(expected), 4) if chosen and expected else None
        found = field_values(column, np.dtype(dtype), rows)
        assert [bytes(value) for value in found] == (expected if rows is None else [expected[i] for i in rows])


def test_a_group_without_a_kind_whose_fields_are_partly_told(tmp_path, monkeypatch):
    """A thread's many entries are a group alone."""
    monkeypatch.setattr(arrow, "MIN_GROUP_ROWS", 10)
    lines = [f" v-7 [000] 1.{i:06d}: kvm_entry: vcpu 0, rip 0x1" for i in range(20)]
    lines += [f" v-7 [000] 2.00000{i}: kvm_userspace_exit: reason restart ({i})" for i in range(3)]
    lines += [" v-7 [000] 3.000001: kvm_userspace_exit: reason KVM_EXIT_IO (2)"]
    (tmp_path / "text").write_text("\n".join(lines) + "\n")
    recording = open_recording(tmp_path / "text")
    assert "reason" in recording.partly_told["kvm_userspace_exit"]
    path = save(recording, tmp_path, "parquet")
    assert pq.ParquetFile(path).num_row_groups > 1
    assert_same(open_recording(path).events(), recording.events())


def test_more_columns_than_a_table_should_have_are_refused(tmp_path, monkeypatch):
    lines = [f" v-7 [000] 1.{i:06d}: event_{i}: a={i} b=1" for i in range(60)]
    (tmp_path / "text").write_text("\n".join(lines) + "\n")
    recording = open_recording(tmp_path / "text")
    monkeypatch.setattr(arrow, "USUAL_COLUMNS", 50)
    monkeypatch.setattr(arrow, "MAX_CELLS", 1000)
    again = open_recording(save(recording, tmp_path, "parquet"))
    assert pq.ParquetFile(tmp_path / "exported").num_row_groups > 4
    assert_same(again.events(), recording.events())
    monkeypatch.setattr(arrow_schema, "MAX_COLUMNS", 50)
    with pytest.raises(FormatError, match=r"at most 50 columns to write, found \d+ fields of 60 kinds"):
        save(recording, tmp_path, "arrow")


def test_texts_that_are_no_utf8_are_damage():
    column = pa.chunked_array(
        [pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")])]
    )
    with pytest.raises(ValueError, match="decode"):
        field_values(column, np.dtype("S16"), None)


def test_booleans_of_sliced_chunks_are_their_bits():
    values = [True, False, True, True, False, False, True, False, True, True]
    column = pa.chunked_array([pa.array(values).slice(3), pa.array(values).slice(1, 4), pa.array([], pa.bool_())])
    assert field_values(column, np.dtype(bool), None).tolist() == values[3:] + values[1:5]


def written_again(path, rows=None):
    """Write a Parquet file as other tools do: with its metadata, and with its row groups or others."""
    file = pq.ParquetFile(path)
    groups = [file.read_row_group(i) for i in range(file.num_row_groups)]
    with pq.ParquetWriter(path, file.schema_arrow) as writer:
        for table in groups if rows is None else [pa.concat_tables(groups)]:
            writer.write_table(table, row_group_size=rows or len(table))


def columns_read(recording, monkeypatch):
    """Return the list to which the columns go that are read from now on."""
    read = []
    monkeypatch.setattr(
        recording,
        "_read_groups",
        lambda groups, names, real=recording._read_groups: (read.extend(names), real(groups, names))[1],
    )
    return read


@pytest.mark.parametrize("again", [False, True])
def test_what_all_rows_of_a_row_group_have_is_told_and_not_read(recording, tmp_path, monkeypatch, again):
    monkeypatch.setattr(arrow, "MIN_GROUP_ROWS", 10)
    path = save(recording, tmp_path, "parquet")
    if again:
        written_again(path)
    opened = open_recording(path)
    read = columns_read(opened, monkeypatch)
    events = opened.events()
    assert_same(events, recording.events())
    assert set(events.field("kvm_exit", "info1").tolist()) == {2**64 - 1}
    assert ("kvm_exit.info1" in read) is again
    assert "kvm_exit.info2" in read  # which differs


@pytest.mark.parametrize(("grouped", "bound"), [(False, 100 << 20), (True, 200 << 20)])
def test_what_is_held_of_a_parquet_file_while_it_is_written_is_bounded(tmp_path, grouped, bound):
    """Every field is a column of every row; some windows are in memory at once, of grouped ones only parts."""
    path = tmp_path / "x.parquet"
    with path.open("wb") as out:
        source = open_recording(Path(__file__).parents[2] / "fixtures" / "svm-6.1-smp.dat")
        arrow.write_parquet(source, out, grouped=grouped)
    schema = pq.read_schema(path)
    told = json.loads(schema.metadata[arrow_schema.METADATA_KEY])
    numbers = [field.type for field in schema if pa.types.is_primitive(field.type)]
    assert told["window_rows"] * sum(kind.bit_width // 8 for kind in numbers) <= bound


@pytest.mark.parametrize("rows", [None, 100, 10_000])
@pytest.mark.parametrize("max_events", [100, 1_000])
def test_files_that_other_tools_wrote_again(recording, tmp_path, monkeypatch, rows, max_events):
    for module, name, value in (
        (arrow, "WINDOW_ROWS", 100),
        (arrow, "GROUPED_WINDOWS", 1),
        (arrow_schema, "WINDOW_ROWS", 100),
        (arrow, "MIN_GROUP_ROWS", 10),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(arrow._Windows.__init__, "__defaults__", (100, 0))
    path = save(recording, tmp_path, "parquet")
    written_again(path, rows)
    again, want = open_recording(path), recording.events()
    assert_same(again.events(), want)
    for kind in want.kinds:
        assert again.events().rows(kind.name).tolist() == want.rows(kind.name).tolist()
    tables = list(again.iter_events(max_events))
    assert np.array_equal(np.concatenate([table.ts_ns for table in tables]), want.ts_ns)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"same":{"cpu":0', b'"same":{"cpu":1'),
        (b'"rows":', b'"rowz":'),
        (b"[{", b"{{"),
        (b'"window":0', b'"window":Infinity'),
    ],
)
@pytest.mark.parametrize("checked", [True, False])
def test_damaged_notes_on_row_groups_are_told(recording, tmp_path, old, new, checked):
    path = save(recording, tmp_path, "parquet")
    data = path.read_bytes()
    at = data.index(arrow_groups.MAGIC)
    begin = at - 8 - struct.unpack("<I", data[at - 8 : at - 4])[0]
    text = data[begin : at - 8].replace(old, new)
    checksum = zlib.crc32(text) if checked else zlib.crc32(data[begin : at - 8])
    path.write_bytes(data[:begin] + text + struct.pack("<II", len(text), checksum) + data[at:])
    if old in data[begin:at] and not (checked and b"cpu" in old):
        with pytest.raises(FormatError, match="written by kvmtrace export"):
            open_recording(path)


@pytest.mark.parametrize(
    ("value", "dtype", "found"),
    [
        (0, "u1", 0),
        (255, "u1", 255),
        (256, "u1", None),
        (-1, "u8", None),
        (2**64 - 1, "u8", 2**64 - 1),
        ("1", "u8", None),
        (-(2**31), "i4", -(2**31)),
        (2**31, "i4", None),
        (1, "?", 1),
        (2, "?", None),
        (True, "?", None),
        (None, "u8", None),
    ],
)
def test_told_values_count_only_where_a_column_can_hold_them(value, dtype, found):
    assert arrow_groups.value_of(value, np.dtype(dtype)) == found
    assert arrow_groups.value_of(-1, np.dtype("i2"), -1) == -1
    assert arrow_groups.value_of(-2, np.dtype("i2"), -1) is None


def test_what_was_asked_of_one_window_is_read_with_the_next(recording, tmp_path, monkeypatch):
    for module, name, value in (
        (arrow, "WINDOW_ROWS", 100),
        (arrow, "GROUPED_WINDOWS", 1),
        (arrow_schema, "WINDOW_ROWS", 100),
        (arrow, "MIN_GROUP_ROWS", 10),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(arrow._Windows.__init__, "__defaults__", (100, 0))
    again = open_recording(save(recording, tmp_path, "parquet"))
    read = columns_read(again, monkeypatch)
    tables = again.iter_events(100)
    first = next(tables)
    expected = [first.field("kvm_exit", name).tolist() for name in ("info2", "guest_rip")]
    assert read[-2:] == ["kvm_exit.info2", "kvm_exit.guest_rip"]
    second = next(tables)
    assert set(read[-2:]) == {"kvm_exit.info2", "kvm_exit.guest_rip"}
    n_read = len(read)
    found = [second.field("kvm_exit", name).tolist() for name in ("info2", "guest_rip")]
    assert len(read) == n_read
    whole = [recording.events().field("kvm_exit", name).tolist() for name in ("info2", "guest_rip")]
    assert [a + b for a, b in zip(expected, found, strict=True)] == [
        values[: len(a) + len(b)] for values, a, b in zip(whole, expected, found, strict=True)
    ]


def test_parquet_is_in_the_order_of_time_unless_grouped(tmp_path, monkeypatch):
    recording = open_recording(Path(__file__).parents[2] / "fixtures" / "svm-6.1-lifecycle.dat")
    monkeypatch.setattr(arrow, "MIN_GROUP_ROWS", 10)
    for grouped in (False, True):
        with (tmp_path / "x.parquet").open("wb") as out:
            arrow.write_parquet(recording, out, grouped=grouped)
        frame = pd.read_parquet(tmp_path / "x.parquet")
        assert frame.ts_ns.is_monotonic_increasing != grouped
        assert (frame.row.to_numpy() == np.arange(len(frame))).all() != grouped
        again = open_recording(tmp_path / "x.parquet")
        assert (again.events().ts_ns == recording.events().ts_ns).all()
