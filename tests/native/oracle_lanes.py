"""What the compiled loops over lanes must give, by NumPy: many passes over all rows instead of one."""

from __future__ import annotations

import itertools

import numpy as np

from kvmtrace.spans.lanes import Step
from kvmtrace.spans.time_parts import _AFTER, _KEEPS, Part


def latest_wanted(wanted, thread):
    """Return, for each row, the latest row of its thread up to itself that is wanted; -1 for none."""
    row = np.arange(len(wanted))
    latest = np.maximum.accumulate(np.where(wanted, row, -1)) if len(row) else row
    found = latest >= 0
    found[found] = thread[latest[found]] == thread[found]
    return np.where(found, latest, -1)


def lane_rows(source, number, resume):
    """Return (thread, step, ts_ns, arg, cpu, loss, row): steps of threads with a number, and of those switched in."""
    known = np.where((source.tid > 0) & (source.tid < len(number)), source.tid, 0)
    threads = number[known] - 1
    rows = np.flatnonzero((source.step > 0) & (threads >= 0))
    switches = np.flatnonzero(source.kind == source.switch_kind)[: len(source.switches)]
    tids = source.switches[: len(switches)]
    switched_in = number[np.where((tids > 0) & (tids < len(number)), tids, 0)] - 1
    resumed = switches[switched_in >= 0]
    order = np.argsort(np.concatenate([rows * 2, resumed * 2 + 1]), kind="stable")
    at = np.concatenate([rows, resumed])[order]
    thread = np.concatenate([threads[rows], switched_in[switched_in >= 0]])[order]
    step = np.concatenate([source.step[rows], np.full(len(resumed), resume, np.uint8)])[order]
    arg = np.concatenate([source.arg[rows], np.zeros(len(resumed), np.int64)])[order]
    return thread, step, source.ts_ns[at], arg, source.cpu[at], source.loss[at], at + source.first_row


def step_durations(thread, ts_ns, latest):
    """See kvmtrace._native.lane_rows.step_durations."""
    ts_ns = ts_ns.copy()
    bounds = [0, *(np.flatnonzero(thread[1:] != thread[:-1]) + 1).tolist(), len(thread)]
    for start, stop in itertools.pairwise(bounds):
        if start < stop:
            ts_ns[start] = max(ts_ns[start], latest[thread[start]])
            ts_ns[start:stop] = np.maximum.accumulate(ts_ns[start:stop])
            latest[thread[start]] = ts_ns[stop - 1]
    dur_ns = np.zeros(len(thread), np.int64)
    dur_ns[:-1] = np.where(thread[1:] == thread[:-1], np.diff(ts_ns), 0)
    return dur_ns


def sweep_lanes(thread, step, suspect):
    """See kvmtrace._native.lane_rows.sweep_lanes."""
    part = _AFTER[step]
    decides = part != _KEEPS
    rows = np.flatnonzero(decides)
    same = thread[rows[:-1]] == thread[rows[1:]]

    def before(first, then):
        return rows[:-1][same & (step[rows[:-1]] == first) & (step[rows[1:]] == then)]

    part[before(Step.USERSPACE_EXIT, Step.RETURN)] = Part.HANDLER
    part[before(Step.EXIT, Step.WRAP_OUT)] = Part.ENTRY_EXIT
    edge = latest_wanted((step == Step.ENTRY) | (step == Step.EXIT), thread)
    in_guest = (edge >= 0) & (step[edge] == Step.ENTRY)
    part[(step == Step.WRAP_OUT) & in_guest] = Part.ENTRY_EXIT
    part[(step == Step.WRAP_IN) & in_guest] = Part.GUEST
    keeps = np.flatnonzero(~decides)
    source = latest_wanted(decides, thread)[keeps]
    value = np.where(source >= 0, part[source], np.uint8(Part.UNKNOWN)) if len(keeps) else part[keeps]
    value[value == Part.GUEST] = Part.HANDLER
    n_suspect = np.concatenate([[0], np.cumsum(suspect)])
    value[n_suspect[keeps] != n_suspect[np.maximum(source, 0)]] = Part.UNKNOWN
    part[keeps] = value
    part[step == Step.BLOCK] = Part.BLOCKED
    part[step == Step.PREEMPT] = Part.PREEMPTED
    part[suspect] = Part.UNKNOWN
    return part, edge


