"""Which lines of kvmtrace ran (sys.settrace), and which basic blocks of its compiled loops (block_counts.c)."""

from __future__ import annotations

import ctypes
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import kvmtrace
from kvmtrace._native import _loops

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType

PACKAGE = Path(kvmtrace.__file__).parent
TRACED = ("formats", "table", "spans", "check", "bring_up", "capture")
FOLDERS = tuple(str(PACKAGE / name) + "/" for name in TRACED)
N_SLOTS = 1 << 16  # of block_counts.c


class NativeEdges:
    """What block_counts.c noted; nothing where the loops were built without it."""

    def __init__(self) -> None:
        library = ctypes.CDLL(_loops.__file__)
        try:
            arrays = [(ctypes.c_uint8 * N_SLOTS).in_dll(library, f"kvmtrace_{name}") for name in ("blocks", "edges")]
        except ValueError:
            arrays = [(ctypes.c_uint8 * N_SLOTS)() for _ in range(2)]
        self._blocks, self._edges = (np.frombuffer(array, np.uint8) for array in arrays)
        self._n = 0

    def grew(self) -> bool:
        """Say whether there are edges that were not there the last time."""
        before, self._n = self._n, int(np.count_nonzero(self._edges))
        return self._n > before

    def edges(self) -> list[int]:
        """Return the numbers of all edges."""
        return np.flatnonzero(self._edges).tolist()

    def blocks(self) -> list[int]:
        """Return the numbers of all basic blocks."""
        return np.flatnonzero(self._blocks).tolist()


class Reached:
    """Collects (file, line before, line) while tracing; the edges guide the choice of inputs."""

    def __init__(self) -> None:
        self.edges: set[tuple[str, int, int]] = set()
        self._last = 0

    def named(self) -> list[tuple[str, int, int]]:
        """Return the edges with the names of files in the package."""
        return [(file.removeprefix(f"{PACKAGE}/"), before, line) for file, before, line in self.edges]

    def call(self, function: Callable[[], Any]) -> Any:
        """Run `function` under the tracer."""
        before = sys.gettrace()
        threading.settrace(self._enter)  # of threads that are started meanwhile
        sys.settrace(self._enter)
        try:
            return function()
        finally:
            sys.settrace(before)
            threading.settrace(None)  # type: ignore[arg-type]

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(FOLDERS):
            return None
        frame.f_trace_opcodes = False
        self._last = 0
        return self._line

    def _line(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            self.edges.add((frame.f_code.co_filename, self._last, frame.f_lineno))
            self._last = frame.f_lineno
        return self._line


def _code_lines(code: CodeType) -> set[int]:
    """Lines of the functions in `code`, their `def` lines left out."""
    lines = {line for _, _, line in code.co_lines() if line and line != code.co_firstlineno}
    for constant in code.co_consts:
        if hasattr(constant, "co_lines"):
            lines |= _code_lines(constant)
    return lines


def lines_of_functions(path: Path) -> set[int]:
    """Return the lines of all functions of a module (what runs at import is left out)."""
    module = compile(path.read_text(), str(path), "exec")
    inner: set[int] = set()
    for constant in module.co_consts:
        if hasattr(constant, "co_lines"):
            is_class = "__qualname__" in constant.co_names
            parts = [c for c in constant.co_consts if hasattr(c, "co_lines")] if is_class else [constant]
            for part in parts:
                inner |= _code_lines(part)
    return inner


def line_coverage(lines: set[tuple[str, int]], folder: str = "formats") -> dict[str, tuple[int, int]]:
    """Return module -> (lines of functions that ran, lines of functions)."""
    result = {}
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        wanted, name = lines_of_functions(path), str(path.relative_to(PACKAGE))
        if wanted:
            result[name] = (len(wanted & {line for file, line in lines if file == name}), len(wanted))
    return result
