"""A suite with a planted hang, crash, failure and violation: each is told rightly, in every form of output."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree as ET

import junit_layout
import pytest
from click.testing import CliRunner
from tap_reader import read_tap

import kvmtrace.suite.suite_run as suite_run
from kvmtrace.cli.main import cli
from kvmtrace.suite.listed_test import SuiteTest
from kvmtrace.suite.own_result import own_result
from kvmtrace.suite.suite_run import Recorded, SuiteSettings, run_suite

ROOT = Path(__file__).parents[2]
HEALTHY = ROOT / "fixtures" / "svm-6.1-triple-fault.dat"
TWICE = """\
 vmm-100  [000] d..1. 1.000001: kvm_entry: vcpu 0, rip 0x1000
 vmm-100  [000] d..1. 1.000002: kvm_entry: vcpu 0, rip 0x1000
 vmm-100  [000] d..1. 1.000003: kvm_exit: reason CPUID rip 0x1000 info 0 0
"""
COMMANDS = """\
true
echo planted failure; exit 3
kill -SEGV $$
sleep 60
exit 4
true violation
true unreadable
"""
# name -> the test's own result, and whether anything is wrong
EXPECTED = {
    "true": ("pass", False),
    "echo planted failure; exit 3": ("fail", True),
    "kill -SEGV $$": ("crash", True),
    "sleep 60": ("hang", True),
    "exit 4": ("skip", False),
    "true violation": ("pass", True),
    "true unreadable": ("pass", True),
}


def without_kvm(test: SuiteTest, settings: SuiteSettings, path: Path, log: Path) -> Recorded:
    """Run the test, and give as its recording what its name asks for."""
    with log.open("wb") as out:
        try:
            done = subprocess.run(test.argv, stdout=out, stderr=out, timeout=test.timeout_s, check=False)
            status, ended_by = done.returncode, "target"
        except subprocess.TimeoutExpired:
            status, ended_by = -15, "time"
    if "violation" in test.name:
        path.write_text(TWICE)
    elif "unreadable" in test.name:
        path.write_text("no trace")
    else:
        shutil.copy(HEALTHY, path)
    return Recorded(path, status, ended_by)


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the arguments of a suite that is recorded without KVM."""
    monkeypatch.setattr(suite_run, "record_test", without_kvm)
    (tmp_path / "commands").write_text(COMMANDS)
    return ["suite", "--timeout", "500ms", "--keep", str(tmp_path / "keep"), str(tmp_path / "commands")]


def test_text(suite: list[str], tmp_path: Path) -> None:
    done = CliRunner(env={"COLUMNS": "120"}).invoke(cli, suite)
    assert done.exit_code == 1
    words = {"true": "ok", "exit 4": "skipped", "sleep 60": "HANG", "kill -SEGV $$": "CRASH", "true violation": "VIOL"}
    for name, word in words.items():
        (line,) = [line for line in done.output.splitlines() if line[11:].startswith(f"{name}  ")]
        assert line.startswith(word)
    assert "killed by signal 11 (SIGSEGV) / conforms" in done.output
    assert "| planted failure" in done.output
    assert "V2 violation: expected" in done.output
    last = "7 tests: 1 ok, 3 failed by their own word, 1 with 1 violation, 1 without a verdict, 1 skipped"
    assert done.output.splitlines()[-1] == last
    kept = {path.name for path in (tmp_path / "keep").iterdir()}
    assert kept == {
        f"{name}{suffix}"
        for name in ("echo_planted_failure_exit_3", "kill_-SEGV", "sleep_60", "true_violation", "true_unreadable")
        for suffix in (".dat", ".log")
    }


