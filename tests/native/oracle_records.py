"""What the decoders' compiled loops must give, by NumPy: many passes over all records instead of one."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from kvmtrace._native.perf_samples import PerfWindow
from kvmtrace._native.ring_records import Overrun, RecordColumns

TYPE_PADDING, TYPE_TIME_EXTEND, TYPE_TIME_STAMP = 29, 30, 31
TS_SHIFT = 27  # bits of a time delta
TS_MSB = np.uint64(0xF8 << 56)  # absolute stamps lack these bits: they are the page's
SMALLEST_BIG_BYTES = 8  # of a big record: its length word, which counts itself, and one more
RECORD_SAMPLE = 9
MAX_CHAIN, MAX_CPU = 1 << 16, 32767

# words from record to record by type_len; 0: look at the record (big records, padding)
STEP = np.array([0, *range(2, 30), 0, 2, 2], np.int64)


def odd_steps(words, pos, heads, left):
    """Return the words that big records (type_len 0) and padding occupy; `left` to the end of the page.

    The word behind the head is a length in bytes; of a big record it counts itself.
    """
    length = words.take(pos + 1, mode="clip").astype(np.int64)
    step = 1 + (length + 3) // 4
    padding = heads & 31 == TYPE_PADDING
    # padding without a time delta is the rest of the page; a big record that holds nothing is none
    step = np.where(padding & (heads >> 5 == 0), left, step)
    return np.where(~padding & (length < SMALLEST_BIG_BYTES), left + 1, step)


def walk(words, first, end):
    """Follow the records of all pages in lockstep; return (positions (steps, pages), which are records, overruns).

    Every step advances each unfinished page by at least one word, so it ends after at most a page's words.
    """
    pos, steps, overruns = first.copy(), [], []
    while (pos < end).any():
        live = pos < end
        steps.append(pos)
        heads = words.take(pos, mode="clip")
        step = STEP.take(heads & 31) * live
        odd = np.flatnonzero(live & (step == 0))
        step[odd] = odd_steps(words, pos[odd], heads[odd], end[odd] - pos[odd])
        pos = pos + step
        for page in np.flatnonzero(pos > end):
            overruns.append(Overrun(int(page), int(steps[-1][page]), int(pos[page])))
            end[page] = steps[-1][page]
        np.minimum(pos, end, out=pos)
    table = np.array(steps) if steps else np.empty((0, len(first)), np.int64)
    return table, table < end, sorted(overruns, key=lambda overrun: overrun.page)


def time_stamps(words, at, heads, counts, page_ts):
    """Return the time stamp at every record: the page's, plus the deltas so far, or the last absolute one."""
    types = heads & 31
    delta = (heads >> 5).astype(np.uint64)
    long = np.flatnonzero(types >= TYPE_TIME_EXTEND)
    delta[long] += words.take(at[long] + 1, mode="clip").astype(np.uint64) << np.uint64(TS_SHIFT)
    begins = np.cumsum(counts) - counts  # of each page; pages without records share their successor's
    absolute = np.flatnonzero(types == TYPE_TIME_STAMP)
    some = counts > 0
    page_of = np.repeat(page_ts, counts)
    segment = np.union1d(begins[some], absolute)
    is_absolute = np.isin(segment, absolute, assume_unique=True)
    start_ts = np.where(is_absolute, delta[segment] | (page_of[segment] & TS_MSB), page_of[segment])
    delta[absolute] = 0
    total = np.cumsum(delta)
    base = start_ts - (total[segment] - delta[segment])
    total += np.repeat(base, np.diff(np.append(segment, len(at))))
    return total


def common_columns(words, start, ts, kind_of_id):
    """Return columns with what each event of ftrace begins with."""
    n = 0 if kind_of_id is None else len(start)
    first = words.take(start[:n].astype(np.int64), mode="clip")
    tid = words.take(start[:n].astype(np.int64) + 1, mode="clip").view(np.int32)
    kinds = np.empty(0, np.uint16) if kind_of_id is None else kind_of_id[first & 0xFFFF]
    return RecordColumns(start, ts, kinds, (first >> 16).astype(np.uint8), (first >> 24).astype(np.uint8), tid)


