"""What a rule needs and a recording lacks is named, and nothing is invented: for every rule, event and field.

Generated from the rules: a rule's parts say what they need, and each need is taken away in turn, by renaming it in the
format text inside real recordings, by dropping it from a table, and from the rules' own examples.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from check.test_checker import without
from writers.healthy import joined

from kvmtrace.check.engine import Checker, check_recording
from kvmtrace.check.examples import text_trace
from kvmtrace.check.excerpt import EXPECTATIONS, ISA_OF_ROW
from kvmtrace.check.observability import IRQ_FLAGS
from kvmtrace.check.rule_registry import all_rules
from kvmtrace.formats import open_recording

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.check.excerpt import Excerpt
    from kvmtrace.check.verdict import Comparison
    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Capture

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"
# format text and events in plain bytes (trace.dat 6), so that a name can be changed in place
PLAIN = ("vmx-6.1-lifecycle.dat", "svm-6.1-smp.dat")
RULES = all_rules()


def lists_of_needs(excerpt: Excerpt) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (rule, needs) of all that is checked of an excerpt."""
    for rule in RULES.values():
        if excerpt.capability.missing(rule.needs):
            continue
        for part in rule.parts:
            if part.places(excerpt):
                yield rule.id, rule.needs + part.needs
        for number, group in excerpt.groups.items() if rule.row_parts_of else ():
            row = EXPECTATIONS[number]
            assert row is not None
            for of_row in rule.row_parts(row):
                if of_row.places(excerpt, group):
                    yield rule.id, rule.needs + of_row.needs


def needs_met(capture: Capture, table: EventTable) -> dict[str, set[str]]:
    """Return need -> the rules that need it and are checked in this recording."""
    excerpt, _ = Checker(capture)._prepare(table)
    found: dict[str, set[str]] = {}
    for rule, needs in lists_of_needs(excerpt):
        if excerpt.capability.missing(needs):
            continue
        for need in (one for whole in needs for one in excerpt.capability.resolve(whole)):
            if need != IRQ_FLAGS:
                found.setdefault(need, set()).add(rule)
                if "|" not in need:
                    found.setdefault(need.partition(".")[0], set()).add(rule)
    return found


def names_of(need: str) -> set[str]:
    """Return a need as NotChecked.missing may put it: itself, or the whole event."""
    alternatives = need.split("|")
    kinds = dict.fromkeys(one.partition(".")[0] for one in alternatives)
    return {" or ".join(alternatives), " or ".join(kinds)}


def assert_named(comparison: Comparison, need: str, rules: set[str]) -> None:
    alarms = [(v.rule, v.event_index, v.expected, v.observed) for v in comparison.violations]
    assert alarms == [], f"without {need}"
    named = {one.rule for one in comparison.not_checked if names_of(need) & set(one.missing)}
    assert rules <= named, f"without {need}: {sorted(rules - named)} silent"


@functools.cache
def plain_bytes(name: str) -> bytes:
    return (FIXTURES / name).read_bytes()


def renamed(data: bytes, need: str) -> bytes:
    """Return a recording in whose format text each alternative of a need has another name of the same length."""
    for one in need.split("|"):
        kind, _, field = one.partition(".")
        begin = data.find(b"name: " + kind.encode() + b"\n")
        if begin < 0:
            continue
        end = data.find(b"\nprint fmt:", begin)
        text = data[begin:end]
        if field:
            new = re.sub(rb"(field:[^;]*\b)" + field.encode() + rb"(?=[\[;])", rb"\g<1>" + b"q" * len(field), text)
        else:
            new = text.replace(kind.encode(), b"q" * len(kind), 1)
        data = data[:begin] + new + data[end:]
    return data


@functools.cache
def needs_of_fixture(name: str) -> dict[str, set[str]]:
    recording = open_recording(FIXTURES / name)
    return needs_met(recording.capture, recording.events())


PLACES = [pytest.param(name, need, id=f"{name}-{need}") for name in PLAIN for need in sorted(needs_of_fixture(name))]


@pytest.mark.parametrize(("name", "need"), PLACES)
def test_renamed_in_the_format_text_of_a_recording(name: str, need: str, tmp_path: Path) -> None:
    data = renamed(plain_bytes(name), need)
    assert (data == plain_bytes(name)) is False
    path = tmp_path / "renamed.dat"
    path.write_bytes(data)
    assert_named(check_recording(open_recording(path)), need, needs_of_fixture(name)[need])