def test_tap(suite: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.tap"
    done = CliRunner().invoke(cli, [*suite[:1], "--format", "tap", "-o", str(out), *suite[1:]])
    assert done.exit_code == 1
    assert "7 tests: 1 ok" in done.output
    points = read_tap(out.read_text())
    assert {point.description: (point.said["test"], not point.ok) for point in points} == EXPECTED
    assert [point.description for point in points if point.directive == "SKIP"] == ["exit 4"]


def test_junit(suite: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.xml"
    CliRunner().invoke(cli, [*suite[:1], "--format", "junit", "-o", str(out), *suite[1:]])
    text = out.read_text()
    assert junit_layout.problems(text) == []
    cases = {case.attrib["name"]: case for case in ET.fromstring(text)}
    types = {name: [part.attrib.get("type") for part in case][:-1] for name, case in cases.items()}
    assert types == {
        "true": [],
        "echo planted failure; exit 3": ["test.fail"],
        "kill -SEGV $$": ["test.crash"],
        "sleep 60": ["test.hang"],
        "exit 4": [None],
        "true violation": ["kvmtrace.violation"],
        "true unreadable": ["kvmtrace.error"],
    }
    assert float(cases["sleep 60"].attrib["time"]) >= 0.5


def test_sarif(suite: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.sarif"
    CliRunner().invoke(cli, [*suite[:1], "--format", "sarif", "-o", str(out), *suite[1:]])
    results = json.loads(out.read_text())["runs"][0]["results"]
    found = {(one["properties"]["test"], one.get("ruleId")) for one in results}
    own = {(name, None) for name, (status, _) in EXPECTED.items() if status in ("fail", "crash", "hang")}
    assert found == own | {("true violation", "V2")}


def test_without_o_the_document_alone_is_on_standard_output(suite: list[str]) -> None:
    done = CliRunner().invoke(cli, [*suite[:1], "--format", "tap", "--only", "true", *suite[1:]])
    assert done.exit_code == 0
    assert len(read_tap(done.stdout)) == 1
    assert "1 test: 1 ok, no violation" in done.stderr


def test_an_interrupt_ends_the_suite_with_what_is_known(tmp_path: Path) -> None:
    def record(test: SuiteTest, settings: SuiteSettings, path: Path, log: Path) -> Recorded:
        log.touch()
        shutil.copy(HEALTHY, path)
        return Recorded(path, 0, "interrupt" if test.name == "b" else "target")

    outcomes = run_suite([SuiteTest(name, ("true",)) for name in "abc"], SuiteSettings(tmp_path), record)
    assert next(outcomes).name == "a"
    with pytest.raises(KeyboardInterrupt):
        next(outcomes)


def test_only_a_folder_that_is_made_is_given_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(suite_run, "invoking_user", lambda: (1000, 1000))
    monkeypatch.setattr(os, "chown", lambda path, *user: given.append(Path(path)))
    made = tmp_path / "made"
    for folder in (tmp_path, made, made):
        assert list(run_suite([SuiteTest("a", ("true",), skip="x")], SuiteSettings(folder)))
    assert given == [made]


def test_list_names_the_tests(suite: list[str]) -> None:
    done = CliRunner().invoke(cli, [*suite, "--list", "--only", "true*"])
    assert done.output == "true\ntrue violation\ntrue unreadable\n"


@pytest.mark.parametrize("words", [[], ["-o", "x", "--", "true"], ["/no/such/list"]])
def test_wrong_usage(words: list[str]) -> None:
    assert subprocess.run([sys.executable, "-m", "kvmtrace", "suite", *words], check=False).returncode == 2


@pytest.mark.parametrize(
    ("status", "hung", "verdict"),
    [
        (0, None, "pass"),
        (0, 2.0, "hang"),
        (None, None, "fail"),
        (-9, None, "crash"),
        (-64, None, "crash"),
        (139, None, "crash"),
        (77, None, "skip"),
        (124, None, "hang"),
        (254, None, "fail"),
    ],
)
def test_how_a_test_ended(status: int | None, hung: float | None, verdict: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"\xff\n" * 9000 + b"last\n")
    own = own_result(status, hung_after_s=hung, seconds=1.0, log=log, skip_codes=(4, 77))
    assert own.status == verdict
    assert own.last_words.endswith("\nlast")
    assert len(own.last_words) < 100


@pytest.mark.kvm
def test_recorded_on_this_machine(tmp_path: Path) -> None:
    """The recorder runs a guest, a crash, and a test that hangs with a child of its own: nothing of it is left."""
    guest = f"{sys.executable} -P -m kvmtrace.workload storm --count 50"
    child = tmp_path / "child"
    (tmp_path / "list").write_text(f"{guest}\nkill -ABRT $$\nsleep 99 & echo $! >{child}; cat; sleep 99\n")
    command = [sys.executable, "-m", "kvmtrace", "suite", "--timeout", "1", "--keep", tmp_path / "k", "--keep-all"]
    done = subprocess.run([*command, tmp_path / "list"], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    lines = [line for line in done.stdout.splitlines() if line[:1].isalnum()]
    assert [line.split()[0] for line in lines[:3]] == ["ok", "CRASH", "HANG"]
    assert "conforms" in lines[0]
    assert "3 tests: 1 ok, 2 failed by their own word, no violation" in done.stdout
    assert len(list((tmp_path / "k").glob("*.dat"))) == 3
    pid = int(child.read_text())
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.02)
    assert not os.path.exists(f"/proc/{pid}") or "Z (zombie)" in Path(f"/proc/{pid}/status").read_text()
