"""The compiled loops under the address and undefined-behaviour sanitizers: no input makes them read or write astray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.own_build import SANITIZE, environment, own_build

TESTS = Path(__file__).parents[1]


def run_tests(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *arguments],
        cwd=TESTS.parent,
        env=environment(folder, sanitized=True),
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )


def test_which_build_this_is():
    """Within `run_tests` it is the sanitized one; otherwise the one beside the sources that are tested."""
    from kvmtrace._native import _loops

    where = Path(_loops.__file__).parents[2]
    assert where == Path(os.environ.get("SANITIZED", TESTS.parent))


@pytest.mark.slow
def test_no_access_astray(tmp_path):
    decoders = [f"tests/formats/test_{name}.py" for name in ("ring_buffer", "perf_records", "chunks", "mutations")]
    done = run_tests(own_build(tmp_path, SANITIZE), "tests/native", *decoders)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.slow
def test_the_sanitizer_would_notice(tmp_path):
    change = ("field_bytes.c", "if (at >= 0 && at + size <= n_bytes) {", "if (at >= 0) {")
    done = run_tests(
        own_build(tmp_path, SANITIZE, change), "tests/native/test_decoding_loops.py", "-k", "around_the_end"
    )
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