@pytest.mark.parametrize("isa", ["vmx", "svm"])
def test_dropped_from_a_table(isa: str) -> None:
    capture, table = joined(isa)
    capture = dataclasses.replace(capture, events=())
    met = needs_met(capture, table)
    assert len(met) > 40
    for need, rules in met.items():
        fields = {(kind, field) for kind, _, field in (one.partition(".") for one in need.split("|")) if field}
        kinds = {kind for kind in need.split("|") if kind in table.kind_index}
        checker = Checker(capture)
        checker.feed(without(table, kinds, fields))
        assert_named(checker.finish(), need, rules)


ARM64 = "arm64-6.1-interrupt.dat"


def test_dropped_from_an_arm64_recording() -> None:
    recording = open_recording(FIXTURES / ARM64)
    capture, table = dataclasses.replace(recording.capture, events=()), recording.events()
    met = needs_met(capture, table)
    own = {need: rules for need, rules in met.items() if need.startswith(("kvm_timer_", "vgic_", "kvm_wfx"))}
    assert {"kvm_timer_update_irq.irq", "vgic_update_irq_pending.level", "kvm_wfx_arm64.is_wfe"} <= own.keys()
    for need, rules in own.items():
        kind, _, field = need.partition(".")
        checker = Checker(capture)
        checker.feed(without(table, set() if field else {kind}, {(kind, field)} if field else set()))
        assert_named(checker.finish(), need, rules)


def lines_without(text: str, need: str) -> str:
    """Return a text trace without the events or fields of a need."""
    for one in need.split("|"):
        kind, _, field = one.partition(".")
        if field:
            text = re.sub(rf"(: {kind}: .*?)\b{field}=(\[.*?\]|\S+) ?", r"\1", text)
        else:
            text = re.sub(rf"^.*: {kind}:.*\n", "", text, flags=re.MULTILINE)
    return text


def test_taken_from_the_examples(tmp_path: Path) -> None:
    """What the recordings do not hold is in some rule's example."""
    path = tmp_path / "example.txt"
    for rule in RULES.values():
        text = text_trace(rule.healthy)
        path.write_text(text)
        recording = open_recording(path)
        for need, rules in needs_met(recording.capture, recording.events()).items():
            poorer = lines_without(text, need)
            # the reader of text knows these by the fields beside them; fields that are printed as words cannot go alone
            told = {"kvm_exit.isa", "kvm_inj_exception.has_error", "kvm_emulate_insn.len"}
            if rule.id in rules and poorer.strip() and need not in told and poorer != text:
                path.write_text(poorer)
                assert_named(check_recording(open_recording(path)), need, {rule.id})


def test_every_need_is_taken_away_somewhere(tmp_path: Path) -> None:
    covered = set().union(*(needs_of_fixture(name) for name in PLAIN))
    for isa in ("vmx", "svm"):
        covered |= needs_met(*joined(isa)).keys()
    covered |= needs_of_fixture(ARM64).keys()
    path = tmp_path / "example.txt"
    for rule in RULES.values():
        path.write_text(text_trace(rule.healthy))
        recording = open_recording(path)
        covered |= needs_met(recording.capture, recording.events()).keys()
    recorded = ("vmx", "svm")  # in the recordings above; other ISAs have tests of their own
    rows = [row for row, isa in zip(EXPECTATIONS, ISA_OF_ROW, strict=True) if row and isa and isa.name in recorded]
    wanted = {
        need
        for rule in RULES.values()
        for needs in (rule.needs, *(p.needs for p in rule.parts), *(p.needs for r in rows for p in rule.row_parts(r)))
        for need in needs
    }
    # VMCALL's alternatives, INVLPGA, SKINIT, PML, SMM: no recording of ours meets them; they are gated like all others
    rare = {"kvm_hypercall", "kvm_hv_hypercall", "kvm_xen_hypercall", "kvm_invlpga", "kvm_skinit", "kvm_pml_full"}
    rare |= {"kvm_smm_transition.vcpu_id"}
    assert wanted - covered - rare - {IRQ_FLAGS, "kvm_exit.vectoring"} == set()
