"""What is kept of a long recording: the construction from beginning to end, whole tables only for a replay."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest

from kvmtrace.formats import open_recording
from kvmtrace.report import beginning
from kvmtrace.report.beginning import Beginning

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
NAMES = ["svm-6.1-lifecycle.dat", "vmx-6.1-smp.dat", "svm-6.12-linux-2vcpu.dat"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [50, 1_000, 1 << 20])
def test_pieces_tell_the_same_as_the_whole(name, size):
    recording = open_recording(FIXTURES / name)
    whole, pieces = Beginning(), Beginning()
    events = recording.events()
    whole.feed(events)
    for start in range(0, len(events), size):
        pieces.feed(events.slice(start, min(start + size, len(events))))
    expected, found = (made.bring_up(recording, "svm") for made in (whole, pieces))
    assert expected is not None
    assert dataclasses.asdict(found) == dataclasses.asdict(expected)
    for step in found.steps:
        assert (events.ts_ns[step.event_index], events.tid[step.event_index]) == (step.ts_ns, step.tid)
    assert (pieces.replay(recording) is None) == (whole.replay(recording) is None)


def test_a_recording_that_is_too_long_to_replay_is_let_go_and_its_construction_is_not(monkeypatch):
    recording = open_recording(FIXTURES / NAMES[0])
    events = recording.events()
    monkeypatch.setattr(beginning, "MAX_REPLAYED", len(events) - 1)
    made, expected = Beginning(), Beginning()
    expected.feed(events)
    first = events.slice(0, 100)
    kept = weakref.ref(first)
    made.feed(first)
    del first
    assert kept() is not None
    made.feed(events.slice(100, len(events)))
    gc.collect()
    assert kept() is None
    assert made.replay(recording) is None
    assert made.bring_up(recording, "svm") == expected.bring_up(recording, "svm")


def test_what_does_not_fit_any_more_is_left_out_from_there_on(monkeypatch):
    recording = open_recording(FIXTURES / NAMES[0])
    events, counts = recording.events(), []
    for limit in (0, 10, 1_000_000):
        monkeypatch.setattr(beginning, "MAX_CONSTRUCTION", limit)
        made = Beginning()
        for start in range(0, len(events), 100):
            made.feed(events.slice(start, min(start + 100, len(events))))
        found = made.bring_up(recording, "svm")
        counts.append(len(found.steps) if found else None)
        if found:
            assert any("too many" in note for note in found.notes) == (limit < 1_000_000)
    assert counts[0] in (None, 0)
    assert (counts[0] or 0) <= (counts[1] or 0) < counts[2]


def test_a_report_that_shows_no_step_does_not_put_them_into_words():
    """Text tells of steps only where prediction and recording disagree."""
    recording = open_recording(FIXTURES / NAMES[0])
    kept = Beginning()
    kept.feed(recording.events())
    listed, short = kept.replay(recording), kept.replay(recording, every_step=False)
    assert listed is not None
    assert len(listed.vcpus[0].steps) > 1000
    vcpus = tuple(dataclasses.replace(vcpu, steps=()) for vcpu in listed.vcpus)
    assert short == dataclasses.replace(listed, vcpus=vcpus)


def test_steps_are_listed_where_one_differs():
    recording = open_recording(FIXTURES / NAMES[0])
    kept = Beginning()
    events = recording.events()
    kept.feed(events.take(np.delete(np.arange(len(events)), events.rows("kvm_cpuid")[3])))
    assert kept.replay(recording, every_step=False) == kept.replay(recording)
    assert kept.replay(recording, every_step=False).differences
