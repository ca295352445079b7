"""The compiled loops under the address and undefined-behaviour sanitizers: no input makes them read or write astray.

Nothing in kvmtrace can be told to use another build. A copy of the package with one of its own stands in a folder
that is first on the path of a process of its own.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "kvmtrace"
FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def preload() -> str:
    names = ("libasan.so", "libubsan.so")
    return " ".join(
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    )


def sanitized(folder: Path, change: tuple[str, str, str] | None = None) -> Path:
    """Make a copy of kvmtrace whose loops are built with the sanitizers; `change`: (file, text, its replacement)."""
    copy = folder / "kvmtrace"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (folder / "fixtures").symlink_to(PACKAGE.parent / "fixtures")
    native = copy / "_native"
    if change is not None:
        name, old, new = change
        text = (native / name).read_text()
        assert old in text
        (native / name).write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("compiling", native / "compiling.py")
    assert spec is not None
    assert spec.loader is not None
    compiling = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compiling)
    compiling.build(native, flags=FLAGS)
    return folder


def run_tests(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "LD_PRELOAD": preload(),
        "ASAN_OPTIONS": "detect_leaks=0",
        # Python's own allocator would put small buffers side by side, without room between them to notice an overrun
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(folder),
        "PYTHONSAFEPATH": "1",  # the working directory's kvmtrace does not come first
        "SANITIZED": str(folder),
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *arguments],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )


def test_which_build_this_is():
    """Within `run_tests` it is the sanitized one; otherwise the one beside the sources that are tested."""
    from kvmtrace._native import _loops

    where = Path(_loops.__file__).parents[2]
    assert where == Path(os.environ.get("SANITIZED", PACKAGE.parent))


@pytest.mark.slow
def test_no_access_astray(tmp_path):
    decoders = [f"tests/formats/test_{name}.py" for name in ("ring_buffer", "perf_records", "chunks", "mutations")]
    done = run_tests(sanitized(tmp_path), "tests/native", *decoders)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_the_sanitizer_would_notice(tmp_path):
    change = ("field_bytes.c", "if (at >= 0 && at + size <= n_bytes) {", "if (at >= 0) {")
    done = run_tests(sanitized(tmp_path, change), "tests/native/test_decoding_loops.py", "-k", "around_the_end")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
