"""Every fixture has its manifest, is what the manifest says, and no file is an orphan."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from kvmtrace.formats import open_recording

FIXTURES = Path(__file__).parents[2] / "fixtures"
RECORDED = sorted(FIXTURES.glob("*.dat"))
LIMIT_BYTES = 4 << 20  # what keeps a checkout under 8 MB


def manifest_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".dat.json").read_text())


def test_no_orphans():
    files = {path.name for path in FIXTURES.iterdir()} - {"README.md"}
    recorded = {path.name for path in RECORDED}
    assert recorded
    assert files == recorded | {f"{name}.json" for name in recorded}


def test_small_enough():
    assert sum(path.stat().st_size for path in RECORDED) < LIMIT_BYTES


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_is_what_its_manifest_says(path: Path):
    manifest = manifest_of(path)
    assert manifest["schema"] == "kvmtrace.fixture/1"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest["sha256"]
    capture = open_recording(str(path)).capture
    assert (capture.kernel, capture.cpu_model) == (manifest["kernel"], manifest["cpu"])
    assert path.name.startswith(f"{manifest['isa']}-")


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_is_packed_or_says_why_not(path: Path):
    is_packed = path.read_bytes()[10:11] == b"7"
    assert manifest_of(path)["stored"].startswith("packed: ") == is_packed


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_counts_equal_trace_cmds(path: Path):
    expected = manifest_of(path)["expected"]
    table = open_recording(str(path)).events()
    counts = {kind.name: len(table.rows(kind.name)) for kind in table.kinds}
    assert {name: n for name, n in counts.items() if n} == expected["events"]
    reasons = Counter(map(int, table.field("kvm_exit", "exit_reason")))
    assert {str(reason): n for reason, n in reasons.items()} == expected["exit_reasons"]
