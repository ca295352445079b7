"""The timeline's levels of detail: one pass, the same exits at every level, and every moment of any recording."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kvmtrace.report.timeline
from kvmtrace.errors import UsageError
from kvmtrace.formats import open_recording
from kvmtrace.report.build import ReportOptions, build_report

if TYPE_CHECKING:
    from kvmtrace.report.over_time import Timeline
    from kvmtrace.report.stretches import Stretches

FIXTURES = Path(__file__).parents[2] / "fixtures"
LINUX = FIXTURES / "svm-6.12-linux-2vcpu.dat"


def made(*, every: bool = False, limit: int = 1000) -> tuple[Timeline, Stretches, dict[int, int]]:
    """Return a Linux boot's timeline, what gives the rest of it, and the VM-exits of each thread."""
    kept: list[Stretches] = []
    options = ReportOptions(timeline=True, model=False, every_segment=every, stretches=kept.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvmtrace.report.timeline, "MAX_SEGMENTS", limit)
        report = build_report(open_recording(LINUX), options)
    assert report.timeline is not None
    return report.timeline, kept[0], {row.tid: row.exits for row in report.vcpus}


@pytest.fixture(scope="module")
def whole() -> tuple[Timeline, Stretches, dict[int, int]]:
    return made(every=True)


@pytest.fixture(scope="module")
def part() -> tuple[Timeline, Stretches, dict[int, int]]:
    return made()


def test_full_holds_every_exit_with_its_number(whole) -> None:
    timeline, _, exits = whole
    assert timeline.complete
    assert not timeline.bins
    for lane, one in enumerate(timeline.lanes):
        windows = [window for window in timeline.windows if window.lane == lane]
        assert sum(len(window.exits) for window in windows) == exits[one.tid]
        seen = 1
        for window in windows:
            if window.exits:
                assert window.first_exit == seen
                seen += len(window.exits)


def test_segments_of_a_lane_are_without_gaps(whole) -> None:
    timeline, _, _ = whole
    for lane in range(len(timeline.lanes)):
        reached = None
        for window in timeline.windows:
            if window.lane == lane:
                assert reached is None or window.start_ns >= reached
                reached = window.start_ns + sum(window.dur_ns)
        assert reached is not None
        assert reached <= timeline.length_ns


def test_bins_count_what_the_segments_hold(whole, part) -> None:
    timeline, _, exits = part
    assert not timeline.complete
    assert [sum(bins.exits) for bins in timeline.bins] == [exits[lane.tid] for lane in timeline.lanes]
    events = [sum(len(w.event_ns) for w in whole[0].windows if w.lane == lane) for lane in range(2)]
    assert [sum(bins.events) for bins in timeline.bins] == events


def test_a_long_recordings_page_holds_what_one_would_look_at_first(part) -> None:
    timeline, _, _ = part
    for chosen in timeline.chosen:
        own = [w for w in timeline.windows if w.lane == chosen.lane]
        assert any(w.start_ns <= chosen.ts_ns < w.start_ns + sum(w.dur_ns) for w in own)


def test_places_tell_how_many_there_are(part) -> None:
    timeline, _, exits = part
    reasons = {timeline.reasons[one.number]: one for one in timeline.places.named if one.what == "reason"}
    assert sum(one.total for one in reasons.values()) == sum(exits.values())
    assert reasons["rsm"].total == 1
    assert len(reasons["io"].ts_ns) == 8
    assert list(reasons["io"].ts_ns) == sorted(reasons["io"].ts_ns)


def test_places_are_all_there_is_within_a_cell(whole, part) -> None:
    """Each place of the whole recording lies in a cell of the part's, or is told exactly; no cell is empty."""
    timeline, places = whole[0], part[0].places
    cell_ns, n_lanes = places.cell_ns, len(timeline.lanes)
    assert places.left_out == 0
    wanted: dict[tuple[str, int], set[tuple[int, int]]] = {}
    for w in timeline.windows:
        for ts_ns, event in zip(w.event_ns, w.event_key, strict=True):
            wanted.setdefault(("key", event), set()).add((ts_ns, w.lane))
        for number, (ts_ns, _) in zip(w.rips, _exits(w), strict=True):
            wanted.setdefault(("rip", number), set()).add((ts_ns, w.lane))
    for one in places.named:
        if one.what == "reason":
            continue
        there = wanted.pop((one.what, one.number))
        assert one.total >= len(there)
        if one.cells:
            assert list(one.cells) == sorted(set(one.cells))
            assert {(ts_ns // cell_ns) * n_lanes + lane for ts_ns, lane in there} == set(one.cells)
        else:
            assert set(zip(one.ts_ns, one.lane, strict=True)) == there
    assert not wanted


def test_cells_widen_until_the_page_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmtrace.report.places.MOST_CELLS", 2000)
    monkeypatch.setattr("kvmtrace.report.places.GATHERED", 5000)
    monkeypatch.setattr("kvmtrace.report.places.MOST", 50)
    fewer = made()[0].places
    assert sum(len(one.cells) for one in fewer.named) <= 2000
    assert fewer.left_out > 0


def test_any_stretch_is_the_same_as_in_the_whole(whole, part) -> None:
    timeline, _, _ = whole
    begin, end = 7_200_000_000, 7_300_000_000
    windows, bins = part[1].at_level(begin, end, 1000)
    assert bins == []
    for lane in range(2):
        wanted = [one for w in timeline.windows if w.lane == lane for one in _exits(w) if begin <= one[0] <= end]
        found = [one for w in windows if w.lane == lane for one in _exits(w) if begin <= one[0] <= end]
        assert wanted
        assert found == wanted


def test_a_dense_stretch_is_bins_sharper_than_the_overview(part, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline, stretches, _ = part
    monkeypatch.setattr("kvmtrace.report.stretches.WINDOW_SEGMENTS", 10)
    windows, bins = stretches.at_level(5_000_000_000, 5_010_000_000, 500)
    assert windows == [] or all(len(window.dur_ns) <= 10 for window in windows)
    assert bins
    assert bins[0].bin_ns == 20_000 < timeline.bins[0].bin_ns
    assert bins[0].start_ns == 5_000_000_000
    assert stretches.at_level(0, timeline.length_ns, 500)[1] == []


def test_full_goes_with_html_alone() -> None:
    from kvmtrace.cli.report import Request

    nothing = dict.fromkeys(Request.__dataclass_fields__)
    request = Request(**{**nothing, "files": ("run.dat",), "output_format": "text", "full": True, "show": ()})
    with pytest.raises(UsageError, match="--full is for --format html"):
        request.refuse_what_does_not_go_together()


def _exits(window):
    """Return when each VM-exit of a window begins, and its RIP."""
    ends = [window.start_ns]
    for dur_ns in window.dur_ns:
        ends.append(ends[-1] + dur_ns)
    return [(ends[at], rip) for at, rip in zip(window.exits, window.rips, strict=True)]


def test_nested_guests_have_their_level() -> None:
    case = Path(__file__).parents[1] / "cases" / "nested.txt"
    timeline = build_report(open_recording(case), ReportOptions(timeline=True, model=False)).timeline
    assert timeline is not None
    (window,) = timeline.windows
    assert list(zip(window.level_at, window.levels, strict=True)) == [(0, 0), (1, 1), (3, 2), (5, 1)]
    assert all(not w.levels for w in made(every=True)[0].windows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvmtrace.report.timeline, "MAX_SEGMENTS", 1)
        coarse = build_report(open_recording(case), ReportOptions(timeline=True, model=False)).timeline
    assert coarse is not None
    assert set(coarse.bins[0].level) == {0, 1, 2}
