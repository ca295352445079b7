"""Damaged recordings of healthy VMs: what is readable is read, damage is stated, no violation is invented."""

from __future__ import annotations

import random
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from writers.packing import unpacked

from kvmtrace.check.engine import check_recording
from kvmtrace.errors import FormatError, MissingEventError
from kvmtrace.formats import open_recording
from kvmtrace.formats.trace_dat.pages import PageSource
from kvmtrace.formats.trace_dat.trace_dat_layout import read_trace_dat
from kvmtrace.report.build import ReportOptions, build_report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Recording

FIXTURES = Path(__file__).parents[2] / "fixtures"
PAGE = 4096
SAMPLE = ("svm-6.1-smp", "vmx-6.12-lifecycle", "svm-6.12-interrupt", "vmx-6.1-storm")
ALL = sorted(path.stem for path in FIXTURES.glob("*.dat"))
BIG = 500_000  # bytes; of larger recordings a sample of the places is tried even in the full run


@dataclass
class Whole:
    """A fixture, where its pages are, and what it says undamaged."""

    name: str
    data: bytes
    pages: dict[int, list[int]]  # cpu -> offsets
    events: EventTable
    exits: dict[int, object]

    @property
    def page_list(self) -> list[int]:
        return [at for pages in self.pages.values() for at in pages]


def exit_rows(recording: Recording) -> dict[int, object]:
    return {row.exit_reason: row for row in build_report(recording, ReportOptions(model=False)).exits}


def load(name: str) -> Whole:
    path = FIXTURES / f"{name}.dat"
    data = unpacked(path)
    trace = read_trace_dat(memoryview(data), name)
    pages: dict[int, list[int]] = {}
    for buffer in trace.buffers:
        for cpu in buffer.cpus:
            pages.setdefault(cpu.cpu, []).extend(range(cpu.offset, cpu.offset + cpu.size, PAGE))
    return Whole(name, data, pages, open_recording(path).events(), exit_rows(open_recording(path)))


@pytest.fixture(scope="module", params=SAMPLE)
def sampled(request):
    return load(request.param)


@pytest.fixture(scope="module", params=ALL)
def every(request):
    return load(request.param)


@pytest.fixture
def damaged(tmp_path):
    def write(data: bytes) -> Recording:
        path = tmp_path / "damaged.dat"
        path.write_bytes(data)
        return open_recording(path)

    return write


def rows_by_cpu(table: EventTable) -> dict[int, list[tuple[int, int, str]]]:
    """cpu -> (ts_ns, tid, event) of its events, losses left out."""
    names = [kind.name for kind in table.kinds]
    rows: dict[int, list[tuple[int, int, str]]] = {}
    for ts, cpu, tid, kind in zip(*(c.tolist() for c in (table.ts_ns, table.cpu, table.tid, table.kind)), strict=True):
        if names[kind] != "lost_events":
            rows.setdefault(cpu, []).append((ts, tid, names[kind]))
    return rows


def assert_stated(recording: Recording, context: str) -> None:
    """Damage is named, located in the file, and so is that events are missing."""
    recording.events()
    assert recording.loss.damage, context
    assert all(damage.offset >= 0 and damage.expected and damage.found for damage in recording.loss.damage), context
    assert recording.loss.events is None, context


def assert_no_invention(recording: Recording, whole: Whole, context: str) -> None:
    """No violation; no exit reason has more, or longer, exits than there were."""
    comparison = check_recording(recording)
    assert not comparison.n_violations, (context, [v.rule for v in comparison.violations])
    report = build_report(recording)
    assert not report.model.n_violations, (context, [v.rule for v in report.model.violations])
    for row in report.exits:
        true = whole.exits[row.exit_reason]
        assert row.count <= true.count, (context, row.name)
        assert row.samples <= true.samples, (context, row.name)
        if row.samples:
            assert row.total_ns <= true.total_ns, (context, row.name)
            assert true.min_ns <= row.min_ns <= row.max_ns <= true.max_ns, (context, row.name)


def check_cut(whole: Whole, damaged, at: int) -> None:
    """The events of the pages that are left are all there, in order, unchanged; the rest is said to lack."""
    recording = damaged(whole.data[:at])
    rows, true = rows_by_cpu(recording.events()), rows_by_cpu(whole.events)
    for cpu, pages in whole.pages.items():
        mine = rows.get(cpu, [])
        assert mine == true.get(cpu, [])[: len(mine)], (whole.name, at, cpu)
        if not pages or pages[-1] + PAGE <= at:
            assert mine == true.get(cpu, []), (whole.name, at, cpu)
    cut = max(whole.page_list) + PAGE > at
    assert recording.loss.truncated or not cut, (whole.name, at)
    if cut:
        assert_stated(recording, f"{whole.name} cut at {at}")
    assert_no_invention(recording, whole, f"{whole.name} cut at {at}")


