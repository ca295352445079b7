"""What the compiled loops over threads, kinds and the model's states must give, by NumPy."""

from __future__ import annotations

import numpy as np

from kvmtrace._native.automaton import SegmentColumns
from kvmtrace._native.thread_rows import TrackedRows


def tracked(columns, tids):
    """See kvmtrace._native.thread_rows.tracked."""
    numbers = np.zeros(len(columns.tid), np.uint16)
    for i, tid in enumerate(tids.tolist()):
        numbers[columns.tid == tid] = i + 1
    row = np.flatnonzero((numbers > 0) & (columns.cls > 0))
    row = row[np.argsort(numbers[row], kind="stable")]
    found = TrackedRows(row, columns.cls[row], numbers[row] - np.uint16(1), columns.ts_ns[row], columns.cpu[row])
    return found, int(np.count_nonzero(numbers))


def rows_by_kind(kind, n_kinds):
    """See kvmtrace._native.thread_rows.rows_by_kind."""
    counts = np.bincount(kind, minlength=n_kinds)
    if len(counts) > n_kinds:
        raise ValueError("none of the kinds")
    order = np.argsort(kind, kind="stable")
    begin = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    position = np.empty(len(kind), np.intp)
    position[order] = np.arange(len(kind)) - np.repeat(begin[:-1], counts)
    return order, begin, position


def latest_wanted(wanted, thread):
    """See kvmtrace._native.thread_rows.latest_wanted."""
    begins = np.concatenate([np.ones(min(len(thread), 1), bool), thread[1:] != thread[:-1]])
    rows = np.arange(len(wanted))
    latest = np.maximum.accumulate(np.where(wanted, rows, -1)) if len(rows) else rows
    first = np.maximum.accumulate(np.where(begins, rows, 0)) if len(rows) else rows
    return np.where(latest >= first, latest, -1).astype(np.int32)


def take_steps(known, next_state, verdict, unknown):
    """See kvmtrace._native.automaton.take_steps."""
    n, n_steps = len(known.cls), len(next_state) - 1
    is_step = (known.cls <= n_steps) & (known.cls > 0)
    position = np.flatnonzero(is_step)
    reset = known.first | known.broken
    # marks: events after which the state is known anew; the last mark before an event decides
    mark = np.where(is_step, next_state[np.minimum(known.cls, n_steps)], unknown)
    last = np.arange(n)
    last[~(is_step | reset)] = 0
    np.maximum.accumulate(last, out=last)
    state = np.full(n, unknown, np.uint8)
    state[1:] = mark[last[:-1]]
    state[reset] = unknown
    before = state[position]
    return position, before, verdict[before, known.cls[position]], state


def cut_segments(known, boundaries):
    """See kvmtrace._native.automaton.cut_segments."""
    cls = known.cls
    boundary = np.isin(cls, boundaries)
    opens = boundary | known.first | known.broken
    start = np.flatnonzero(opens)
    kind = np.where(boundary[start], cls[start], 0).astype(np.uint8)
    of = np.cumsum(opens) - 1
    if not len(start):
        return SegmentColumns(of, start, kind, np.empty(0, np.uint64), np.empty(0, bool))
    bits = np.left_shift(np.uint64(1), cls.astype(np.uint64))
    bits[start[boundary[start]]] = 0
    linked = np.zeros(len(start), bool)
    linked[:-1] = ~(known.first | known.broken)[start[1:]]
    return SegmentColumns(of, start, kind, np.bitwise_or.reduceat(bits, start), linked)


def bucket_of(dur_ns, sub_bits):
    """Return the log-linear bucket of each duration (negative ones count as 0)."""
    value = np.maximum(dur_ns, 0)
    octave = (value.astype(np.float64).view(np.int64) >> 52) - 1023  # the exponent: floor(log2), negative for 0
    shift = np.maximum(octave - sub_bits, 0)
    return (shift << sub_bits) + (value >> shift)


def count_edges(steps, unknown, sub_bits, counts):
    """See kvmtrace._native.automaton.count_edges."""
    _, n_classes, n_buckets = counts.shape
    good = (steps.before != unknown) & ~steps.wrong
    duration = np.zeros(len(good), np.int64)
    duration[1:] = np.diff(steps.ts_ns)
    edge = steps.before.astype(np.intp)[good] * n_classes + steps.cls[good]
    cell = edge * n_buckets + np.minimum(bucket_of(duration[good], sub_bits), n_buckets - 1)
    found = np.bincount(cell)
    counts.reshape(-1)[: len(found)] += found
