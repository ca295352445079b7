"""Outcomes as TAP, JUnit XML and SARIF: each is well-formed, and each says the same."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import jsonschema
import junit_layout
import pytest
from tap_reader import read_tap

from kvmtrace.check.verdict import Comparison, ContextEvent, RuleResult, Violation
from kvmtrace.render.results import FORMATS, render_outcomes
from kvmtrace.report.document import CaptureInfo, LossInfo, Report
from kvmtrace.report.outcome import Outcome, OwnResult, totals

HERE = Path(__file__).parent
SARIF = jsonschema.Draft4Validator(json.loads((HERE / "sarif-2.1.0-rtm.5.json").read_text()))
EVIL = 'tests/<a> & "b" #1 \\ é\x00\x1b[31m\udcff.dat'


def violation(rule: str = "V6", severity: str = "violation") -> Violation:
    context = tuple(ContextEvent(i, i * 1000, 0, 7, "kvm_exit", {"guest_rip": 4096 + i}) for i in (4, 5, 6))
    words = {"expected": "rip 0x1002", "observed": "rip 0x1003 \x07", "why": "It is skipped.", "source": "x86.c"}
    return Violation(rule, severity, 5000, 7, 0, 1, 5, "kvm_entry", **words, context=context, vm_exit=2)


def report(*found: Violation, checks: int = 10) -> Report:
    broken = [one for one in found if one.severity == "violation"]
    capture = CaptureInfo("x.dat", "trace.dat", None, None, None, "vmx", None, None, (), 9, 0, 1, None)
    model = Comparison(
        rules={"V6": RuleResult(checks, checks - len(broken), len(broken))} if checks else {},
        violations=found,
        n_violations=len(broken),
        n_suspicions=len(found) - len(broken),
        first_divergence=found[-1] if found else None,
        n_events=9,
        n_kvm_events=9,
        judged_share=0.99,
    )
    return Report(capture, LossInfo(0, {}, truncated=False, discarded_intervals=0), model=model)


def own(status: str, words: str) -> OwnResult:
    return OwnResult(status, words, 1.25, "log.txt", "last words ]]> \x0b")  # type: ignore[arg-type]


OUTCOMES = [
    Outcome("good.dat", report(), recording="good.dat"),
    Outcome(EVIL, report(violation(), violation("V7")), recording=EVIL),
    Outcome("/abs/suspicious.dat", report(violation("H3", "suspicion")), recording="/abs/suspicious.dat"),
    Outcome("bad.dat", error="bad.dat: no trace", error_code=3),
    Outcome("blind.dat", report(checks=0)),
    Outcome("t/passes", report(), own=own("pass", "exit code 0")),
    Outcome("t/fails", report(), own=own("fail", "exit code 254")),
    Outcome("t/crashes", report(violation()), own=own("crash", "killed by signal 11"), recording="k/c.dat"),
    Outcome("t/hangs", report(), own=own("hang", "no end after 2 s")),
    Outcome("t/skipped", report(checks=0), own=own("skip", "exit code 4")),
]
FAILED = {1, 3, 6, 7, 8}
SKIPPED = {4, 9}


def test_totals() -> None:
    sums = totals(OUTCOMES)
    assert (sums.all, sums.failed, sums.skipped, sums.passed) == (10, 5, 2, 3)
    assert (sums.violating, sums.violations, sums.suspicions, sums.errors, sums.own_failed) == (2, 3, 1, 1, 3)


def test_tap() -> None:
    points = read_tap(render_outcomes(OUTCOMES, "tap", "kvmtrace check"))
    assert {i for i, point in enumerate(points) if not point.ok} == FAILED
    assert {i for i, point in enumerate(points) if point.directive == "SKIP"} == SKIPPED
    assert next(point.description for point in points if point.description.startswith("t/")) == "t/passes"
    assert "#1" in points[1].description
    assert points[1].said["findings"][0]["rule"] == "V7", "the first divergence comes first"
    assert points[7].said["test"] == "crash"
    assert points[7].said["violations"] == 1
    assert points[9].reason == "exit code 4"


def test_junit() -> None:
    text = render_outcomes(OUTCOMES, "junit", "kvmtrace check")
    assert junit_layout.problems(text) == []
    cases = ET.fromstring(text).findall("testcase")
    assert {i for i, case in enumerate(cases) if {"failure", "error"} & {part.tag for part in case}} == FAILED
    assert {i for i, case in enumerate(cases) if case.find("skipped") is not None} == SKIPPED
    (crash,) = cases[7].findall("error")
    assert crash.attrib["type"] == "test.crash"
    assert "killed by signal 11" in crash.attrib["message"]
    (broken,) = cases[7].findall("failure")
    assert "V6 violation" in broken.attrib["message"]
    assert "kvmtrace report k/c.dat --explain 2 --tid 7" in (broken.text or "")


def test_junit_layout_refuses() -> None:
    good = render_outcomes(OUTCOMES, "junit", "kvmtrace check")
    for old, new in (
        ('tests="10"', ""),
        ('tests="10"', 'tests="11"'),
        ("<testcase ", '<testcase color="red" '),
        ('time="1.250"', 'time="1.25 s"'),
        ("<system-out>", "<system-out/><failure type='x'/><system-out>"),
    ):
        assert old in good
        assert junit_layout.problems(good.replace(old, new, 1)), new


def test_sarif() -> None:
    text = render_outcomes(OUTCOMES, "sarif", "kvmtrace check")
    log = json.loads(text)
    assert list(SARIF.iter_errors(log)) == []
    (run,) = log["runs"]
    results = run["results"]
    levels = [(one.get("ruleId"), one["level"]) for one in results]
    assert levels.count(("V6", "error")) == 2
    assert levels.count(("H3", "warning")) == 1
    assert levels.count((None, "error")) == 3  # a test's own failure, crash, hang
    for one in results:
        if "ruleIndex" in one:
            assert run["tool"]["driver"]["rules"][one["ruleIndex"]]["id"] == one["ruleId"]
    flow = results[0]["codeFlows"][0]["threadFlows"][0]["locations"]
    assert len(flow) == 3
    uris = {one["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for one in results}
    assert "file:///abs/suspicious.dat" in uris
    assert any("%26" in uri and " " not in uri for uri in uris)
    invocation = run["invocations"][0]
    assert invocation["executionSuccessful"] is False
    assert "bad.dat: no trace" in invocation["toolExecutionNotifications"][0]["message"]["text"]


def test_sarif_without_findings_and_refusals() -> None:
    log = json.loads(render_outcomes(OUTCOMES[:1], "sarif", "x"))
    assert list(SARIF.iter_errors(log)) == []
    log["runs"][0]["results"] = [{"level": "fatal"}]
    assert list(SARIF.iter_errors(log))


@pytest.mark.parametrize("output_format", FORMATS)
def test_nothing_but_printable_text(output_format: str) -> None:
    text = render_outcomes(OUTCOMES, output_format, "kvmtrace check")
    text.encode()
    assert all(char.isprintable() or char == "\n" for char in text)
