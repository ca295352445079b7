"""What the compiled loop of perf's tables must give, by plain Python: one row after the other."""

from __future__ import annotations

import numpy as np

from kvmtrace._native.perf_tables import (
    ENTERS,
    ENTRY,
    EXIT,
    LEAVES,
    MMIO_READ,
    MMIO_WRITE,
    MSR,
    PIO,
    TABLES,
)

_BEGINS = {EXIT: "vmexit", PIO: "ioport", MSR: "msr"}


class PerfTables:
    """See kvmtrace._native.perf_tables.PerfTables."""

    def __init__(self, max_tid, max_threads):
        self.max_tid, self.max_threads = max_tid, max_threads
        self.threads = {}  # tid -> what is pending, the MMIO write that is, when the latest VM-exit was
        self.entered = {}  # tid -> when its latest VM-entry was, where guest mode is measured
        self.known = {name: {} for name in TABLES}  # key -> its samples

    def take(self, ts_ns, tid, kind, n_kinds, kinds):
        at = dict.fromkeys(kinds, 0)
        for ts, thread, k in zip(ts_ns.tolist(), tid.tolist(), kind.tolist(), strict=True):
            if k >= n_kinds:
                raise ValueError(k)
            if k not in kinds:
                continue
            one, what, key = kinds[k], kinds[k].what, None
            if one.table:
                if at[k] >= len(one.keys):
                    raise ValueError(at)
                key, what = int(one.keys[at[k]]), what if one.whats is None else int(one.whats[at[k]])
                self.known[one.table].setdefault(key, [])
                at[k] += 1
            self._take(ts, thread, what, key)

    def _take(self, ts, thread, what, key):
        if not 0 < thread <= self.max_tid:
            return
        if thread not in self.threads and (what not in {ENTRY, ENTERS} or len(self.threads) == self.max_threads):
            return
        pending, write, exit_ns = self.threads.setdefault(thread, ({}, None, 0))
        if what == ENTRY:
            for name, (of, begin) in pending.items():
                self._put(name, of, begin, ts)
            if write:
                self._put("mmio", *write, ts)
            pending, write = {}, None
        if what == ENTERS:
            self.entered[thread] = ts
        if what == LEAVES:
            self._put("vmexit", key, self.entered.pop(thread, 0), ts)
        if what in _BEGINS:
            pending = pending | {_BEGINS[what]: (key, ts)}
        if what == MMIO_READ:
            self._put("mmio", *(write or (key, exit_ns)), ts)
        if what in (EXIT, MMIO_READ, MMIO_WRITE):
            exit_ns, write = ts if what == EXIT else 0, (key, ts) if what == MMIO_WRITE else None
        self.threads[thread] = pending, write, exit_ns

    def _put(self, name, key, begin, end):
        if begin != 0 and end >= begin:
            self.known[name][key].append(end - begin)

    def keys(self, table):
        return list(self.known[table])

    def sums(self, table):
        found = []
        for durations in self.known[table].values():
            mean = np.mean(np.array(durations, float)) if durations else 0
            squares = np.square(np.array(durations, float) - mean).sum()
            total = min(sum(durations), 1 << 61)
            found.append((len(durations), total, min(durations, default=0), max(durations, default=0), mean, squares))
        return found
