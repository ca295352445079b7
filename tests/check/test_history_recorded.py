"""Historic bugs of KVM that were put back and recorded, each beside its healthy twin; see history/manifest.json."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.formats import open_recording

FOLDER = Path(__file__).parent / "history"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
LIMIT_BYTES = 50 << 10


def test_no_orphans() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"manifest.json", *MANIFEST}
    assert len({told["isa"] for told in MANIFEST.values()}) == 2


@pytest.mark.parametrize("name", MANIFEST)
def test_what_is_found(name: str) -> None:
    path, told = FOLDER / name, MANIFEST[name]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == told["sha256"]
    assert path.stat().st_size == told["bytes"] < LIMIT_BYTES
    verdict = check_recording(open_recording(path))
    broken = {rule for rule, result in verdict.rules.items() if result.violated}
    assert broken == set(told["expected"]["rules"])
    assert bool(verdict.n_violations) == (told["expected"]["found"] == "violation")
    first = [f"{one.rule}: expected {one.expected}, observed {one.observed}" for one in verdict.violations]
    assert not told["expected"]["first"] or told["expected"]["first"] in first
    if name.endswith("-healthy.dat"):
        assert not broken
        assert verdict.rules["V6"].checked
