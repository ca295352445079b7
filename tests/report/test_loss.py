"""Intervals that may hide lost events are left out and counted, never charged to a reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmtrace.render.terminal import Style
from kvmtrace.render.text.report_text import header, is_lossy, loss_line
from kvmtrace.report.anonymize import anonymized
from kvmtrace.report.build import ReportOptions, build_report
from kvmtrace.table.recording import Loss

from .tables import Row, TableRecording, make_table

if TYPE_CHECKING:
    from kvmtrace.report.document import Report

CPUID, HLT = 10, 12


def report(rows: list[Row], kinds: list[str] | None = None) -> Report:
    recording = TableRecording(make_table(rows, kinds), loss=Loss(events=5, by_cpu={0: 5}))
    return build_report(recording, ReportOptions(model=False))


def exit_at(ts_ns: int, reason: int = CPUID, cpu: int = 0, tid: int = 5) -> Row:
    return (ts_ns, cpu, tid, "kvm_exit", {"exit_reason": reason, "isa": 1})


def entry_at(ts_ns: int, cpu: int = 0, tid: int = 5) -> Row:
    return (ts_ns, cpu, tid, "kvm_entry")


def lost(ts_ns: int, cpu: int = 0) -> Row:
    return (ts_ns, cpu, -1, "lost_events", {"count": 5})


def test_an_interval_over_a_loss_of_its_cpu_is_left_out() -> None:
    rows = [
        entry_at(0),
        exit_at(100),
        entry_at(110),
        exit_at(200),
        lost(5000),
        entry_at(5000),
        exit_at(5100),
        entry_at(5120),
    ]
    found = report(rows)
    (row,) = found.exits
    assert (row.count, row.samples, row.total_ns, row.max_ns) == (3, 2, 30, 20)
    assert row.guest_before_ns == 100 + 90 + 100
    assert found.loss.discarded_intervals == 1
    budget = found.vcpus[0].budget
    assert (budget.unknown_ns, budget.handler_ns, budget.guest_ns) == (4800, 30, 290)
    assert found.vcpus[0].wall_ns == budget.total_ns() == 5120
    # perf does not look at losses, and its table shall be perf's
    assert (found.perf_compatible.vmexit[0].samples, found.perf_compatible.vmexit[0].max_ns) == (3, 4800)


def test_guest_time_over_a_loss_is_unknown() -> None:
    found = report([entry_at(0), lost(900), exit_at(900), entry_at(950)])
    assert found.exits[0].guest_before_ns == 0
    assert found.vcpus[0].budget.guest_ns == 0
    assert found.vcpus[0].budget.unknown_ns == 900


def test_a_loss_of_another_cpu_does_not_touch_a_thread_that_stayed() -> None:
    rows = [
        entry_at(0),
        exit_at(100),
        (105, 1, 9, "sched_switch", {"prev_pid": 9, "next_pid": 0}),
        lost(150, cpu=1),
        (150, 1, 9, "sched_switch", {"prev_pid": 0, "next_pid": 9}),
        entry_at(160),
    ]
    found = report(rows)
    assert (found.exits[0].samples, found.loss.discarded_intervals) == (1, 0)


def test_without_scheduling_events_a_loss_anywhere_counts() -> None:
    rows = [
        entry_at(0),
        exit_at(100),
        exit_at(105, cpu=1, tid=9),
        lost(150, cpu=1),
        entry_at(150, cpu=1, tid=9),
        entry_at(160),
    ]
    found = report(rows)
    assert (found.exits[0].samples, found.loss.discarded_intervals) == (0, 2)


def test_a_thread_that_was_away_while_another_cpu_lost_events_may_have_run_there() -> None:
    def away(lost_on: int) -> Report:
        return report(
            [
                entry_at(0),
                exit_at(100, HLT),
                (200, 0, 5, "sched_switch", {"prev_pid": 5, "prev_state": 1}),
                (205, 1, 9, "sched_switch", {"prev_pid": 9, "next_pid": 0}),
                lost(400, cpu=lost_on),
                (400, lost_on, 0, "sched_switch", {"prev_pid": 0, "next_pid": 8}),
                (600, 0, 0, "sched_switch", {"prev_pid": 0, "next_pid": 5}),
                entry_at(610),
                exit_at(700),
                entry_at(710),
            ]
        )

    found = away(lost_on=1)
    assert found.loss.discarded_intervals == 1
    assert found.vcpus[0].budget.unknown_ns == 400 + 10  # until kvm_entry tells what the thread does
    assert [row.samples for row in found.exits if row.exit_reason == CPUID] == [1]


def test_a_gap_counts_from_the_last_event_before_it() -> None:
    # CPU 1 recorded nothing between 50 and 900: the thread's time away, 200 to 600, lies inside that gap
    rows = [
        (50, 1, 9, "sched_switch", {"prev_pid": 9, "next_pid": 0}),
        entry_at(60),
        exit_at(100, HLT),
        (200, 0, 5, "sched_switch", {"prev_pid": 5, "prev_state": 1}),
        (600, 0, 0, "sched_switch", {"prev_pid": 0, "next_pid": 5}),
        entry_at(610),
        lost(900, cpu=1),
        (900, 1, 0, "sched_switch", {"prev_pid": 0, "next_pid": 9}),
    ]
    assert report(rows).loss.discarded_intervals == 1


def test_after_a_loss_the_state_is_unknown_until_an_event_tells() -> None:
    rows = [entry_at(0), exit_at(100), lost(300), (300, 0, 5, "kvm_pio", {"port": 1}), entry_at(500)]
    budget = report(rows).vcpus[0].budget
    assert (budget.handler_ns, budget.unknown_ns) == (0, 400)


def test_the_loss_line_says_so() -> None:
    found = report([entry_at(0), exit_at(100), lost(300), entry_at(300)])
    assert loss_line(found) == "5 events lost (CPU 0: 5); 1 interval that may span a loss left out"


def test_events_and_lost_ones_add_up_to_the_truth() -> None:
    found = report([entry_at(0), exit_at(100), lost(900), entry_at(950)])
    assert found.capture.n_events == 3  # what stands for the lost ones is none
    assert found.loss.events == 5


@pytest.mark.parametrize(("ended_by", "says"), [("killed", "was killed"), ("disk full", "disk was full")])
def test_how_a_recording_ended_is_shown(ended_by: str, says: str) -> None:
    meta = {"ended_by": ended_by, "notes": ["what the kernel still held is lost"]}
    recording = TableRecording(make_table([entry_at(0), exit_at(100)]), loss=Loss(events=0), meta=meta)
    found = build_report(recording, ReportOptions(model=False))
    assert says in loss_line(found)
    assert is_lossy(found)
    assert found.loss.notes == ("what the kernel still held is lost",)
    text = "\n".join(header(found, Style()))
    assert says in text
    assert "Note:    what the kernel still held is lost" in text
    assert anonymized(found).loss.notes == ()


def test_an_end_as_wanted_is_no_loss() -> None:
    meta = {"ended_by": "target", "notes": ["of no interest here"]}
    recording = TableRecording(make_table([entry_at(0), exit_at(100)]), loss=Loss(events=0), meta=meta)
    found = build_report(recording, ReportOptions(model=False))
    assert not is_lossy(found)
    assert "Note:" not in "\n".join(header(found, Style()))
