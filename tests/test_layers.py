"""A layer imports only the layers before it, plus kvm and errors; recording loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "kvmtrace"
ANYWHERE = {"errors", "kvm", "isa", "_native", "__version__"}
# layer -> the layers it may import, beside ANYWHERE
ALLOWED: dict[str, set[str]] = {
    "kvm": set(),
    "isa": set(),
    "_native": set(),
    "model": set(),
    "table": set(),
    "formats": {"table"},
    "spans": {"table"},
    "check": {"model", "table", "spans"},
    "predict": {"check", "model", "table", "workload"},  # of the workload only the listings: what a guest will do
    "bring_up": {"model", "table", "spans"},
    "stats": {"table", "spans"},
    "report": {"ab", "bring_up", "check", "model", "predict", "spans", "stats", "table"},
    "ab": {"check", "formats", "model", "report", "spans", "table"},
    "render": {
        "ab",
        "bring_up",
        "check",
        "formats",
        "model",
        "predict",
        "report",
        "spans",
        "stats",
        "table",
        "workload",
    },
    "capture": {"workload"},
    "workload": set(),
    "lab": {"workload"},
}


def kvmtrace_imports(path: Path) -> set[str]:
    """Return the layers that a module imports, by the first component behind `kvmtrace.`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvmtrace"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("kvmtrace.")}
    return found


def modules() -> list[Path]:
    return [path for layer in ALLOWED for path in sorted((PACKAGE / layer).rglob("*.py"))]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    layer = path.relative_to(PACKAGE).parts[0]
    allowed = ALLOWED[layer] | {layer} | ANYWHERE
    assert kvmtrace_imports(path) <= allowed


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


HEAVY = {"numpy", "pandas", "matplotlib", "pyarrow", "rich", "jinja2", "bcc"}


LIGHT = ["kvmtrace.cli.main", "kvmtrace.cli.record", "kvmtrace.cli.doctor", "kvmtrace.workload"]


@pytest.mark.parametrize("module", LIGHT)
def test_recording_side_stays_light(module: str) -> None:
    assert not imported_by(f"import {module}") & HEAVY