def sum_by_number(numbers, weights, sums, limit):
    """See kvmtrace._native.lane_rows.sum_by_number: integers of any size."""
    totals = sums.tolist()
    added = [1] * len(numbers) if weights is None else weights.tolist()
    for number, weight in zip(numbers.tolist(), added, strict=True):
        totals[number] = max(-limit, min(limit, totals[number] + weight))
    sums[:] = totals


def sum_parts(part, dur_ns, group, sums, *, limit, owner=None):
    """See kvmtrace._native.lane_rows.sum_parts."""
    groups = group if owner is None else np.append(group, np.int32(-1))[owner]
    mine = groups >= 0
    flat = sums.reshape(-1)
    sum_by_number(groups[mine] * sums.shape[1] + part[mine], dur_ns[mine], flat, limit)


def pair_edges(thread, step, suspect, ts_ns, arg, mask):
    """See kvmtrace._native.edges.pair_edges: (edges, is_exit, reasons, handling, guest, dur_ns, sound)."""
    edges = np.flatnonzero(step <= Step.EXIT)
    is_exit = step[edges] == Step.EXIT
    same = thread[edges][:-1] == thread[edges][1:]
    dur_ns = np.diff(ts_ns[edges])
    n_suspect = np.concatenate([[0], np.cumsum(suspect)])[edges]
    sound = (dur_ns >= 0) & (np.diff(n_suspect) == 0)
    handling, guest = same & is_exit[:-1] & ~is_exit[1:], same & ~is_exit[:-1] & is_exit[1:]
    return edges, is_exit, arg[edges] & mask, handling, guest, dur_ns, sound


def sum_exits(edges, count, guest_ns, limit):
    """See kvmtrace._native.edges.sum_exits; here no sum leaves the limits on its way."""
    handled, guest = edges.handling & edges.sound, edges.guest & edges.sound
    for reason in edges.reasons[edges.is_exit].tolist():
        count[reason] += 1
    for reason, ns in zip(edges.reasons[1:][guest].tolist(), edges.dur_ns[guest].tolist(), strict=True):
        guest_ns[reason] = min(int(guest_ns[reason]) + ns, limit)
    return edges.reasons[:-1][handled], edges.dur_ns[handled], int((edges.handling & ~edges.sound).sum())


def slow_exits(edges, swept, *, waiting, moved_ns, least, counted):
    """See kvmtrace._native.edges.slow_exits."""
    thread, part, dur_ns = swept
    found = []
    for i, row in enumerate(edges.edges.tolist()):
        counted[thread[row]] += edges.is_exit[i]
        if i + 1 < len(edges.edges) and edges.handling[i] and edges.sound[i]:
            own = slice(row, edges.edges[i + 1])
            waited = sum(dur_ns[own][np.isin(part[own], waiting)].tolist())
            work = int(edges.dur_ns[i]) - waited - (0 if moved_ns is None else int(moved_ns[i]))
            if work >= least:
                found.append((i, work, int(counted[thread[row]])))
    return tuple(np.array(column, np.int64) for column in zip(*found, strict=True)) if found else (np.empty(0),) * 3


def add_stretches(stretches, bins, value_bits):
    """See kvmtrace._native.time_bins_loop.add_stretches: stretch by stretch, bin by bin."""
    n_bins, longest_ns = bins.part_ns.shape[1], (1 << (62 - value_bits)) - 1
    values = {"longest": stretches.code, "cpu": stretches.cpu, "level": stretches.level}
    for i, thread in enumerate(stretches.thread.tolist()):
        begin = max(int(stretches.begin_ns[i]), 0)
        end = min(int(stretches.begin_ns[i]) + int(stretches.dur_ns[i]), n_bins * bins.bin_ns)
        for where in range(begin // bins.bin_ns, n_bins if end > begin else 0):
            ns = min(end, (where + 1) * bins.bin_ns) - max(begin, where * bins.bin_ns)
            if ns <= 0:
                break
            bins.part_ns[thread, where, stretches.part[i]] += ns
            for name, column in values.items():
                if column is not None:
                    kept = getattr(bins, name)
                    kept[thread, where] = max(kept[thread, where], min(ns, longest_ns) << value_bits | int(column[i]))
