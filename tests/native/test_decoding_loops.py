"""The compiled loops of the decoders give what their NumPy twins give, whatever the bytes are."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import oracle_records
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import both
from writers.perf_data import (
    CALLCHAIN,
    LOST_SAMPLES,
    RAW,
    USUAL,
    PerfDataWriter,
    comm,
    finished_round,
    lost,
    sample,
    sample_id,
)
from writers.perf_data import record as perf_record
from writers.ring_buffer import discarded, event, null_padding, page, record, time_extend, time_stamp

from kvmtrace._native.perf_samples import PerfSamples, mark_copies, read_perf_records
from kvmtrace._native.ring_records import RecordColumns, count_records, fill_records
from kvmtrace.check.engine import check_recording as check_model
from kvmtrace.errors import FormatError
from kvmtrace.formats import open_recording
from kvmtrace.formats.trace_dat.ring_buffer import as_words, decode_pages, read_page_headers
from kvmtrace.table.format_text import PageLayout, parse_event_format
from kvmtrace.table.gather import gather_field, gather_fields
from kvmtrace.table.merge import Rows

FIXTURES = Path(__file__).parents[2] / "fixtures"
LAYOUT = PageLayout()
KIND_OF_ID = np.arange(65536, dtype=np.uint16)[::-1].copy()
PIECES = st.one_of(
    st.builds(record, st.binary(min_size=8, max_size=200), st.integers(0, 1 << 40)),
    st.builds(record, st.just(event(7)), st.integers(0, 3)),
    st.builds(time_extend, st.integers(0, 1 << 50)),
    st.builds(time_stamp, st.integers(0, 1 << 58)),
    st.builds(discarded, st.integers(1, 20), st.integers(1, 9)),
    st.just(null_padding()),
    st.binary(min_size=4, max_size=40).map(lambda b: b[: len(b) // 4 * 4]),
)


def check_pages(data: bytes) -> None:
    words = as_words(data)
    at = np.arange(len(data) // 4096, dtype=np.int64) * 1024
    compiled, plain = both(lambda: decode_pages(words, at, read_page_headers(words, at, LAYOUT), LAYOUT, KIND_OF_ID))
    for name in ("start", "ts", "page_counts", "damage"):
        np.testing.assert_array_equal(getattr(compiled, name), getattr(plain, name), name)
    for name in ("kind", "irq_flags", "preempt_count", "tid"):
        of_compiled, of_plain = getattr(compiled.columns, name), getattr(plain.columns, name)
        assert of_compiled.dtype == of_plain.dtype
        np.testing.assert_array_equal(of_compiled, of_plain, name)


@given(st.lists(st.lists(PIECES, max_size=25), min_size=1, max_size=3), st.integers(0, 1 << 63))
@settings(max_examples=150, deadline=None)
def test_pages_of_any_records(pages, ts):
    check_pages(b"".join(page(ts + i, pieces) for i, pieces in enumerate(pages)))


@given(st.binary(min_size=4080, max_size=4080), st.integers(0, 4080), st.integers(0, (1 << 32) - 1))
@settings(max_examples=100, deadline=None)
def test_pages_of_any_bytes(body, commit, damaged):
    check_pages(struct.pack("<QQ", 1000, commit) + body + struct.pack("<QQ", 2000, damaged) + body[::-1])


FORMAT = """name: any
ID: 7
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:u8 a;\toffset:9;\tsize:1;\tsigned:0;
\tfield:u16 b;\toffset:10;\tsize:2;\tsigned:0;
\tfield:int c;\toffset:12;\tsize:4;\tsigned:1;
\tfield:unsigned long d;\toffset:16;\tsize:8;\tsigned:0;
\tfield:u64 e;\toffset:18;\tsize:8;\tsigned:0;
\tfield:u8 f[15];\toffset:26;\tsize:15;\tsigned:0;
\tfield:__data_loc char[] g;\toffset:12;\tsize:4;\tsigned:0;
\tfield:__rel_loc char[] h;\toffset:16;\tsize:4;\tsigned:0;
\tfield:char i[8];\toffset:41;\tsize:8;\tsigned:0;
"""
FIELDS = parse_event_format(FORMAT, "kvm").fields


@given(
    st.binary(min_size=4, max_size=400),
    st.lists(st.integers(0, 110), max_size=30),
    st.sampled_from(sorted(FIELDS)),
    st.sampled_from([np.uint32, np.int64]),
)
@settings(max_examples=300, deadline=None)
def test_fields_also_beyond_the_end(data, starts, name, dtype):
    words = as_words(data)
    start = np.array(starts, dtype)
    compiled, plain = both(lambda: gather_field(words, start, FIELDS[name]))
    assert compiled.dtype == plain.dtype
    np.testing.assert_array_equal(compiled, plain)


@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
@pytest.mark.parametrize("name", sorted(FIELDS))
def test_fields_at_every_place_around_the_end(name, dtype):
    start = np.arange(0, 60, dtype=dtype)
    compiled, plain = both(lambda: gather_field(as_words(bytes(range(1, 181))), start, FIELDS[name]))
    np.testing.assert_array_equal(compiled, plain)


def tables(path: Path):
    def read():
        recording = open_recording(path)
        table = recording.events()
        columns = {name: getattr(table, name) for name in ("ts_ns", "cpu", "tid", "kind", "irq_flags", "preempt_count")}
        fields = {(kind.name, field): table.field(kind.name, field) for kind in table.kinds for field in kind.fields}
        return columns | fields, recording.loss

    return both(read)


def check_recording(path: Path) -> None:
    (compiled, compiled_loss), (plain, plain_loss) = tables(path)
    assert compiled.keys() == plain.keys()
    for name, values in plain.items():
        np.testing.assert_array_equal(compiled[name], values, str(name))
    assert compiled_loss == plain_loss


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.dat")), ids=lambda path: path.stem)
def test_fixtures(path):
    check_recording(path)
    compiled, plain = both(lambda: check_model(open_recording(path)))
    assert compiled == plain


SAMPLES = st.builds(
    sample,
    st.integers(0, 1 << 40),
    st.binary(max_size=60),
    tid=st.integers(-5, 70_000),
    cpu=st.sampled_from([0, 1, 9, 32767, 32768, 1 << 17]),
    ident=st.integers(0, 5),
)
CHAINED = st.builds(
    sample,
    st.integers(0, 1 << 40),
    st.binary(max_size=60),
    ident=st.just(2),
    sample_type=st.just(USUAL | CALLCHAIN),
    chain=st.integers(0, 5),
)
WITHOUT_RAW = st.builds(
    sample, st.integers(0, 1 << 40), st.just(b""), ident=st.just(1), sample_type=st.just(USUAL & ~RAW)
)
RECORDS = st.one_of(
    SAMPLES,
    SAMPLES,
    CHAINED,
    WITHOUT_RAW,
    st.just(finished_round()),
    st.builds(lost, st.integers(0, 9), st.integers(0, 1 << 40), st.integers(0, 3)),
    st.just(comm(5, 6, "name")),
    st.just(perf_record(LOST_SAMPLES, struct.pack("<Q", 3) + sample_id(7, 1))),
    st.builds(perf_record, st.sampled_from([3, 7, 10, 70]), st.binary(min_size=16, max_size=30)),
)


@given(st.lists(RECORDS, max_size=60), st.binary(max_size=24))
@settings(max_examples=150, deadline=None)
def test_perf_records_of_any_kind(tmp_path_factory, records, rest):
    path = tmp_path_factory.mktemp("perf") / "perf.data"
    path.write_bytes(
        PerfDataWriter(
            [*records, rest], attrs=[(10, USUAL, [1]), (11, USUAL | CALLCHAIN, [2]), (11, USUAL & ~RAW, [3])]
        ).bytes()
    )
    check_recording(path)


def test_a_file_that_is_changed_while_it_is_read_is_refused():
    """What was counted bounds what is written, whatever the records have become since."""
    words = as_words(bytearray(page(1000, [record(event(7), 1)] * 9)))
    first, end = np.array([4]), np.array([4 + 9 * 3])
    counts, _ = count_records(words, first, end)
    assert counts.tolist() == [9]
    for n in (8, 10):  # more than there was room for, or less
        columns = RecordColumns.empty(n, np.dtype(np.uint32))
        with pytest.raises(FormatError, match="nobody writes to"):
            fill_records(words, first, end, np.array([1000], np.uint64), kind_of_id=KIND_OF_ID, out=columns)


def test_samples_for_which_there_is_no_room_are_refused():
    """Nothing is written beyond what there is, whatever the records are."""
    words = np.frombuffer(sample(1, b"raw data") * 9, np.uint64)
    layouts = PerfSamples(np.array([[1, -1, 2, -1]]), np.empty(0, np.uint64), np.empty(0, np.int32))

    def room(_most):
        return RecordColumns.empty(8, np.dtype(np.uint32)), np.empty(8, np.int16)

    with pytest.raises(FormatError, match="nobody writes to"):
        read_perf_records(words, (0, len(words), len(words)), layouts, KIND_OF_ID, room)


PERF_ROWS = st.tuples(st.integers(0, 3), st.integers(-1, 1), st.integers(5, 6), st.integers(0, 2), st.integers(0, 45))


@pytest.mark.parametrize("start_dtype", [np.uint32, np.int64])
@given(st.lists(PERF_ROWS, max_size=60), st.lists(st.sampled_from([0, 4, 9, 0xFFFFFFFF]), min_size=0, max_size=40))
@settings(max_examples=200, deadline=None)
def test_copies_of_samples(start_dtype, rows, words):
    ts, cpu, tid, kind, start = (
        (list(c) for c in zip(*sorted(rows, key=lambda r: r[0]), strict=True)) if rows else [[]] * 5
    )
    nothing = np.zeros(len(ts), np.uint8)
    columns = Rows(
        np.array(ts, np.int64),
        np.array(cpu, np.int16),
        np.array(tid, np.int32),
        np.array(kind, np.uint16),
        nothing,
        nothing,
        np.array(start, start_dtype),
    )
    buffer = np.array(words, np.uint32)
    order = np.argsort(columns.ts_ns, kind="stable")
    copied, same = mark_copies(buffer, columns, order, 2)
    wanted, n_same = oracle_records.mark_copies(buffer, columns, order, 2)
    assert (copied.tolist(), same) == (wanted.tolist(), n_same)


@given(
    st.binary(max_size=120).map(lambda data: data + b"\0" * (-len(data) % 4)),
    st.lists(st.integers(0, 40), max_size=12),
    st.lists(st.sampled_from(sorted(FIELDS)), max_size=8, unique=True),
    st.sampled_from([np.uint32, np.int64]),
)
@settings(max_examples=300, deadline=None)
def test_fields_read_together(data, starts, names, dtype):
    words, start = np.frombuffer(data, "<u4"), np.array(starts, dtype)
    fields = [FIELDS[name] for name in names]
    for field, found in zip(fields, gather_fields(words, start, fields), strict=True):
        alone = gather_field(words, start, field)
        assert found.dtype == alone.dtype
        np.testing.assert_array_equal(found, alone)
