"""Buffers are bounded by the memory there is before any is taken, and what was set is said."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from kvmtrace.capture import buffer_size
from kvmtrace.capture.buffer_size import available_bytes, buffer_bytes, say_smaller

if TYPE_CHECKING:
    from pathlib import Path

GIB = 1 << 30


@pytest.mark.parametrize(
    ("available", "asked", "n_cpus", "size"),
    [
        (24 * GIB, None, 2, 16 << 20),
        (GIB, None, 64, 2 << 20),
        (64 << 20, None, 64, 1 << 20),
        (24 * GIB, 64 << 20, 2, 64 << 20),
        (24 * GIB, 1 << 40, 2, 3 * GIB),
        (24 * GIB, 8192, 2, 8192),
        (1 << 20, 64 << 20, 8, 1 << 20),
    ],
)
def test_sizes(monkeypatch: pytest.MonkeyPatch, available: int, asked: int | None, n_cpus: int, size: int) -> None:
    monkeypatch.setattr(buffer_size, "available_bytes", lambda: available)
    assert buffer_bytes(asked, n_cpus) == size


def test_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_bytes() > 1 << 20
    monkeypatch.setattr(buffer_size, "MEMINFO", tmp_path / "meminfo")
    assert available_bytes() == 256 << 20
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemFree: 7 kB\n")
    assert available_bytes() == 7 << 10


def test_what_was_set_is_said() -> None:
    assert say_smaller(None, 4096, 2) is None
    assert say_smaller(4096, 4096, 2) is None
    assert "4 KiB per CPU instead of 1,024" in (say_smaller(1 << 20, 4096, 2) or "")


@pytest.mark.kvm
@pytest.mark.slow
def test_a_terabyte_is_not_even_tried(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "kvmtrace", "record", "--backend", "bpf", "--buffer-size", "1T"),
            *("-o", str(tmp_path / "x.dat"), "--", "true"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "instead of 1,073,741,824" in done.stderr
    assert "per CPU" in done.stderr
