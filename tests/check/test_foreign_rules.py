"""Rules of other packages, and a new rule as one file: found by themselves, run in check, report and replay."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FIXTURE = ROOT / "fixtures" / "vmx-6.1-msr-gp.dat"
TOY = '''"""T1: a rule for this test."""

from kvmtrace.check.rule import VIOLATION, Rule

RULE = Rule("H99", "toy", VIOLATION, ("kvm_entry",), "No guest is entered.", "nowhere", places="VM-entry")


@RULE.part()
def _none(excerpt, found):
    positions = excerpt.segments.positions("VM-entry")
    found.check(len(positions))
    found.violate(positions, lambda _: ("no kvm_entry", "one"))
'''


def run(*words: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with `path` before all others."""
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=False, cwd=path
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the package of foreign_rules/ as a user would, without a network."""
    source = shutil.copytree(HERE / "foreign_rules", tmp_path_factory.mktemp("source") / "package")
    target = tmp_path_factory.mktemp("site")
    words = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


def test_it_fires_in_check(installed: Path) -> None:
    done = run("-m", "kvmtrace", "check", "--format", "json", str(FIXTURE), path=installed)
    assert done.returncode == 0, done.stderr  # suspicions only
    model = json.loads(done.stdout)["model"]
    assert model["rules"]["X1"]["violated"] > 0
    found = next(violation for violation in model["violations"] if violation["rule"] == "X1")
    assert (found["event"], found["why"]) == ("kvm_msr", "A guest of this site accesses no model-specific register.")


def test_what_is_wrong_with_others_is_a_line_each(installed: Path) -> None:
    done = run("-m", "kvmtrace", "check", str(FIXTURE), path=installed)
    assert "Traceback" not in done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert "rule taken (kvmtrace_quiet_guest:SAME_NAME) was not loaded: there is a rule V1 already" in text
    assert "rule gone (kvmtrace_no_such_module:RULE) was not loaded: ModuleNotFoundError" in text
    assert "rule X2 failed and was left out: ZeroDivisionError: no rule divides by zero" in text


def test_it_fires_in_report_and_replay(installed: Path) -> None:
    done = run("-m", "kvmtrace", "report", str(FIXTURE), path=installed)
    assert done.returncode == 0, done.stderr
    assert "suspicion of X1" in done.stdout
    code = f"import kvmtrace; print(kvmtrace.load({str(FIXTURE)!r}).replay().comparison.rules['X1'].violated)"
    done = run("-c", code, path=installed)
    assert int(done.stdout) > 0, done.stderr


def test_a_new_rule_is_one_file(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kvmtrace", tmp_path / "kvmtrace", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kvmtrace" / "check" / "rules" / "h99_toy.py").write_text(TOY)
    done = run("-m", "kvmtrace", "check", str(FIXTURE), path=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "violation of H99" in done.stdout
    done = run("-m", "kvmtrace", "report", "--format", "json", str(FIXTURE), path=tmp_path)
    assert json.loads(done.stdout)["model"]["rules"]["H99"]["violated"] > 0
    done = run("-m", "kvmtrace", "model", path=tmp_path)
    assert "No guest is entered." in done.stdout
