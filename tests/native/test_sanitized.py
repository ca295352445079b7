"""The compiled kernel under the address and undefined-behaviour sanitizers: no input makes it read or write astray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmtrace import _native as kernel

SOURCE = kernel.LIBRARY.with_name("kernel.c")
TESTS = Path(__file__).parents[1]
FLAGS = ["-std=c11", "-O1", "-g", "-fPIC", "-shared", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def preload() -> str:
    names = ("libasan.so", "libubsan.so")
    return " ".join(
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in names
    )


def run_tests(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Python's own allocator would put small buffers side by side, without room between them to notice an overrun
    environment = os.environ | {
        "LD_PRELOAD": preload(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        kernel.SWITCH: str(library),
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *arguments],
        cwd=TESTS.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )


@pytest.mark.slow
def test_no_access_astray(tmp_path):
    library = tmp_path / "kernel.so"
    subprocess.run(["gcc", *FLAGS, "-o", str(library), str(SOURCE)], check=True)
    done = run_tests(library, "tests/kernel", "tests/decode", "tests/events")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_the_sanitizer_would_notice(tmp_path):
    text, library = SOURCE.read_text(), tmp_path / "kernel.so"
    astray = text.replace("if (at >= 0 && at + size <= n_bytes) {", "if (at >= 0) {")
    assert astray != text
    source = tmp_path / "kernel.c"
    source.write_text(astray)
    subprocess.run(["gcc", *FLAGS, "-o", str(library), str(source)], check=True)
    done = run_tests(library, "tests/kernel/test_kernel.py", "-k", "around_the_end")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
