"""`kvmtrace check`: what it demands of a recording, and what its exit code says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
SMP = str(FIXTURES / "vmx-6.1-smp.dat")
NO_KVM = (
    "x-1 [000] ..... 1.0: sched_switch: prev_comm=a prev_pid=1 prev_prio=120 prev_state=1 "
    "next_comm=b next_pid=2 next_prio=1\n"
)
BLIND = " vmm-100  [000] ..... 1.000001: kvm_hv_timer_state: vcpu_id=0 hv_timer_in_use=1\n"


class Result(NamedTuple):
    exit_code: int
    output: str


def check(*words: str) -> Result:
    command = [sys.executable, "-m", "kvmtrace", "check", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return Result(done.returncode, done.stdout)


def test_a_recording_without_kvm_events_is_one_line_and_code_3(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(NO_KVM)
    for words in ([], ["--format", "json"]):
        done = check(*words, str(path))
        assert done.exit_code == 3
        assert len(done.output.splitlines()) == 1
        assert "none of its 1 events is of KVM" in done.output


def test_events_of_which_nothing_can_be_checked(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text(BLIND)
    done = check(str(path))
    assert done.exit_code == 0
    assert "Model:   nothing checked" in done.output
    assert "conforms" not in done.output


def test_the_verdict_names_the_rules_that_were_not_checked(tmp_path: Path) -> None:
    path = tmp_path / "renamed.dat"
    data = (FIXTURES / "vmx-6.1-lifecycle.dat").read_bytes()
    path.write_bytes(data.replace(b"unsigned int exit_reason;", b"unsigned int exit_reasom;"))
    done = check(str(path))
    for rule in ("V4", "V5", "V6", "V7", "V13", "J1"):
        assert f"{rule} not checked: kvm_exit.exit_reason was not recorded" in done.output
    document = json.loads(check("--format", "json", str(path)).output)["model"]
    missing = {one["rule"]: one["missing"] for one in document["not_checked"] if not one["part"]}
    assert missing["V6"] == ["kvm_exit.exit_reason"]
    assert document["rules"]["V6"]["unknown"] > 100


@pytest.mark.parametrize(
    ("rules", "code", "says"),
    [
        ("V6,V8", 0, "conforms"),
        ("J5", 4, "J5 not checked: kvm_entry.intr_info was not recorded"),
        ("V6,V99", 2, "there is no rule V99"),
    ],
)
def test_required_rules(rules: str, code: int, says: str) -> None:
    done = check("--require", rules, SMP)
    assert done.exit_code == code
    assert says in " ".join(done.output.split())


def test_the_verdict_says_what_it_rests_on() -> None:
    assert "of the vCPU threads' events judged" in " ".join(check(SMP).output.split())
    document = json.loads(check("--format", "json", SMP).output)["model"]
    assert 0.9 < document["judged_share"] < 1
    sparse = check("--format", "json", str(FIXTURES / "svm-6.1-linux-1vcpu.dat"))
    not_seen = json.loads(sparse.output)["model"]["coverage"]["not_seen"]
    assert {"part": "halt and wake-up", "recorded": False} in not_seen


STORM = str(FIXTURES / "svm-6.1-storm.dat")


def broken(tmp_path: Path) -> str:
    """Return a recording with a violation: a case of the model, without its header."""
    path = tmp_path / "broken.txt"
    path.write_text(BROKEN)
    return str(path)


BROKEN = """\
 vmm-100  [000] d..1. 1.000001: kvm_entry: vcpu 0, rip 0x1000
 vmm-100  [000] d..1. 1.000002: kvm_entry: vcpu 0, rip 0x1000
 vmm-100  [000] d..1. 1.000003: kvm_exit: reason CPUID rip 0x1000 info 0 0
"""


def test_many_files_are_one_line_each_with_totals(tmp_path: Path) -> None:
    wrong = broken(tmp_path)
    done = check(SMP, wrong, STORM, str(tmp_path / "absent.dat"))
    assert done.exit_code == 2, "as a missing file alone"
    lines = done.output.splitlines()
    assert sum("vmx-6.1-smp.dat" in line for line in lines) == 1
    assert any(re.search(r"broken\.txt +1 VIOLATION ", line) for line in lines)
    assert any("violation of V2" in line for line in lines)
    assert "4 recordings: 2 conform, 1 with 1 violation, 1 without a verdict" in done.output
    assert "Rules of the reference model" not in done.output
    assert len(lines) < 40


def test_verbose_tells_all_of_many(tmp_path: Path) -> None:
    done = check("-v", SMP, STORM)
    assert done.exit_code == 0
    assert done.output.count("Rules of the reference model") == 2
    assert "2 recordings: 2 conform, 0 violate" in done.output


def test_quiet_prints_only_what_is_wrong(tmp_path: Path) -> None:
    assert check("-q", SMP, STORM) == Result(0, "")
    assert check("-q", SMP) == Result(0, "")
    done = check("-q", SMP, broken(tmp_path))
    assert done.exit_code == 1
    assert "violation of V2" in done.output
    assert SMP not in done.output
    assert check("-q", "--format", "tap", SMP).exit_code == 2


def test_formats_of_ci(tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrong = broken(tmp_path)
    for name, good, bad in (
        ("tap", f"ok 1 - {SMP}\n", f"not ok 2 - {wrong}\n"),
        ("junit", f'<testcase name="{SMP}"', 'type="kvmtrace.violation"'),
        ("sarif", '"version": "2.1.0"', '"ruleId": "V2"'),
    ):
        assert check("--format", name, "-o", str(out), "--force", SMP, wrong) == Result(1, "")
        assert good in out.read_text()
        assert bad in out.read_text()


def test_the_output_is_no_input() -> None:
    assert check("--format", "tap", "-o", STORM, STORM).exit_code == 2


def test_anonymized_recordings_have_numbers(tmp_path: Path) -> None:
    done = check("--anonymize", "--format", "tap", SMP, STORM)
    assert "ok 1 - recording 1\n" in done.output
    assert SMP not in done.output
