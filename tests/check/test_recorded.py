"""Small recordings of healthy but unusual KVMs and VMMs: none of them may be accused; see recorded/manifest.json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from kvmtrace.check.engine import check_recording, checker_of
from kvmtrace.formats import open_recording

FOLDER = Path(__file__).parent / "recorded"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
LIMIT_BYTES = 64 << 10
SEVERAL = ("two-vcpus", "three-vcpus", "two-vms", "handover")


def test_no_orphans() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"manifest.json", *MANIFEST}


@pytest.mark.parametrize("name", MANIFEST)
def test_conforms(name: str) -> None:
    path, told = FOLDER / name, MANIFEST[name]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == told["sha256"]
    assert path.stat().st_size == told["bytes"] < LIMIT_BYTES
    recording = open_recording(path)
    assert (recording.capture.kernel, recording.capture.cpu_model) == (told["kernel"], told["cpu"])
    verdict = check_recording(recording)
    assert verdict.n_violations == told["expected"]["violations"], verdict.first_divergence
    assert verdict.n_suspicions == told["expected"].get("suspicions", 0), verdict.first_divergence
    assert verdict.rules["V6"].checked


@pytest.mark.parametrize("size", [97, 500])
@pytest.mark.parametrize("name", [name for name in MANIFEST if name.removesuffix(".dat").endswith(SEVERAL)])
def test_a_vcpu_is_known_across_pieces(name: str, size: int) -> None:
    """Which vCPU a thread runs is remembered from piece to piece, whatever lies in them."""
    recording = open_recording(FOLDER / name)
    table, whole = recording.events(), check_recording(recording)
    checker = checker_of(recording)
    for start in range(0, len(table), size):
        checker.feed(table.slice(start, min(start + size, len(table))))
    pieces = checker.finish()
    assert pieces.n_violations == 0
    # V6 after userspace is H5 until a KVM_SET_REGS was seen
    for rules in (("V6", "H5"), ("V7",), ("V8",)):
        counts = [sum(verdict.rules[rule].checked for rule in rules) for verdict in (pieces, whole)]
        assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("name", [name for name in MANIFEST if name.endswith("-two-vcpus.dat")])
def test_each_of_several_vcpus_is_judged(name: str) -> None:
    """Two vCPUs of one thread are judged as fully as those of two threads: their registers are never mixed up."""
    verdict = check_recording(open_recording(FOLDER / name))
    assert verdict.unknown_events < 0.01 * verdict.n_events
    assert verdict.rules["V6"].checked > verdict.rules["V6"].unknown
