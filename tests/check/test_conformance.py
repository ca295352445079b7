"""Real recordings of real kvm_intel and kvm_amd conform to the model, whole, in pieces and cut off."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kvmtrace.check.engine import Checker, check_recording
from kvmtrace.errors import KvmtraceError
from kvmtrace.formats import open_recording

FIXTURES = sorted((Path(__file__).parents[2] / "fixtures").glob("*.dat"))
SMALL = [path for path in FIXTURES if "linux" not in path.stem]


def alarms(comparison) -> list[tuple[str, int, str, str]]:
    return [(v.rule, v.event_index, v.expected, v.observed) for v in comparison.violations]


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_recording_conforms(path: Path) -> None:
    comparison = check_recording(open_recording(path))
    assert alarms(comparison) == []
    assert comparison.n_events > 0
    assert comparison.rules["V1"].checked > 0
    assert comparison.explained_events > 5 * comparison.unknown_events


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.stem)
def test_pieces_agree(path: Path) -> None:
    recording = open_recording(path)
    table = recording.events()
    checker = Checker(recording.capture)
    for start in range(0, len(table), 401):
        checker.feed(table.slice(start, min(start + 401, len(table))))
    parts, whole = checker.finish(), check_recording(recording)
    assert alarms(parts) == []
    for rule in ("V2", "V6", "V7", "V8", "V9", "V10", "V11"):
        assert parts.rules[rule].checked == whole.rules[rule].checked, rule


@pytest.mark.parametrize("path", SMALL[::3], ids=lambda path: path.stem)
def test_cut_off_recordings_invent_nothing(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    rng = random.Random(path.stem)
    for _ in range(6):
        cut = tmp_path / "cut.dat"
        cut.write_bytes(data[: rng.randrange(len(data) // 4, len(data))])
        try:
            recording = open_recording(cut)
            comparison = check_recording(recording)
        except KvmtraceError:
            continue  # damaged before its first event
        assert alarms(comparison) == []
