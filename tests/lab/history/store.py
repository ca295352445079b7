"""`python tests/lab/history/store.py DIR`: puts a handful of a run's recordings into tests/check/history, packed.

A bug of each kind, with its healthy twin, small enough for make test; manifest.json says what is expected of each.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

from writers.packing import packed

from history.catalogue import all_bugs
from history.evaluate import judge
from history.steps import step_of, twin_of
from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording

if TYPE_CHECKING:
    from typing import Any

    from history.catalogue import Bug

FOLDER = Path(__file__).resolve().parents[2] / "check" / "history"
KEPT = (
    ("real-mode-error-code", "svm"),
    ("vmrun-of-bad-address", "svm"),
    ("self-ipi-changes-icr", "svm"),
    ("page-crossing-mmio", "svm"),
    ("ud-intercept-keeps-userspace-exit", "svm"),
    ("vmread-after-page-fault", "vmx"),
)


def _store(source: Path, name: str, bug: Bug, isa: str, expected: dict[str, Any]) -> dict[str, Any]:
    target = FOLDER / f"{name}.dat"
    target.write_bytes(packed(source))
    return {
        "bug": bug.name,
        "isa": isa,
        "source": f"{isa} lab, kvm modules of linux-source-6.1: tests/lab/history/run.py",
        "command": ["kvmtrace", "record", "--backend", "ftrace", "--events", "all", *bug.trigger],
        "kernel": open_recording(target).capture.kernel,
        "bytes": target.stat().st_size,
        "sha256": hashlib.sha256(target.read_bytes()).hexdigest(),
        "expected": expected,
    }


def store(folder: Path) -> None:
    """Pack the recordings that are kept, of the run in `folder`."""
    FOLDER.mkdir(exist_ok=True)
    bugs, manifest = {bug.name: bug for bug in all_bugs()}, {}
    for name, isa in KEPT:
        bug, result = bugs[name], judge(bugs[name], isa, folder / isa)
        faulty, healthy = (folder / isa / f"{step.name}.dat" for step in (step_of(bug), twin_of(bug)))
        told = {"found": result.found, "rules": sorted(result.rules), "first": result.first}
        manifest[f"{isa}-{name}.dat"] = _store(faulty, f"{isa}-{name}", bug, isa, told)
        verdict = check_recording(open_recording(healthy))
        told = {
            "found": "invisible",
            "rules": [rule for rule, one in verdict.rules.items() if one.violated],
            "first": "",
        }
        manifest[f"{isa}-{name}-healthy.dat"] = _store(healthy, f"{isa}-{name}-healthy", bug, isa, told)
    (FOLDER / "manifest.json").write_text(json.dumps(dict(sorted(manifest.items())), indent=1) + "\n")


if __name__ == "__main__":
    store(Path(sys.argv[1]))
