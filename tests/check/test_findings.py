"""What docs/findings.md tells of KVM stays found: small recordings of real faults, each flagged by the rule named."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.check.explain import explain_exit
from kvmtrace.formats import open_recording
from kvmtrace.report.build import check_report

FOLDER = Path(__file__).parent / "findings"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "findings.md").read_text()
LIMIT_BYTES = 40 << 10


def test_no_orphans() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"manifest.json", *MANIFEST}


@pytest.mark.parametrize("name", MANIFEST)
def test_the_fault_is_found(name: str) -> None:
    path, told = FOLDER / name, MANIFEST[name]
    data = path.read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (told["bytes"], told["sha256"])
    assert len(data) < LIMIT_BYTES
    verdict = check_recording(open_recording(path))
    expected = told["expected"]
    assert verdict.n_violations == expected["violations"]
    first = verdict.first_divergence
    assert first is not None
    assert first.rule == expected["first"]
    assert expected["words"] in first.observed
    assert first.observed in DOCS


@pytest.mark.parametrize("name", MANIFEST)
def test_the_text_shows_what_explain_shows(name: str) -> None:
    found = re.search(rf"kvmtrace report tests/check/findings/{re.escape(name)} --explain (\d+) --tid (\d+)", DOCS)
    assert found, "the text tells the command"
    model = check_report(open_recording(FOLDER / name)).model
    assert model is not None
    first = model.first_divergence
    assert first is not None
    assert (first.vm_exit, first.tid) == (int(found[1]), int(found[2]))
    story = explain_exit(open_recording(FOLDER / name).events(), int(found[1]), tid=int(found[2]))
    shown = re.findall(r"^    (kvm_\w+) {2,}", DOCS, re.MULTILINE)
    assert [event.event for event in story.events if event.event in shown][: len(shown)] == shown


def test_every_finding_says_what_a_reader_upstream_asks_for() -> None:
    for section in re.split(r"^## ", DOCS, flags=re.MULTILINE)[1:]:
        for part in ("**Symptom.**", "**Versions.**", "**Status.**", "**Reproducer.**"):
            assert part in section, (section.splitlines()[0], part)


def test_the_modes_that_are_named_exist() -> None:
    source = (ROOT / "tests" / "lab" / "findings" / "finding.c").read_text()
    for mode in re.findall(r"`finding ([\w-]+)`", DOCS):
        assert f'{{"{mode}",' in source
