"""The oracle: NumPy twins of the compiled loops, which a test can put in their place.

Each twin has the name and the arguments of the function it stands for.
"""

from __future__ import annotations

from contextlib import contextmanager

import oracle_model
import oracle_records
import pytest

from kvmtrace._native import automaton, field_bytes, perf_samples, ring_records, thread_rows

TWINS = {
    ring_records: {"decode_records": oracle_records.decode_records},
    field_bytes: {"gather": oracle_records.gather},
    perf_samples: {"read_perf_records": oracle_records.read_perf_records},
    thread_rows: {name: getattr(oracle_model, name) for name in ("tracked", "rows_by_kind", "latest_wanted")},
    automaton: {name: getattr(oracle_model, name) for name in ("take_steps", "cut_segments", "count_edges")},
}


@contextmanager
def in_place():
    """Let kvmtrace use the twins; the functions of a loop are looked up in its module at each call."""
    with pytest.MonkeyPatch.context() as patch:
        for module, twins in TWINS.items():
            for name, twin in twins.items():
                patch.setattr(module, name, twin)
        yield


def both(function):
    """Return what a function gives with the compiled loops, and with their twins."""
    compiled = function()
    with in_place():
        return compiled, function()
