"""The story of a VM-exit, told from the recorded lifecycle guests of both ISAs and both kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvmtrace.check.explain import Story, explain_exit
from kvmtrace.errors import UsageError
from kvmtrace.formats import open_recording
from kvmtrace.model.world_switch import PHASES, STEPS_BY_ISA
from kvmtrace.render.text.explain_text import render_story

if TYPE_CHECKING:
    from kvmtrace.table.event_table import EventTable

FIXTURES = Path(__file__).parents[2] / "fixtures"
NAMES = ("vmx-6.1", "svm-6.1", "vmx-6.12", "svm-6.12")
ONCE_PER_RUN = {"bind to the CPU", "unbind"}  # and the swap of the FPU; all else is done for every VM-exit
SWAP = "swap the FPU"


@pytest.fixture(scope="module", params=NAMES)
def lifecycle(request: pytest.FixtureRequest) -> EventTable:
    return open_recording(FIXTURES / f"{request.param}-lifecycle.dat").events()


@pytest.fixture(scope="module")
def stories(lifecycle: EventTable) -> list[Story]:
    return [explain_exit(lifecycle, number) for number in range(1, lifecycle.count("kvm_exit") + 1)]


def test_each_exit_is_told_once_and_in_order(lifecycle: EventTable, stories: list[Story]) -> None:
    told = [story.events[story.exit_at] for story in stories]
    assert [event.event_index for event in told] == lifecycle.rows("kvm_exit").tolist()
    assert {event.event for event in told} == {"kvm_exit"}
    assert {story.n_exits for story in stories} == {len(stories)}
    for story in stories:
        rows = [event.event_index for event in story.events]
        assert rows == sorted(rows)
        assert set(lifecycle.tid[rows].tolist()) == {story.tid}


def test_every_step_of_the_model_is_told_in_its_order(stories: list[Story]) -> None:
    for story in stories:
        assert tuple(placed.step for placed in story.steps) == STEPS_BY_ISA[story.isa]
    assert {placed.step.phase for placed in stories[0].steps} == set(PHASES)


def test_every_step_that_can_be_bracketed_is(lifecycle: EventTable, stories: list[Story]) -> None:
    for story in stories:
        for placed in story.steps:
            if placed.step.phase not in ONCE_PER_RUN and placed.step.title != SWAP:
                assert placed.after is not None, (story.number, placed.step.title)
    # those once per KVM_RUN: exactly as often as KVM_RUN was called
    n_runs = lifecycle.count("kvm_userspace_exit")
    for i, step in enumerate(STEPS_BY_ISA[stories[0].isa]):
        if step.phase in ONCE_PER_RUN or step.title == SWAP:
            assert sum(story.steps[i].after is not None for story in stories) == n_runs, step.title


def test_brackets_lie_on_their_side_of_the_exit(stories: list[Story]) -> None:
    for story in stories:
        for placed in story.steps:
            if placed.after is None or placed.before is None:
                assert (placed.after, placed.before, placed.dur_ns) == (None, None, None)
                continue
            first, last = story.events[placed.after], story.events[placed.before]
            assert placed.after < placed.before
            assert placed.dur_ns == last.ts_ns - first.ts_ns >= 0
            if placed.step.phase == "unbind":
                assert placed.after > story.exit_at
            elif placed.step.phase != "record the exit reason":
                assert placed.before <= story.exit_at
            if placed.step.phase == "guest mode":
                assert first.event == "kvm_entry"


def test_the_first_exit_has_no_exit_before_it_and_the_last_no_entry_behind(stories: list[Story]) -> None:
    first, last = stories[0], stories[-1]
    assert [event.event for event in first.events].count("kvm_exit") == 1
    assert "kvm_entry" not in [event.event for event in last.events[last.exit_at :]]
    assert [event.event for event in first.events[first.exit_at :]].count("kvm_entry") == 1
    assert stories[1].events[0].event_index == first.events[first.exit_at].event_index


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [0, -1, 10**9])
def test_an_unknown_number_is_wrong_usage(name: str, number: int) -> None:
    events = open_recording(FIXTURES / f"{name}-lifecycle.dat").events()
    with pytest.raises(UsageError, match=f"no VM-exit {number}: the recording has 13[45]"):
        explain_exit(events, number)


def test_an_unknown_vcpu_or_thread_is_wrong_usage(lifecycle: EventTable) -> None:
    with pytest.raises(UsageError, match="there is no VM-exit of"):
        explain_exit(lifecycle, 1, vcpu=9)
    with pytest.raises(UsageError, match="there is no VM-exit of"):
        explain_exit(lifecycle, 1, tid=1 << 22)


def test_two_vcpus_have_a_story_each() -> None:
    events = open_recording(FIXTURES / "svm-6.1-smp.dat").events()
    told = [explain_exit(events, 1, vcpu=vcpu) for vcpu in (0, 1)]
    assert [story.vcpu_id for story in told] == [0, 1]
    assert told[0].tid != told[1].tid
    assert sum(story.n_exits for story in told) == events.count("kvm_exit")
    assert explain_exit(events, 1, tid=told[1].tid) == told[1]


def test_without_function_probes_the_tracepoints_stand_in(lifecycle: EventTable) -> None:
    probes = [i for i, kind in enumerate(lifecycle.kinds) if kind.name.endswith(("vcpu_run", "_return"))]
    seen = lifecycle.take(np.flatnonzero(~np.isin(lifecycle.kind, probes)))
    story = explain_exit(seen, 2)
    guest = next(placed for placed in story.steps if placed.step.phase == "guest mode")
    assert guest.after is not None
    assert guest.before is not None
    assert [story.events[i].event for i in (guest.after, guest.before)] == ["kvm_entry", "kvm_exit"]


def test_the_text_tells_reason_evidence_and_what_no_trace_shows(stories: list[Story]) -> None:
    text = render_story(stories[1])
    assert text.startswith("The guest ")
    assert f"\n\nVM-exit 2 of {len(stories)} of vCPU 0 (thread {stories[1].tid}, {stories[1].isa}): " in text
    assert stories[1].reason in text
    assert "between kvm_entry and" in text
    assert "No trace can show:" in text
    assert max(map(len, text.splitlines())) <= 110
    for placed in stories[1].steps:
        assert placed.step.title in " ".join(text.replace("|", " ").split())
