"""The text report answers first: what took the time, which VM-exit to look at, what led to a violation."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from kvmtrace.check.alike_exits import place_among_alike
from kvmtrace.check.explain import exits_of, explain_exit
from kvmtrace.check.verdict import ContextEvent, Violation, not_recorded
from kvmtrace.cli.main import cli
from kvmtrace.errors import UsageError
from kvmtrace.formats import open_recording
from kvmtrace.model.thresholds import threshold
from kvmtrace.render.headline import headline
from kvmtrace.render.terminal import Column, Style, columns_wanted, table
from kvmtrace.render.text.report_text import SHOW, TextOptions, render_text
from kvmtrace.render.text.story_sentence import describe_story
from kvmtrace.report.build import ReportOptions, build_report
from kvmtrace.report.selection import Selection

from .tables import Row, TableRecording, make_table

if TYPE_CHECKING:
    from kvmtrace.report.document import Report

FIXTURES = Path(__file__).parents[2] / "fixtures"
BOOT = "svm-6.12-linux-2vcpu"


@cache
def report_of(name: str) -> Report:
    return build_report(open_recording(FIXTURES / f"{name}.dat"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (BOOT, "fw_cfg DMA (port 0x518) took 521ms of 977ms of io exits, in 55 of 3,077."),
        ("vmx-6.1-lifecycle", "COM1 (port 0x3f8-0x3fd) took 26.8ms of 26.8ms of IO_INSTRUCTION exits"),
        ("vmx-6.1-msr-gp", "MSR"),
    ],
)
def test_the_first_sentence_names_the_culprit(name: str, words: str) -> None:
    assert headline(report_of(name)).startswith(words) or (words == "MSR" and "MSR" in headline(report_of(name)))


def exits_only(*extra: Row) -> Report:
    rows: list[Row] = [(1000, 0, 5, "kvm_exit", {"exit_reason": 0x400, "isa": 2, "guest_rip": 5})] * 2
    return build_report(TableRecording(make_table([*rows, *extra])), ReportOptions(model=False))


def test_vm_exits_without_times_are_not_denied() -> None:
    words = headline(exits_only())
    assert words == "npf: 2 of 2 VM-exits; no kvm_entry here, so no times."


def test_the_whole_boot_fits_a_screen_or_two_and_says_what_opens_the_rest() -> None:
    text = render_text(report_of(BOOT))
    assert len(text.splitlines()) < 70
    for name in SHOW:
        assert f"(--show {name})" in text
        assert f"(--show {name})" not in render_text(report_of(BOOT), TextOptions(show=frozenset({name})))
    assert "Rules of the reference model" not in text
    assert "Rules of the reference model" in render_text(report_of(BOOT), TextOptions(show=frozenset(SHOW)))


@pytest.mark.parametrize("option", [["--show", "all"], ["-v"], ["--show", "bring-up,rules,limits,details"]])
def test_all_of_it(option: list[str]) -> None:
    output = CliRunner().invoke(cli, ["report", str(FIXTURES / "vmx-6.1-lifecycle.dat"), *option]).output
    for part in ("Rules of the reference model", "What this recording cannot show", "Bring-up of the VM", "I/O ports"):
        assert part in output


@pytest.mark.parametrize("parts", ["colour", "", "rules,colour"])
def test_unknown_parts_are_refused(parts: str) -> None:
    done = CliRunner().invoke(cli, ["report", "x", "--show", parts])
    assert done.exit_code == 2
    assert "the parts are details, bring-up, rules, limits, all" in done.output


@pytest.mark.parametrize("name", [BOOT, "vmx-6.1-lifecycle", "svm-6.1-smp"])
def test_each_slow_exit_has_the_number_that_explain_takes(name: str) -> None:
    report, events = report_of(name), open_recording(FIXTURES / f"{name}.dat").events()
    assert len(report.slowest) >= 30
    for row in report.slowest[:8]:
        story = explain_exit(events, row.number, tid=row.tid)
        left = story.events[story.exit_at]
        assert (left.ts_ns, story.reason, story.vcpu_id) == (row.ts_ns, row.name, row.vcpu_id)


def test_the_slowest_are_the_slowest_without_waiting() -> None:
    rows = report_of(BOOT).slowest
    left_out = [(row.waiting_ns or 0) + (row.preempted_ns or 0) for row in rows]
    work = [row.dur_ns - ns for row, ns in zip(rows, left_out, strict=True)]
    assert work == sorted(work, reverse=True)
    assert all(0 <= ns <= row.dur_ns for row, ns in zip(rows, left_out, strict=True))
    assert any(row.preempted_ns for row in rows)


def test_numbers_are_of_the_recording_also_where_only_a_part_is_selected() -> None:
    path = FIXTURES / f"{BOOT}.dat"
    part = build_report(open_recording(path), ReportOptions(Selection(begin=5_000_000_000), model=False))
    whole = {(row.tid, row.ts_ns): row.number for row in report_of(BOOT).slowest}
    numbers = {(row.tid, row.ts_ns): row.number for row in part.slowest}
    both = whole.keys() & numbers.keys()
    assert both
    assert {key: whole[key] for key in both} == {key: numbers[key] for key in both}


SENTENCES = {
    ("vmx-6.1-lifecycle", 17): "The guest wrote 0x10 to COM1 (port 0x3f8); KVM could not serve it and asked the VMM "
    "(KVM_EXIT_IO), which took 303us; the guest ran again after 413us.",
    ("vmx-6.1-lifecycle", 1): "The guest touched 0x1000, which was not mapped for it; KVM served it in the kernel, and "
    "the guest ran again after 71.6us.",
    ("vmx-6.1-lifecycle", 134): "The guest wrote 0x0 to isa-debug-exit (usual) (port 0xf4); KVM could not serve it and "
    "asked the VMM (KVM_EXIT_IO); the recording ends before the guest runs again.",
}


@pytest.mark.parametrize(("name", "number"), SENTENCES)
def test_a_story_begins_with_one_sentence(name: str, number: int) -> None:
    story = explain_exit(open_recording(FIXTURES / f"{name}.dat").events(), number)
    assert describe_story(story) == SENTENCES[name, number]


@pytest.mark.parametrize("name", ["vmx-6.1-interrupt", "svm-6.12-triple-fault", "vmx-6.1-msr-gp", "svm-6.1-string-io"])
def test_every_story_has_a_sentence(name: str) -> None:
    events = open_recording(FIXTURES / f"{name}.dat").events()
    for number in range(1, min(events.count("kvm_exit"), 40), 3):
        words = describe_story(explain_exit(events, number, tid=int(events.tid[events.rows("kvm_exit")[0]])))
        assert words.endswith(".")
        assert words.count("\n") == 0


def violated() -> Report:
    report = report_of("vmx-6.1-lifecycle")
    events = open_recording(FIXTURES / "vmx-6.1-lifecycle.dat").events()
    row = int(events.rows("kvm_exit")[16])
    fields: dict[str, int | str] = {"exit_reason": 30, "isa": 1, "guest_rip": 0x1008}
    context = (
        ContextEvent(row, int(events.ts_ns[row]), 0, int(events.tid[row]), "kvm_exit", fields),
        ContextEvent(row + 2, int(events.ts_ns[row]), 0, int(events.tid[row]), "kvm_msr", {"ecx": 0x277, "write": 1}),
    )
    found = Violation(
        "V4", "violation", int(events.ts_ns[row]), int(events.tid[row]), None, 0, row, "kvm_exit", "a", "b", "c", "d",
        context,
    )  # fmt: skip
    assert report.model is not None
    model = dataclasses.replace(report.model, violations=(found,), first_divergence=found, n_violations=1)
    return dataclasses.replace(report, model=model)


def test_a_violation_stands_below_the_first_sentence_and_leads_on() -> None:
    from kvmtrace.report.exit_numbers import with_numbers

    report = with_numbers(violated(), open_recording(FIXTURES / "vmx-6.1-lifecycle.dat"))
    assert report.model is not None
    first = report.model.violations[0]
    assert (first.vm_exit, first.vcpu_id) == (17, 0)
    lines = render_text(report).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("First divergence"))
    assert at < 8
    text = " ".join(" ".join(lines[at : at + 14]).split())  # where a line ends depends on the file's name
    assert "exit_reason IO_INSTRUCTION" in text
    assert "ecx 0x277 (IA32_PAT)" in text
    assert f"--explain 17 --tid {first.tid}" in text
    assert "vCPU 0" in text


def test_histograms_are_finer_than_powers_of_two() -> None:
    for row in report_of(BOOT).exits:
        assert sum(count for _, count in row.fine_histogram) == row.samples
        bounds = [low for low, _ in row.fine_histogram]
        assert bounds == sorted(bounds)
        if row.samples:
            assert bounds[0] <= row.min_ns
            assert bounds[-1] <= row.max_ns < max(bounds[-1] * 1.13, bounds[-1] + 2)


@pytest.mark.parametrize(
    ("told", "terminal", "width"), [("80", False, 80), ("20", True, 60), ("", False, 100), ("x", False, 100)]
)
def test_the_width_follows_columns_and_never_goes_below_60(
    told: str, terminal: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", told)
    assert columns_wanted(terminal=terminal) == width


def test_columns_drop_by_rank_before_names_are_cut_short() -> None:
    columns = [
        Column("name", ["KVM_EXIT_TPR_ACCESS"], left=True, flexible=True, shortest=19),
        Column("important", ["12345"]),
        Column("less", ["x" * 10], rank=1),
        Column("least", ["x" * 10], rank=2),
    ]
    assert [" less" in table(columns, Style(width=width))[0] for width in (80, 50, 40)] == [True, True, False]
    assert all("KVM_EXIT_TPR_ACCESS" in table(columns, Style(width=width))[1] for width in (80, 50, 36))


CASES = Path(__file__).parents[1] / "cases"


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "delivery-livelock",
            (
                "The guest touched 0xfe003000, which KVM knows to be no memory but a device's, while the processor "
                "was delivering an event to it (vector 0x30 software interrupt); KVM set the delivery up again, and "
                "after 2.00us the guest was back at the same instruction. It is number {at} of {n} in a row that are "
                "alike: no progress."
            ),
        ),
        (
            "no-progress",
            (
                "The guest touched 0x200000, which was not mapped for it; KVM handled it, and after 2.00us the guest "
                "was back at the same instruction. It is number {at} of {n} in a row that are alike: no progress."
            ),
        ),
    ],
)
def test_a_vcpu_that_makes_no_progress_is_not_told_as_served(case: str, words: str) -> None:
    events = open_recording(CASES / f"{case}.txt").events()
    n = events.count("kvm_exit")
    story = explain_exit(events, n - 4)
    place, alike = story.alike
    assert alike >= threshold("no_progress")
    assert describe_story(story) == words.format(at=place, n=alike)


@pytest.mark.parametrize("name", ["svm-6.1-storm", "vmx-6.12-string-io", BOOT, "vmx-6.1-interrupt"])
def test_what_repeats_in_a_healthy_guest_is_progress(name: str) -> None:
    events = open_recording(FIXTURES / f"{name}.dat").events()
    for tid in set(events.tid[events.rows("kvm_exit")].tolist()):
        exits = exits_of(events, tid, None)
        longest = max(
            place_among_alike(events, exits, number)[1] for number in range(1, len(exits) + 1, len(exits) // 8 + 1)
        )
        assert longest < threshold("no_progress") / 2, (name, longest)


def test_what_was_not_recorded_is_said_in_one_breath() -> None:
    assert not_recorded(["kvm_exit"]) == "kvm_exit was not recorded"
    assert not_recorded(["kvm_entry or kvm_exit"]) == "neither kvm_entry nor kvm_exit was recorded"
    assert not_recorded(["kvm_entry or kvm_exit", "kvm_exit"]) == "kvm_entry, kvm_exit were not recorded"


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", [f"fixtures/{BOOT}.dat", "tests/check/recorded/svm-6.12-nested-hyperv.dat"])
def test_no_line_is_wider_than_the_terminal(name: str, width: int) -> None:
    report = build_report(open_recording(FIXTURES.parent / name))
    lines = render_text(report, TextOptions(show=frozenset(SHOW)), Style(width=width)).splitlines()
    assert [line for line in lines[1:] if len(line) > width] == []  # the first one is the file's name


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tid", "99"], "there is no VM-exit of thread 99: vCPUs ran on threads 222, 223"),
        (["--vcpu", "7"], "there is no VM-exit of vCPU 7: the recording has vCPUs 0, 1"),
        (["--tid", "222", "--vcpu", "1"], "there is no VM-exit of vCPU 1 in thread 222"),
        (["--tid", "222"], "there is no VM-exit 99999999: the recording has"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--as-guest"]])
def test_explain_names_the_vcpus_that_there_are(options: list[str], says: str, more: list[str]) -> None:
    done = CliRunner().invoke(cli, ["report", str(FIXTURES / f"{BOOT}.dat"), "--explain", "99999999", *options, *more])
    assert isinstance(done.exception, UsageError)
    assert says in str(done.exception)
