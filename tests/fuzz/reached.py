"""Which lines of kvmtrace/formats, table and spans ran: sys.settrace, no dependency."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kvmtrace

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType, FrameType

PACKAGE = Path(kvmtrace.__file__).parent
FOLDERS = tuple(str(PACKAGE / name) + "/" for name in ("formats", "table", "spans"))


class Reached:
    """Collects (file, line before, line) while tracing; the edges guide the choice of inputs."""

    def __init__(self) -> None:
        self.edges: set[tuple[str, int, int]] = set()
        self._last = 0

    def lines(self) -> set[tuple[str, int]]:
        """Return (file, line) of all lines that ran."""
        return {(file, line) for file, _, line in self.edges}

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
    for path in sorted((PACKAGE / folder).glob("*.py")):
        wanted = lines_of_functions(path)
        if wanted:
            result[path.name] = (len(wanted & {line for file, line in lines if file == str(path)}), len(wanted))
    return result
