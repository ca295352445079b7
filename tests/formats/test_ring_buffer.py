"""Ring-buffer pages: every record type, damage, and the fast decoder against a slow one."""

from __future__ import annotations

import struct

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from writers.ring_buffer import discarded, event, null_padding, page, record, time_extend, time_stamp
from writers.scalar_pages import decode_page

from kvmtrace.formats.trace_dat.ring_buffer import as_words, decode_pages, read_page_headers
from kvmtrace.table.format_text import PageLayout

LAYOUT = PageLayout()


def decode(*pages: bytes):
    words = as_words(b"".join(pages))
    at = np.arange(len(pages), dtype=np.int64) * 1024
    headers = read_page_headers(words, at, LAYOUT)
    return headers, decode_pages(words, at, headers, LAYOUT)


def stamps(*pages: bytes) -> list[int]:
    return decode(*pages)[1].ts.tolist()


def test_deltas_add_up_from_the_page_stamp():
    data = event(10)
    assert stamps(page(1000, [record(data), record(data, 5), record(data, 7)])) == [1000, 1005, 1012]


def test_a_long_delta_is_a_time_extend_of_its_own():
    assert stamps(page(0, [record(event(1), (1 << 40) + 3)])) == [(1 << 40) + 3]


def test_time_extend_takes_in_both_words():
    assert stamps(page(1, [time_extend((5 << 27) + 9), record(event(1), 2)])) == [(5 << 27) + 12]


def test_absolute_stamp_replaces_the_running_time_and_keeps_the_page_s_high_bits():
    high = 0x28 << 56
    got = stamps(page(high + 50, [record(event(1)), time_stamp(9000), record(event(1), 3), record(event(1), 4)]))
    assert got == [high + 50, high + 9003, high + 9007]


def test_absolute_stamp_may_step_back():
    assert stamps(page(500, [record(event(1), 9), time_stamp(400), record(event(1), 1)])) == [509, 401]


def test_two_absolute_stamps_and_another_page():
    first = page(10, [time_stamp(100), record(event(1), 1), time_stamp(200), record(event(1), 2)])
    assert stamps(first, page(300, [record(event(1), 3)])) == [101, 202, 303]


def test_discarded_events_are_left_out_but_their_time_passes():
    assert stamps(page(0, [record(event(1), 1), discarded(12, 6), record(event(1), 2)])) == [1, 9]


def test_padding_without_a_delta_ends_the_page():
    data = page(0, [record(event(1), 1), null_padding(), bytes(40)])
    assert stamps(data) == [1]


def test_big_records_lead_with_their_length():
    data = event(1, bytes(range(200)))
    _, records = decode(page(7, [record(data), record(event(2), 1)]))
    assert records.start.tolist() == [6, 6 + 52 + 1]


def test_big_record_of_odd_length_is_rounded_up():
    odd = struct.pack("<II", 0, 4 + 9) + bytes(12)
    assert stamps(page(7, [odd, record(event(2), 1)])) == [7, 8]


def test_pages_without_records():
    headers, records = decode(page(5, []), page(6, [record(event(1))]), page(7, []))
    assert records.page_counts.tolist() == [0, 1, 0]
    assert records.ts.tolist() == [6]
    assert headers.size.tolist() == [0, 12, 0]


def test_lost_events_with_and_without_their_number():
    headers, _ = decode(page(1, [record(event(1))], lost=123456), page(2, [], lost=-1), page(3, []))
    assert headers.lost.tolist() == [123456, -1, 0]


def test_a_number_that_does_not_fit_behind_the_records_is_unknown():
    full = bytearray(page(1, [record(event(1))]))
    struct.pack_into("<Q", full, 8, 4080 | 1 << 31 | 1 << 30)
    headers, _ = decode(bytes(full))
    assert headers.lost.tolist() == [-1]


def test_an_impossible_commit_word_loses_that_page_only():
    bad = bytearray(page(1, [record(event(1))]))
    struct.pack_into("<Q", bad, 8, 5000)
    _, records = decode(bytes(bad), page(9, [record(event(1))]))
    assert records.ts.tolist() == [9]
    assert [(d.page, d.expected) for d in records.damage] == [(0, "a commit of at most 4080 bytes")]


def test_a_record_beyond_the_commit_ends_its_page():
    bad = bytearray(page(1, [record(event(1)), record(event(1, bytes(40)))]))
    struct.pack_into("<Q", bad, 8, 24)
    _, records = decode(bytes(bad), page(9, [record(event(1))]))
    assert records.ts.tolist() == [1, 9]
    assert [(d.page, d.word) for d in records.damage] == [(0, 7)]


def test_a_big_record_with_a_huge_length_is_damage():
    _, records = decode(page(1, [record(event(1)), struct.pack("<II", 0, 0xFFFFFFFF)]))
    assert records.ts.tolist() == [1]
    assert len(records.damage) == 1


def test_a_page_of_zeros_is_a_hole_in_the_file():
    _, records = decode(page(1, [record(event(1))]), bytes(4096), page(9, [record(event(2))]))
    assert records.ts.tolist() == [1, 9]
    assert [(d.page, d.found) for d in records.damage] == [(1, "a page of zeros")]


payloads = st.integers(0, 300).map(lambda n: event(3, bytes(n)))
deltas = st.one_of(st.integers(0, 100), st.integers(0, 1 << 45))
records_of_a_page = st.lists(
    st.one_of(
        st.builds(record, payloads, deltas),
        st.builds(record, payloads, st.integers(0, 9), big=st.just(True)),
        st.builds(time_stamp, st.integers(0, (1 << 59) - 1)),
        st.builds(discarded, st.integers(1, 30).map(lambda n: 4 * n), st.integers(1, 99)),
    ),
    max_size=40,
)


def fitting(records: list[bytes]) -> list[bytes]:
    out: list[bytes] = []
    for r in records:
        if sum(map(len, out)) + len(r) <= 4080:
            out.append(r)
    return out


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, (1 << 64) - 1), records_of_a_page), min_size=1, max_size=5))
def test_lockstep_equals_record_by_record(content):
    pages = [page(ts, fitting(records)) for ts, records in content]
    _, got = decode(*pages)
    want = [(ts, i * 1024 + at // 4) for i, p in enumerate(pages) for ts, at in decode_page(p)]
    assert list(zip(got.ts.tolist(), got.start.tolist(), strict=True)) == want
    assert not got.damage


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.binary(max_size=400), st.integers(0, (1 << 32) - 1) | st.none()), min_size=1, max_size=3))
def test_garbage_pages_neither_fail_nor_hang(content):
    pages = []
    for data, commit in content:
        head = struct.pack("<QQ", 5, len(data) & ~3 if commit is None else commit)
        pages.append((head + data).ljust(4096, data[:1] or b"\0"))
    _, got = decode(*pages)
    assert len(got.ts) == len(got.start) == got.page_counts.sum()
