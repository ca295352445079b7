"""Compressed pages: decompressed at once, batch by batch or one by one they give the same, damaged or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvmtrace.formats import open_recording
from kvmtrace.formats.common.compression import Decompressor
from kvmtrace.formats.trace_dat import chunks

PACKED = Path(__file__).parents[2] / "fixtures" / "svm-6.12-smp.dat"
ROUTES = {
    "kept": {},
    "batches": {"KEPT_BYTES": 0, "BATCH_BYTES": 100_000},
    "large batches": {"KEPT_BYTES": 0},
    "one by one": {"KEPT_BYTES": 0, "BATCH_BYTES": 1},
}


def read(path: Path, route: str, *, tables: int = 1, together: bool = True):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ROUTES[route].items():
            patch.setattr(chunks, name, value)
        if not together:
            patch.setattr(Decompressor, "decompress_many", lambda *_: None)
        recording = open_recording(path)
        parts = list(recording.iter_events(1 << 40 if tables == 1 else 1000))
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("ts_ns", "cpu", "tid", "kind", "irq_flags", "preempt_count")
        }
        rips = np.concatenate([part.field("kvm_exit", "guest_rip") for part in parts])
        return columns, rips, recording.loss


def assert_same(one, other):
    for name in one[0]:
        np.testing.assert_array_equal(one[0][name], other[0][name], name)
    np.testing.assert_array_equal(one[1], other[1])
    assert one[2] == other[2]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("tables", [1, 2])
def test_all_routes(route, tables):
    wanted = read(PACKED, "one by one", together=False)
    assert len(wanted[1]) > 50
    assert_same(wanted, read(PACKED, route, tables=tables))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("route", ["kept", "batches", "large batches"])
def test_damaged_chunks_are_named_the_same(tmp_path, route, seed):
    data = bytearray(PACKED.read_bytes())
    rng = np.random.default_rng(seed)
    streams = open_recording(PACKED)._source.streams
    units = [unit for s in streams for unit in zip(s.offset.tolist(), s.packed.tolist(), strict=True)]
    for at, size in rng.choice(units, 3):
        data[int(rng.integers(at, at + size))] ^= 1 << int(rng.integers(0, 8))
    path = tmp_path / "damaged.dat"
    path.write_bytes(data)
    wanted = read(path, "one by one", together=False)
    assert_same(wanted, read(path, route))


def test_a_call_for_many_chunks():
    """A small file's pages are decompressed once, those of each CPU together."""
    calls = []
    original = Decompressor.decompress_many
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decompressor, "decompress_many", lambda *args: calls.append(len(args[2])) or original(*args))
        recording = open_recording(PACKED)
        table = recording.events()
    n_units = [stream.n_units for stream in recording._source.streams if stream.n_units]
    assert calls == n_units
    assert len(table) == sum(len(part) for part in recording.iter_events(1000))
    assert calls == n_units
