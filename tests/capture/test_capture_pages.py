"""Counting the events of ring-buffer pages, on hand-made pages and on what the decoder makes of real ones."""

from __future__ import annotations

import struct

from kvmtrace.capture.ftrace.raw_pages import (
    MISSED_EVENTS,
    count_events,
    cut_page,
    cut_tail,
    iter_events,
    mark_gap,
    page_time,
)

PAGE = 4096


def page(*parts: bytes, time_ns: int = 77, commit: int | None = None) -> bytes:
    data = b"".join(parts)
    return (struct.pack("<QQ", time_ns, len(data) if commit is None else commit) + data).ljust(PAGE, b"\0")


def event(words: int) -> bytes:
    return struct.pack("<I", words | 5 << 5) + b"x" * 4 * words


LONG = struct.pack("<II", 0, 4 + 200) + b"y" * 200
EXTEND = struct.pack("<II", 30 | 9 << 5, 1)
STAMP = struct.pack("<II", 31 | 9 << 5, 1)
DISCARDED = struct.pack("<II", 29 | 1 << 5, 4 + 16) + b"z" * 16
REST_EMPTY = struct.pack("<I", 29)


def test_counts_events_of_every_size() -> None:
    assert count_events(page()) == 0
    assert count_events(page(event(1), event(28), LONG, event(3))) == 4


def test_time_extends_and_discarded_events_are_no_events() -> None:
    assert count_events(page(EXTEND, event(2), DISCARDED, STAMP, event(2))) == 2


def test_padding_ends_the_page() -> None:
    assert count_events(page(event(2), REST_EMPTY, event(2))) == 1


def test_flags_in_commit_do_not_count_as_length() -> None:
    body = event(2) + event(4)
    assert count_events(page(body, commit=len(body) | MISSED_EVENTS | 1 << 30)) == 2


def test_damaged_lengths_end() -> None:
    assert count_events(page(struct.pack("<II", 0, 0xFFFFFFFF), commit=4080)) == 1
    assert count_events(page(event(2), commit=1 << 26)[:64]) <= 13  # zero lengths must not loop for ever


def test_mark_gap_changes_one_bit() -> None:
    before = page(event(2), time_ns=12345)
    after = mark_gap(before)
    assert page_time(after) == page_time(before) == 12345
    assert count_events(after) == 1
    assert sum((a ^ b).bit_count() for a, b in zip(before, after, strict=True)) == 1


def times(data: bytes) -> list[int]:
    return [now for _, now in iter_events(data)]


def test_times() -> None:
    # each event is 5 ns later; an extend adds 1 << 27 and 9, a stamp replaces
    assert times(page(event(1), EXTEND, event(2))) == [82, 82 + (1 << 27) + 9 + 5]
    assert times(page(event(1), STAMP, event(2))) == [82, (1 << 27) + 9 + 5]
    assert times(page(DISCARDED, event(1), time_ns=100)) == [100 + 1 + 5]


def test_cutting_at_every_time_keeps_the_rest_as_it_was() -> None:
    whole = page(event(1), LONG, EXTEND, event(3), DISCARDED, event(28), STAMP, event(2), time_ns=1 << 20)
    all_times = times(whole)
    for start in sorted(all_times):
        rest, gone = cut_page(whole, start)
        assert gone + count_events(rest) == len(all_times)
        assert times(rest) == all_times[gone:]
        assert gone == next(i for i, now in enumerate(all_times) if now >= start)
        assert len(rest) == PAGE
    assert cut_page(whole, max(all_times) + 1) == (b"", len(all_times))


def test_cutting_the_tail_at_every_time_keeps_the_beginning() -> None:
    whole = page(event(1), LONG, EXTEND, event(3), DISCARDED, event(28), time_ns=1 << 20)
    all_times = times(whole)
    for end in all_times:
        rest, gone = cut_tail(whole, end)
        assert times(rest or page()) == [now for now in all_times if now < end]
        assert gone == sum(now >= end for now in all_times)
    assert cut_tail(whole, all_times[-1] + 1) == (whole, 0)


def test_cutting_the_tail_keeps_the_mark_of_a_gap() -> None:
    whole = mark_gap(page(event(1), event(2)))
    rest, _ = cut_tail(whole, times(whole)[1])
    assert struct.unpack_from("<Q", rest, 8)[0] & MISSED_EVENTS
    assert count_events(rest) == 1
