"""`kvmtrace suite` in both labs: KVM's selftests and bundled guests, on a healthy KVM and on a faulty one.

Beside them a planted crash and a planted hang; the faulty KVM breaks the model for one guest, which passes by its own
word. Each output form says the same, and keeps to its definition.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from importlib import metadata, util
from pathlib import Path

import jsonschema
import junit_layout
import pytest
from faults.catalogue import FAULTS, Edit
from history.build import build_variants
from selftests.build import build_selftests
from tap_reader import read_tap

from kvmtrace.lab import Job, run_lab

pytestmark = [pytest.mark.lab, pytest.mark.slow]
SARIF = jsonschema.Draft4Validator(
    json.loads((Path(__file__).parents[1] / "results" / "sarif-2.1.0-rtm.5.json").read_text())
)
FAULT = next(fault for fault in FAULTS if fault.name == "fpu-stays-loaded")  # nothing but the model sees it
VENDOR = {"svm": "kvm-amd", "vmx": "kvm-intel"}
SELFTESTS = {
    "svm": ("set_sregs_test", "svm_vmcall_test", "sync_regs_test"),
    "vmx": ("set_sregs_test", "vmx_set_nested_state_test"),  # under Bochs each takes half a minute
}
LIFECYCLE = "python3 -m kvmtrace.workload lifecycle --count 2"
GUESTS = {"svm": (LIFECYCLE, "python3 -m kvmtrace.workload msr-gp --count 2"), "vmx": (LIFECYCLE,)}
LIMIT = {"svm": "40s", "vmx": "20s"}  # QEMU's guests go by the wall clock, however busy this machine is
FORMS = {"svm": ("junit", "tap", "sarif"), "vmx": ("tap", "sarif")}  # on the faulty KVM
COMMAND = {"svm": "kvmtrace", "vmx": "PYTHONPATH=/usr/lib/kvmtrace:./site python3 -m kvmtrace"}
PLANTED = {"crash_test": "kill -SEGV $$", "hang_test": "sleep 120"}
# what numpy consists of that `check` does not need: Bochs is slow at reading files
_UNUSED = ("tests", "f2py", "include", "__pycache__", "*.pyi", "*.a", "doc", "distutils", "testing")
SCRIPT = """
one() {{
    form=$1 kept=$2
    shift 2
    {command} suite --backend ftrace --timeout {limit} --keep $kept --format $form -o $kept.$form "$@" \\
        tests guests >$kept.txt 2>&1
    echo $? >$kept.status
}}
one junit healthy
for module in {vendor} kvm; do ./busybox rmmod $(echo $module | tr - _) || exit 1; done
./busybox insmod modules/kvm.ko && ./busybox insmod modules/{vendor}.ko || exit 1
for form in {forms}; do one $form faulty-$form --only "*lifecycle*"; done
"""


def script_for(isa: str) -> str:
    """Return what the lab's host runs."""
    return SCRIPT.format(command=COMMAND[isa], vendor=VENDOR[isa], forms=" ".join(FORMS[isa]), limit=LIMIT[isa])


def _fill(work: Path, isa: str) -> None:
    """Put tests, guests, modules and what the host lacks into the lab's directory."""
    (work / "tests").mkdir()
    for name, text in PLANTED.items():
        (work / "tests" / name).write_text(f"#!/bin/sh\n{text}\n")
        (work / "tests" / name).chmod(0o755)
    programs = build_selftests(isa, "6.1").folder
    for name in SELFTESTS[isa]:
        shutil.copy(programs / name, work / "tests")
    (work / "guests").write_text("".join(f"{command}\n" for command in GUESTS[isa]))
    edits = (Edit(FAULT.file, FAULT.function, FAULT.pattern, FAULT.replacement),)
    modules = build_variants([edits])[edits]
    (work / "modules").mkdir()
    for name in ("kvm", VENDOR[isa]):
        shutil.copy(modules / f"{name}.ko", work / "modules")
    shutil.copy(shutil.which("busybox") or "/bin/busybox", work / "busybox")
    if isa == "vmx":
        _add_numpy(work / "site")


def _add_numpy(site: Path) -> None:
    """Add the packages that `check` needs, and the libraries that they are linked to: the VMX host has neither."""
    for name in ("numpy", "zstandard", "iced_x86"):
        found = util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        shutil.copytree(Path(found.origin).parent, site / name, ignore=shutil.ignore_patterns(*_UNUSED))
    for file in metadata.files("numpy") or []:
        if file.parts[0] == "numpy.libs":
            (site / "numpy.libs").mkdir(exist_ok=True)
            shutil.copy(str(file.locate()), site / "numpy.libs")
    backend = util.find_spec("_cffi_backend")
    assert backend is not None
    shutil.copy(str(backend.origin), site)
    objects = [str(path) for path in site.rglob("*.so*")]
    told = subprocess.run(["ldd", *objects], capture_output=True, text=True, check=True).stdout
    for path in sorted(set(re.findall(r"=> (/\S+)", told))):
        name = Path(path).name
        if name != "libc.so.6" and not (site / "numpy.libs" / name).exists():
            shutil.copy(path, site / "numpy.libs")


def cases_of(path: Path) -> dict[str, tuple[str, ...]]:
    """Return what a JUnit file says of each test: the types of its failures and errors."""
    text = path.read_text()
    assert junit_layout.problems(text) == []
    return {
        case.attrib["name"]: tuple(part.attrib["type"] for part in case if part.tag in ("failure", "error"))
        for case in ET.fromstring(text)
    }


@pytest.mark.parametrize("isa", ["svm", "vmx"])
def test_a_suite(isa: str, tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    work.mkdir()
    _fill(work, isa)
    script = script_for(isa)
    job = Job(
        isa,
        ("sh", "-c", script),
        cwd=work,
        out=out,
        timeout_s=1200,
        memory_mib={"svm": 3072, "vmx": 2048}[isa],
        environment={"LD_LIBRARY_PATH": "./site/numpy.libs"} if isa == "vmx" else {},
    )
    result = run_lab(job)
    assert result.status == 0, (result.stdout + result.stderr).decode()[-2000:]
    planted = {"crash_test": ("test.crash",), "hang_test": ("test.hang",)}
    assert cases_of(out / "healthy.junit") == dict.fromkeys((*SELFTESTS[isa], *GUESTS[isa]), ()) | planted
    kept = ("healthy", *(f"faulty-{form}" for form in FORMS[isa]))
    assert {(out / f"{name}.status").read_text() for name in kept} == {"1\n"}
    (point,) = read_tap((out / "faulty-tap.tap").read_text())
    assert (point.description, point.ok, point.said["test"]) == (LIFECYCLE, False, "pass")
    log = json.loads((out / "faulty-sarif.sarif").read_text())
    assert list(SARIF.iter_errors(log)) == []
    assert {(one["properties"]["test"], one["ruleId"]) for one in log["runs"][0]["results"]} == {(LIFECYCLE, "V1")}
    assert "V1 violation: expected" in (out / "faulty-sarif.txt").read_text()
    if "junit" in FORMS[isa]:
        assert cases_of(out / "faulty-junit.junit") == {LIFECYCLE: ("kvmtrace.violation",)}


def test_the_script_is_shell() -> None:
    assert (
        subprocess.run(["sh", "-n"], input=script_for("vmx"), text=True, capture_output=True, check=False).stderr == ""
    )