def check_overwritten(whole: Whole, damaged, at: int, filler: bytes) -> None:
    """A page overwritten or never written: the others' events are all there; the gap is located."""
    recording = damaged(whole.data[:at] + filler + whole.data[at + PAGE :])
    context = f"{whole.name} page at {at} is {filler[:2].hex()}"
    assert_stated(recording, context)
    assert [d for d in recording.loss.damage if at <= d.offset < at + PAGE], context
    rows, true = rows_by_cpu(recording.events()), rows_by_cpu(whole.events)
    for cpu, pages in whole.pages.items():
        left = Counter(rows.get(cpu, []))
        if at not in pages:
            assert rows.get(cpu, []) == true.get(cpu, []), context
        assert not left - Counter(true.get(cpu, [])), context
    assert_no_invention(recording, whole, context)


def check_removed(whole: Whole, damaged, at: int) -> None:
    """A page is missing and all behind it moved: every page may lack its predecessor."""
    recording = damaged(whole.data[:at] + whole.data[at + PAGE :])
    assert recording.loss.truncated
    assert_stated(recording, f"{whole.name} without the page at {at}")
    assert_no_invention_of_rules(recording, f"{whole.name} without the page at {at}")


def assert_no_invention_of_rules(recording: Recording, context: str) -> None:
    comparison = check_recording(recording)
    assert not comparison.n_violations, (context, [v.rule for v in comparison.violations])


def check_flipped(damaged, data: bytes, rng: random.Random) -> None:
    """Flipped bits: read or refused; a bit in an event's own fields cannot be told from what happened."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 8, 64])):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    try:
        recording = damaged(bytes(out))
        build_report(recording)
    except (FormatError, MissingEventError) as error:  # a flipped bit in the name of a field
        assert error.exit_code == 3  # noqa: PT017 - both outcomes are right
        return
    assert len(recording.events()) or recording.loss.damage


def places(whole: Whole, limit: int | None) -> Iterator[tuple[str, int]]:
    """(what, offset) of the damage to do: everywhere, or `limit` of each kind."""
    rng = random.Random(whole.name)
    first, last = min(whole.page_list), len(whole.data)
    n_places = limit if limit is not None else 40 if len(whole.data) > BIG else None
    boundaries = list(range(first, last, PAGE))
    for kind, candidates in (
        ("cut", boundaries),
        ("zeros", whole.page_list),
        ("ones", whole.page_list),
        ("removed", whole.page_list),
    ):
        for at in candidates if n_places is None else rng.sample(candidates, min(n_places, len(candidates))):
            yield kind, at
    for _ in range(n_places or 40):
        yield "cut", rng.randrange(first, last)


def do_damage(whole: Whole, damaged, limit: int | None) -> None:
    for kind, at in places(whole, limit):
        if kind == "cut":
            check_cut(whole, damaged, at)
        elif kind == "removed":
            check_removed(whole, damaged, at)
        else:
            check_overwritten(whole, damaged, at, (b"\0" if kind == "zeros" else b"\xff") * PAGE)


def test_damage_sampled(sampled, damaged):
    do_damage(sampled, damaged, 3)


def test_flipped_bits_sampled(sampled, damaged):
    rng = random.Random(sampled.name)
    for _ in range(12):
        check_flipped(damaged, sampled.data, rng)


def test_cut_headers_are_refused_with_the_place(sampled, damaged):
    for at in random.Random(1).sample(range(1, min(sampled.page_list) - PAGE), 20):
        with pytest.raises(FormatError) as caught:
            damaged(sampled.data[:at])
        assert caught.value.offset is not None
        assert caught.value.offset <= at


@pytest.mark.slow
def test_damage_everywhere(every, damaged):
    do_damage(every, damaged, None)


@pytest.mark.slow
def test_flipped_bits_everywhere(every, damaged):
    rng = random.Random(every.name)
    for _ in range(60):
        check_flipped(damaged, every.data, rng)


def test_a_chunk_that_cannot_be_decompressed_invents_no_violation(tmp_path, damaged):
    """Most of the recording is there, and the model learns where it is not."""
    path = tmp_path / "packed.dat"
    subprocess.run(
        ["trace-cmd", "convert", "-i", FIXTURES / "vmx-6.1-linux-1vcpu.dat", "-o", path, "--compression", "any"],
        check=True,
        capture_output=True,
    )
    data = path.read_bytes()
    whole = len(open_recording(path).events())
    stream = PageSource(read_trace_dat(memoryview(data), "packed")).streams[0]
    for unit in (11, stream.n_units - 3):
        at = int(stream.offset[unit])
        recording = damaged(data[:at] + b"\xff" * 16 + data[at + 16 :])
        table = recording.events()
        n_events = len(table) - table.count("lost_events")
        assert 0.98 * whole < n_events < whole
        assert table.count("lost_events") > 0
        assert_stated(recording, f"chunk {unit}")
        assert_no_invention_of_rules(recording, f"chunk {unit}")
