"""A disk that fills up: what both back ends keep, and that recorded + lost is exact."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvmtrace.capture.bpf import bpf_writer as bpf_file
from kvmtrace.capture.bpf.bpf_disk_full import Unkept, iter_records
from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording
from tests.writers.bpf_capture import KINDS, encode_span, entry, fpu

KVMTRACE = f"{sys.executable} -m kvmtrace"


def header_of(n_cpus: int) -> bytes:
    kinds = [(kind["name"], kind["system"], kind["format"]) for kind in KINDS]
    return bpf_file.encode_header({"schema": "kvmtrace.capture/1"}, kinds, n_cpus)


def test_a_capture_cut_by_a_full_disk_still_ends_with_its_metadata(tmp_path: Path) -> None:
    class Full(bpf_file.CaptureWriter):
        limit = 4000

        def _write(self, parts: list[bytes | memoryview]) -> None:
            if self.size + sum(map(len, parts)) > self.limit:
                raise OSError(28, "No space left on device")
            super()._write(parts)

    path = tmp_path / "full.bpf"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    writer = Full(fd)
    writer.write_header(header_of(1))
    span = memoryview(encode_span([fpu(1, 1)] * 2))

    def fill() -> None:
        for i in range(1000):
            writer.write_span(0, i * len(span), span)

    with pytest.raises(OSError, match="No space"):
        fill()
    written, unkept = len(writer.whole) * 2, Unkept()
    while True:
        try:
            writer.write_meta({"notes": ["x" * 200], "ended_by": "disk full"})
            break
        except OSError:
            assert unkept.cut_frame(writer)
    os.close(fd)
    assert 0 < path.stat().st_size <= Full.limit
    assert b'"ended_by":"disk full"' in path.read_bytes()[-64:]
    assert unkept.by_cpu == {0: {1: unkept.total}}
    assert len(open_recording(path).events()) == written - unkept.total > 0
    assert unkept.total > 0


def test_a_full_disk_ends_all_cpus_at_one_time(tmp_path: Path) -> None:
    path = tmp_path / "full.bpf"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    writer = bpf_file.CaptureWriter(fd)
    writer.write_header(header_of(2))
    for cpu, position, times in (
        (0, 0, range(10, 20)),
        (1, 0, range(10, 30)),
        (0, 400, range(20, 40)),
        (1, 800, range(30, 60)),
    ):
        writer.write_span(cpu, position, memoryview(encode_span([fpu(ts, 1) for ts in times])))
    unkept = Unkept()
    unkept.discard_newer(writer)
    assert unkept.total == 0
    assert unkept.cut_frame(writer)  # CPU 1 lacks what it recorded from 30 on
    unkept.discard_newer(writer)
    unkept.discard_newer(writer)  # once more changes nothing
    os.close(fd)
    assert unkept.from_ns == 30
    assert unkept.by_cpu == {1: {1: 30}, 0: {1: 10}}
    table = open_recording(path).events()
    assert sorted(table.ts_ns.tolist()) == sorted([*range(10, 30), *range(10, 30)])


def test_records_are_walked_as_the_kernel_lays_them_out() -> None:
    span = encode_span([fpu(1, 1), entry(2), fpu(3, 0, bits=1 << 30), fpu(4, 0, bits=1 << 31), entry(5)])
    assert [(ts, kind) for _, ts, kind in iter_records(span)] == [(1, 1), (2, 0), (5, 0)]


@pytest.mark.kvm
@pytest.mark.parametrize("backend", ["ftrace", "bpf"])
def test_one_cpu_fills_the_disk(tmp_path: Path, backend: str) -> None:
    """A busy CPU and one with few events, whose half-filled page is older than all the busy one's."""
    few = "taskset -c 1 sh -c 'i=0; while [ $i -lt 40 ]; do /bin/true; i=$((i+1)); done'"
    storm = f"taskset -c 0 {sys.executable} -m kvmtrace.workload storm --count 2000000 >/dev/null"
    saved = Path(f"/var/tmp/{tmp_path.name}-{backend}")
    script = (
        f"mount -t tmpfs -o size=6m none {tmp_path} && cd {tmp_path} && {KVMTRACE} record --backend {backend} "
        f'-o full.dat -- sh -c "{few} & {storm}; wait"; echo code $?; ls -A; cp full.dat {saved}'
    )
    try:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, timeout=300, check=False
        )
        assert done.stdout.split() == ["code", "0", "full.dat"], done
        assert "the disk was full" in done.stderr
        assert "the recording ended early: disk full" in done.stderr
        recording = open_recording(saved)
        table, meta = recording.events(), recording.capture.meta
        size = saved.stat().st_size
    finally:
        saved.unlink(missing_ok=True)
    n_events = len(table) - table.count("lost_events")
    assert n_events == meta["n_events"], meta
    assert recording.loss.events == meta["loss"]["events"] > 0
    assert table.ts_ns.max() < meta["complete_until_ns"]
    assert size > 2 << 20  # most of the room was used: the quiet CPU did not cost the busy one's events
    assert len(np.unique(table.cpu)) == 2
    assert not check_recording(recording).n_violations
    assert json.dumps(meta["notes"]).count("disk was full") == 1
