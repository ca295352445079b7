"""What the compiled loops of the statistics must give, by NumPy and by plain Python."""

from __future__ import annotations

import numpy as np

from kvmtrace._native.duration_sums import NO_MINIMUM, DurationSums
from kvmtrace._native.perf_tables import TABLES


def sum_durations(group, dur_ns, n_groups):
    """See kvmtrace._native.duration_sums.sum_durations; sums go from the first row to the last, as bincount's do."""
    min_ns, max_ns = np.full(n_groups, NO_MINIMUM, np.int64), np.zeros(n_groups, np.int64)
    np.minimum.at(min_ns, group, dur_ns)
    np.maximum.at(max_ns, group, dur_ns)
    count = np.bincount(group, minlength=n_groups)
    total = np.bincount(group, dur_ns, minlength=n_groups)
    mean = total / np.maximum(count, 1)
    squares = np.bincount(group, np.square(dur_ns - mean[group]), minlength=n_groups)
    return DurationSums(count, total, mean, squares, min_ns, max_ns)


class PerfThreads:
    """See kvmtrace._native.perf_tables.PerfThreads: one row after the other."""

    def __init__(self, steps):
        self.steps = steps
        self.entered, self.exit_ns = set(), {}

    def take_samples(self, thread, step, ts_ns, arg):
        samples = {name: [] for name in TABLES}
        pending, write, before = {}, None, None
        steps = self.steps
        begins = {steps["exit"]: "vmexit", steps["pio"]: "ioport", steps["msr"]: "msr"}

        def put(name, key, begin, end):
            if begin != 0 and end >= begin:
                samples[name].append((key, end - begin))

        for t, s, ts, a in zip(thread.tolist(), step.tolist(), ts_ns.tolist(), arg.tolist(), strict=True):
            if t != before:
                pending, write, before = {}, None, t
            if s == steps["entry"]:
                self.entered.add(t)
                for name, (key, begin) in pending.items():
                    put(name, key, begin, ts)
                if write:
                    put("mmio", *write, ts)
                pending, write = {}, None
            if t not in self.entered:
                continue
            if s in begins:
                pending[begins[s]] = (a & steps["reason_mask"] if s == steps["exit"] else a, ts)
            if s == steps["mmio_read"]:
                put("mmio", *(write or (a, self.exit_ns.get(t, 0))), ts)
            if s in (steps["exit"], steps["mmio_read"], steps["mmio_write"]):
                self.exit_ns[t] = ts if s == steps["exit"] else 0
                write = (a, ts) if s == steps["mmio_write"] else None
        return {name: tuple(np.array(column) for column in zip(*rows, strict=True)) for name, rows in samples.items()}
