"""A layer imports only the layers before it, plus kvm and errors; recording loads nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).parents[1] / "kvmtrace"
ANYWHERE = {"errors", "kvm", "isa", "_native", "lazy_dataclass", "scratch", "whole_file", "__version__"}
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
        "fleet",
        "formats",
        "model",
        "predict",
        "report",
        "spans",
        "stats",
        "table",
        "workload",
    },
    "view": {"render", "report"},
    "fleet": {"formats", "report", "spans", "stats", "table"},
    "capture": {"workload"},
    "suite": {"capture", "formats", "report"},
    "watch": {"capture"},
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


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _run_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Give the nodes of a module that run when it is imported: no functions, nothing for the type checker."""
    for child in ast.iter_child_nodes(node):
        if not _is_type_checking(child) and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _run_time_nodes(child)


def import_graph(package: Path, *, types: bool = False) -> dict[str, set[str]]:
    """Return module -> the modules of the package that it imports when it is imported.

    Parameters
    ----------
    types : imports in functions and for the type checker count as well
    """
    names = {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(package.rglob("*.py"))
    }
    graph: dict[str, set[str]] = {name: set() for name in names}
    for name, path in names.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree) if types else _run_time_nodes(tree):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & names.keys()
            elif isinstance(node, ast.ImportFrom) and node.module in names:
                below = {f"{node.module}.{alias.name}" for alias in node.names}
                # `from package import module` needs the package only to find the module
                graph[name] |= below & names.keys() or {node.module}
        graph[name].discard(name)
        if types and path.name == "__init__.py":  # a package's face opens its own parts when they are asked for
            graph[name] = {other for other in graph[name] if not other.startswith(f"{name}.")}
    return graph


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the names of one circle in order, [] if there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if circle := walk(other, [*path, name]):
                return circle
        done.add(name)
        return []

    for name in sorted(graph):
        if circle := walk(name, []):
            return circle
    return []


def test_modules_import_in_no_circle() -> None:
    """Not for a type alone either: who reads one file never needs another that needs it."""
    assert find_circle(import_graph(PACKAGE, types=True)) == []


def test_folders_import_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for name, imported in import_graph(PACKAGE, types=True).items():
        layer = name.split(".")[1] if "." in name else ""
        others = {other.split(".")[1] for other in imported if "." in other}
        graph.setdefault(layer, set()).update(others - {layer})
    graph.pop("", None)
    assert find_circle(graph) == []


def test_circles_are_found(tmp_path: Path) -> None:
    package = tmp_path / "toy"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "a": "def f():\n    from toy.b import x",
        "b": "from toy import c",
        "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from toy.a import f",
    }.items():
        (package / f"{name}.py").write_text(text)
    assert find_circle(import_graph(package)) == []
    assert sorted(find_circle(import_graph(package, types=True))) == ["toy.a", "toy.b", "toy.c"]
    (package / "c.py").write_text("import toy.b")
    assert sorted(find_circle(import_graph(package))) == ["toy.b", "toy.c"]


def test_no_file_name_is_there_twice() -> None:
    """Whoever is told a file's name finds one file."""
    places: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.stem not in {"__init__", "__main__"}:
            places.setdefault(path.name, []).append(str(path.relative_to(PACKAGE)))
    assert not {name: found for name, found in places.items() if len(found) > 1}


LONGEST_FUNCTION = 60  # lines, with signature and docstring


def test_no_function_is_longer_than_a_screen() -> None:
    long = [
        f"{path.relative_to(PACKAGE)}: {node.name}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
    ]
    assert not long


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


HEAVY = {"numpy", "pandas", "matplotlib", "pyarrow", "rich", "jinja2", "bcc"}


LIGHT = ["kvmtrace.cli.main", "kvmtrace.cli.record", "kvmtrace.cli.doctor", "kvmtrace.workload"]


@pytest.mark.parametrize("module", LIGHT)
def test_recording_side_stays_light(module: str) -> None:
    assert not imported_by(f"import {module}") & HEAVY


LONG_TO_IMPORT = {
    "scipy",
    "pandas",
    "pyarrow",
    "matplotlib",
    "jinja2",
    "rich",
    "importlib.metadata",
    "numpy.ma",
    "zipfile",
}


@pytest.mark.parametrize("command", ["report", "check"])
def test_a_small_recording_waits_for_few_imports(command: str) -> None:
    """The text of a small recording takes little longer than NumPy's own start; what few commands need, they import."""
    fixture = PACKAGE.parent / "fixtures" / "svm-6.1-storm.dat"
    argv = [sys.executable, "-X", "importtime", "-m", "kvmtrace", command, str(fixture)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "kvmtrace.check.engine" in modules
    assert not modules & LONG_TO_IMPORT