def decode_records(words, span, page_ts, kind_of_id, start_dtype):
    """See kvmtrace._native.ring_records.decode_records."""
    table, valid, overruns = walk(words, span[0], span[1].copy())
    counts = valid.sum(axis=0)
    at = table.T[valid.T]
    heads = words[at]
    ts = time_stamps(words, at, heads, counts, page_ts)
    types = heads & 31
    data = types < TYPE_PADDING
    start = (at + 1 + (types == 0))[data].astype(start_dtype)
    totals = np.concatenate(([0], np.cumsum(data)))
    ends = np.cumsum(counts)
    return common_columns(words, start, ts[data], kind_of_id), totals[ends] - totals[ends - counts], overruns


def gather(words, start, offset, size, *, unit=4, by_word=False):
    """See kvmtrace._native.field_bytes.gather."""
    if not len(start) or not size or not len(words):
        return np.zeros((len(start), size), np.uint8)
    at = start.astype(np.int64) * unit + offset
    if by_word:
        assert size % 4 == 0
        found = words.take(at[:, None] // 4 + np.arange(size // 4), mode="clip")
        return np.ascontiguousarray(found).view(np.uint8)
    return words.view(np.uint8).take(at[:, None] + np.arange(size), mode="clip")


def walk_perf_records(words, first, last, end):
    """Return the word index of each record that begins in first..last, where the walk ended and whether soundly."""
    at, found = first, []
    while at < last:
        size = int(words[at]) >> 48
        if size < 8 or size % 8 or at + size // 8 > end:
            return np.array(found, np.int64), at, False
        found.append(at)
        at += size // 8
    return np.array(found, np.int64), at, True


def read_perf_records(words, bounds, samples, kind_of_id, room):
    """See kvmtrace._native.perf_samples.read_perf_records."""
    at, stop, sound = walk_perf_records(words, *bounds)
    heads = words[at]
    is_sample = heads.astype(np.uint32) == RECORD_SAMPLE
    others, at = at[~is_sample], at[is_sample]
    layout = np.full(len(at), -1) if not len(samples.layouts) else np.zeros(len(at), np.int64)
    if len(samples.ids):
        of_id = dict(zip(samples.ids.tolist(), samples.layout_of_id.tolist(), strict=True))
        layout = np.array([of_id.get(i, -1) for i in words.take(at + 1, mode="clip").tolist()], np.int64)
    at, layout = at[layout >= 0], layout[layout >= 0]
    time, cpu, raw, chain = samples.layouts[layout].T if len(layout) else np.empty((4, 0), np.int64)
    lengths = np.minimum(words.take(at + chain, mode="clip"), np.uint64(MAX_CHAIN)).astype(np.int64)
    raw = at + raw + np.where(chain >= 0, lengths, 0)
    inside = raw < at + (words[at] >> np.uint64(51)).astype(np.int64)
    at, raw, time, cpu = at[inside], raw[inside], time[inside], cpu[inside]
    numbers = words.take(at + np.maximum(cpu, 0), mode="clip").astype(np.uint32)
    cpus = np.where((cpu >= 0) & (numbers <= MAX_CPU), numbers, -1).astype(np.int16)
    out, cpu_out = room(len(at))
    start = (raw * 2 + 1).astype(out.start.dtype)
    columns = common_columns(words.view(np.uint32), start, words.take(at + time, mode="clip"), kind_of_id)
    for field in fields(RecordColumns):
        getattr(out, field.name)[: len(getattr(columns, field.name))] = getattr(columns, field.name)
    cpu_out[: len(cpus)] = cpus
    return PerfWindow(out, cpu_out[: len(cpus)], others, stop, sound)


def mark_copies(words, rows, order, lost):
    """See kvmtrace._native.perf_samples.mark_copies: the rows of one moment, each beside all earlier ones."""
    rows = rows.take(order)
    columns = zip(rows.ts_ns.tolist(), rows.cpu.tolist(), rows.tid.tolist(), rows.kind.tolist(), strict=True)
    copy, same, moments, seen = [], 0, set(), set()
    for (ts, cpu, tid, kind), start in zip(columns, rows.start.tolist(), strict=True):
        same += (ts, cpu) in moments
        moments.add((ts, cpu))
        size = min(int(words[min(max(start - 1, 0), len(words) - 1)]), 1 << 16) // 4 if len(words) else 0
        content = (ts, cpu, tid, kind, words[max(start - 1, 0) : max(start + size, 0)].tobytes())
        copy.append(kind != lost and content in seen)
        seen.add(content if kind != lost else None)
    return np.array(copy, bool), same
