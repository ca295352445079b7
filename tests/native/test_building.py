"""The compiled loops are built from one header, and who cannot build them is told what to install."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvmtrace._native import _loops, arrays, compiling

NATIVE = Path(compiling.__file__).parent
FUNCTION = re.compile(r"^(?:int64_t|void) (\w+)\(", re.MULTILINE)


def test_every_function_is_declared_once_defined_and_called():
    declared = FUNCTION.findall(compiling.declarations())
    defined = [name for path in NATIVE.glob("*.c") for name in FUNCTION.findall(path.read_text())]
    called = {
        node.attr
        for path in NATIVE.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lib"
    }
    assert sorted(declared) == sorted(defined) == sorted(called)
    assert set(declared) <= set(dir(_loops.lib))


def test_an_array_of_another_type_is_refused():
    """A prototype is held against each call: 64-bit values never pass for 32-bit ones."""
    number = np.zeros(3, np.uint16)
    counts = arrays.filled(np.zeros(1, np.int64))
    good = [arrays.given(np.zeros(3, dtype)) for dtype in (np.int32, np.uint8)]
    tids = arrays.given(np.array([0], np.int32))
    assert _loops.lib.count_tracked(*good, 3, tids, 1, arrays.filled(number), counts) == 3
    wrong = arrays.given(np.zeros(3, np.int64))
    with pytest.raises(TypeError, match="int32_t"):
        _loops.lib.count_tracked(wrong, good[1], 3, tids, 1, arrays.filled(number), counts)


def test_arrays_that_c_cannot_walk_are_refused():
    with pytest.raises(ValueError, match="contiguous"):
        arrays.given(np.zeros(6, np.int32)[::2])
    with pytest.raises(ValueError, match="read-only"):
        arrays.filled(np.frombuffer(bytes(8), np.int64))
    with pytest.raises(KeyError):
        arrays.given(np.zeros(3, np.float32))


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(compiling.CannotCompileError, match=r"no C compiler.*apt install gcc libc6-dev python3-dev"):
        compiling.build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(compiling.CannotCompileError, match="apt install python3-dev"):
        compiling.build(tmp_path)


def test_a_prototype_that_does_not_fit_does_not_compile(tmp_path):
    for path in NATIVE.glob("*.[ch]"):
        (tmp_path / path.name).write_text(path.read_text())
    source = tmp_path / "thread_rows.c"
    source.write_text(source.read_text().replace("void latest_wanted(const uint8_t", "void latest_wanted(const int8_t"))
    with pytest.raises(compiling.CannotCompileError, match=r"conflicting types for .latest_wanted"):
        compiling.build(tmp_path, sources=tmp_path)
    assert not (tmp_path / compiling.LIBRARY).exists()


def test_the_program_says_it_in_one_line(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    done = subprocess.run([sys.executable, compiling.__file__], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: kvmtrace's inner loops are written in C and there is no C compiler")
    assert len(done.stderr.splitlines()) == 1


def test_it_is_built_for_all_versions_of_python():
    assert Path(_loops.__file__).name == compiling.LIBRARY == "_loops.abi3.so"
    assert compiling.is_current()


def test_the_hook_reports_it_as_the_build_tool_does(monkeypatch):
    spec = importlib.util.spec_from_file_location("build_hook", NATIVE / "build_hook.py")
    hook_module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook_module)
    monkeypatch.setenv("CC", "no-such-compiler")

    class App:
        def abort(self, text):
            raise SystemExit(text)

    hook = hook_module.LoopsBuildHook(str(NATIVE.parents[1]), {}, None, None, "", "wheel", App())
    with pytest.raises(SystemExit, match=r"kvmtrace cannot be built: .*apt install gcc"):
        hook.initialize("standard", {"artifacts": []})
