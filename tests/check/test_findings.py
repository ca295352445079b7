"""What docs/findings.md tells of KVM stays found: small recordings of real faults, each flagged by the rule named."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from kvmtrace.check.engine import check_recording
from kvmtrace.check.explain import explain_exit, read_event
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
    assert (first.rule if first else None) == expected["first"]
    assert first is None or (expected["words"] in first.observed and first.observed in DOCS)


@pytest.mark.parametrize("name", [name for name in MANIFEST if MANIFEST[name]["expected"]["first"]])
def test_the_text_shows_what_explain_shows(name: str) -> None:
    found = re.search(rf"kvmtrace report tests/check/findings/{re.escape(name)} --explain (\d+) --tid (\d+)", DOCS)
    assert found, "the text tells the command"
    model = check_report(open_recording(FOLDER / name)).model
    assert model is not None
    first = model.first_divergence
    assert first is not None
    assert (first.vm_exit, first.tid) == (int(found[1]), int(found[2]))
    story = explain_exit(open_recording(FOLDER / name).events(), int(found[1]), tid=int(found[2]))
    block = re.split(r"\n\n(?! )", DOCS[found.end() :].partition("\n\n")[2])[0]
    shown = re.findall(r"^    (kvm_\w+) {2,}", block, re.MULTILINE)
    assert [event.event for event in story.events if event.event in shown][: len(shown)] == shown


def exits_of_deliveries() -> list[dict[str, dict[str, int | str]]]:
    """Return, of each VM-exit of the second recording, its events with their fields (the first of each kind)."""
    events = open_recording(FOLDER / "kvm-7.3-deliveries-to-devices.dat").events()
    found: dict[int, list[dict[str, dict[str, int | str]]]] = {}
    for row in range(len(events)):
        name = events.kinds[events.kind[row]].name
        mine = found.setdefault(int(events.tid[row]), [])
        if name == "kvm_exit":
            mine.append({})
        if mine and name.startswith("kvm_"):
            mine[-1].setdefault(name, read_event(events, row).fields)
    return [one for mine in found.values() for one in mine]


def test_the_type_of_exitintinfo_decides_on_7_3() -> None:
    """A valid external interrupt (type 0) is emulated at the guest's RIP; a software interrupt (type 4) is refused."""
    exits = [one for one in exits_of_deliveries() if one["kvm_exit"]["info1"] == 0x10000000E]
    interrupts = [one for one in exits if one["kvm_exit"]["intr_info"] == 0x80000031]
    softs = [one for one in exits if one["kvm_exit"]["intr_info"] == 0x80000430]
    assert interrupts
    assert all("kvm_page_fault" in one and str(one["kvm_emulate_insn"]["insn"]).startswith("90") for one in interrupts)
    assert len(softs) > 5
    assert all("kvm_page_fault" not in one and "kvm_inj_virq" in one for one in softs[:-1])


def test_qemu_leaves_the_type_of_a_delivery_behind() -> None:
    words = {int(one["kvm_exit"]["intr_info"]) for one in exits_of_deliveries()}
    assert 0x430 in words, "type 4, vector 0x30, not valid"


def fields_of(name: str, event: str) -> list[dict[str, int | str]]:
    """Return the fields of each event of a kind."""
    events = open_recording(FOLDER / name).events()
    return [read_event(events, int(row)).fields for row in events.rows(event)]


def test_the_type_of_an_interrupted_int3() -> None:
    words = {int(one["intr_info"]) for one in fields_of("qemu-7.2-int3-type.dat", "kvm_exit")}
    assert 0x80000403 in words, "valid, type 4, vector 3"
    injected = fields_of("qemu-7.2-int3-type.dat", "kvm_inj_virq")
    assert {(one["vector"], one["soft"]) for one in injected} == {(3, 1)}


def test_icebp_is_an_invalid_opcode() -> None:
    instructions = {str(one["insn"])[:2] for one in fields_of("qemu-7.2-icebp.dat", "kvm_emulate_insn")}
    assert instructions == {"f1"}
    assert {one["exception"] for one in fields_of("qemu-7.2-icebp.dat", "kvm_inj_exception")} == {6}


def test_the_error_code_of_an_idt_entry() -> None:
    (told,) = [one for one in fields_of("qemu-7.2-idt-error-code.dat", "kvm_exit") if one["intr_info"] == 0x80000B0C]
    vector = 12
    assert told["info1"] == 16 * vector + 2, "a processor says 8 * vector + 2"


def test_no_interrupt_ends_a_masked_loop() -> None:
    events = open_recording(FOLDER / "bochs-2.7-masked-loop.dat").events()
    entry, leave = int(events.rows("kvm_entry")[-1]), int(events.rows("kvm_exit")[-1])
    assert read_event(events, leave).fields["exit_reason"] == 12, "HLT"
    assert events.ts_ns[leave] - events.ts_ns[entry] > 100 * 4_000_000, "a hundred ticks of the host's timer"


def test_every_finding_says_what_a_reader_upstream_asks_for() -> None:
    for section in re.split(r"^## ", DOCS, flags=re.MULTILINE)[1:]:
        for part in ("**Symptom.**", "**Versions.**", "**Status.**", "**Reproducer.**"):
            assert part in section, (section.splitlines()[0], part)


def test_the_modes_that_are_named_exist() -> None:
    source = (ROOT / "tests" / "lab" / "findings" / "finding.c").read_text()
    for mode in re.findall(r"`finding ([\w-]+)`", DOCS):
        assert f'{{"{mode}",' in source
