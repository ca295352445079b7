"""The historic bugs as data, the page that shows them, and (in make test-lab) all of them run again."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from faults.nested import NESTED_FAULTS

from history.catalogue import AREAS, FOUND, all_bugs, put_back
from history.evaluate import evaluate, named
from history.run import _script, record_all
from history.steps import step_of, steps_for, twin_of
from history.table import PAGE, page, read_results, short_table
from kvmtrace.check.rule_registry import all_rules

HERE = Path(__file__).parent
BUGS = all_bugs()


def test_enough_is_judged_and_put_back() -> None:
    assert len(BUGS) >= 40
    assert len(put_back()) >= 25
    assert {"vmx", "svm"} == {isa for bug in put_back() for isa in bug.isas}
    assert sum(bug.area == "nested" for bug in put_back()) >= 5
    assert {bug.area for bug in BUGS} <= set(AREAS)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_each_is_told_in_full(bug) -> None:
    assert re.fullmatch(r"([0-9a-f]{12,40})?", bug.commit)
    assert bug.subject
    assert bug.where
    assert bug.fault.endswith(".")
    assert bool(bug.edits) != bool(bug.left_out), "either put back or left out with a reason"
    if bug.left_out:
        return
    assert bug.functions
    assert bug.trigger
    assert bug.trace.endswith(".")
    assert set(bug.expect) == set(bug.isas)
    assert set(bug.expect.values()) <= set(FOUND)
    assert ("invisible" not in bug.expect.values()) or bug.why, "what would show it?"
    silent = {isa for isa, found in bug.expect.items() if found == "invisible"}
    assert set(bug.sign or {}) == silent, "how is it known that the fault happened?"
    assert bool(bug.probes) == bool(bug.probe_shows)
    re.compile(bug.probe_shows)
    assert set(bug.rules) <= set(all_rules())
    assert sum(edit.replacement.count("\n") + 1 for edit in bug.edits) <= 6, "a few lines"


def test_every_bug_has_a_healthy_twin_before_it() -> None:
    for isa in ("svm", "vmx"):
        steps = steps_for(isa)
        assert len({step.name for step in steps}) == len(steps)
        for bug in put_back(isa):
            assert steps.index(twin_of(bug)) < steps.index(step_of(bug))
            assert twin_of(bug).edits == bug.aged


def test_the_boots_script_is_shell() -> None:
    steps = steps_for("svm")
    script = _script("svm", steps, dict.fromkeys(steps, "modules-0"))
    assert subprocess.run(["sh", "-n"], input=script, text=True, capture_output=True, check=False).stderr == ""


def test_the_guests_compile(tmp_path: Path) -> None:
    command = ["cc", "-Wall", "-Werror", "-static", "-O1", "-o", str(tmp_path / "trigger"), str(HERE / "trigger.c")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    modes = set(re.findall(r'^\t\{"([a-z0-9-]+)", CODE_OF', (HERE / "trigger.c").read_text(), re.MULTILINE))
    programs = (*(bug.trigger for bug in put_back()), *(fault.target for fault in NESTED_FAULTS))
    used = {program[-1] for program in programs if "./trigger" in program}
    assert used == modes


def test_the_page_is_that_of_the_results() -> None:
    assert PAGE.read_text() == page(read_results())
    readme = (HERE.parents[2] / "README.md").read_text()
    assert short_table(read_results()) in readme
    assert f"{len(BUGS)} upstream fixes of KVM were judged, {len(put_back())} of them undone" in readme


def test_every_run_has_a_result() -> None:
    assert {(told["bug"], told["isa"]) for told in read_results()} == {
        (bug.name, isa) for bug in put_back() for isa in bug.isas
    }


def test_the_results_are_as_expected() -> None:
    bugs = {bug.name: bug for bug in BUGS}
    for result in read_results():
        bug = bugs[result["bug"]]
        assert result["found"] == bug.expect[result["isa"]], bug.name
        assert set(bug.rules) >= set(result["rules"]) or not bug.rules, (bug.name, result["rules"])
        assert result["false_alarms"] == 0, bug.name


def test_what_a_finding_names() -> None:
    bug = next(bug for bug in BUGS if bug.name == "vmread-after-page-fault")
    assert named(bug, "handle_vmread (vmx/nested.c); V6's source") == "function"
    assert named(bug, "handle_vmwrite (vmx/nested.c)") == "file"
    assert named(bug, "kvm_emulate_cpuid (cpuid.c)") == "no"


@pytest.mark.lab
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["svm", "vmx"])
def test_the_lab_finds_the_same(isa: str, tmp_path: Path) -> None:
    record_all(isa, tmp_path / isa, said=True)
    bugs = {bug.name: bug for bug in put_back(isa)}
    results = evaluate([isa], tmp_path)
    assert {result["bug"]: result["found"] for result in results} == {
        name: bug.expect[isa] for name, bug in bugs.items()
    }
    assert not [result for result in results if result["false_alarms"]]
