"""Rounds that are like earlier ones are not judged again: the verdict is that of judging each of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from kvmtrace.check import round_contents, rounds
from kvmtrace.check.engine import Checker, checker_of
from kvmtrace.check.rule import VIOLATION, Rule
from kvmtrace.check.rule_registry import all_rules
from kvmtrace.check.rules import v13_forbidden_follow_ups
from kvmtrace.formats import open_recording
from kvmtrace.table.parking import materialise

FIXTURES = Path(__file__).parents[2] / "fixtures"
RECORDINGS = sorted(path for path in FIXTURES.glob("*.dat") if not path.stem.endswith("linux-2vcpu"))
STORM = FIXTURES / "svm-6.1-storm.dat"


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Look for rounds in the shortest excerpts, too; of each excerpt, whether that was of use."""
    monkeypatch.setattr(rounds, "FEWEST", 0)
    judge, told = rounds.Rounds.judge, []

    def noted(self, excerpt):
        found = judge(self, excerpt)
        told.append(found is not None)
        assert not self._given_up
        return found

    monkeypatch.setattr(rounds.Rounds, "judge", noted)
    return told


def verdict(capture, table, size: int = 1 << 60):
    """Return the verdict on a table that is handed over in pieces."""
    checker = Checker(capture)
    for start in range(0, len(table), size):
        checker.feed(table.slice(start, min(start + size, len(table))))
    return dataclasses.asdict(checker.finish())


def each_judged(capture, table, size: int = 1 << 60):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "FEWEST", 1 << 60)
        return verdict(capture, table, size)


@pytest.mark.parametrize("worth", [0, 2])
@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_the_verdict_is_the_same(path: Path, worth: int, used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "WORTH", worth)
    recording = open_recording(path)
    table = recording.events()
    for size in (len(table), 3000):
        used.clear()
        assert verdict(recording.capture, table, size) == each_judged(recording.capture, table, size)
        assert any(used) or worth


def test_a_storm_needs_few(used: list[bool]) -> None:
    """Of a thousand rounds of a loop, seven are judged once, and one sum is made for all others."""
    recording = open_recording(STORM)
    checker = checker_of(recording)
    checker.feed(recording.events())
    assert used == [True]
    own = checker._rounds
    assert int(own._judged.sum()) < 20
    assert int(own._times.sum()) > 900
    assert sum(1 for _ in round_contents.repeated_rounds(own._kept, own._times, own._like)) <= 2


def faulty(field: str, at: int):
    """Return a storm in which one kvm_entry or kvm_exit, of a round that came before, is another one."""
    recording = open_recording(STORM)
    events = recording.events()
    table = materialise(events, np.arange(len(events)))
    kind, _, name = field.partition(".")
    payload = table.payloads[table.kind_index[kind]]
    payload.columns[name] = payload.columns[name].copy()
    payload.columns[name][at] += 1
    return recording.capture, table


@pytest.mark.parametrize(
    ("field", "rule"), [("kvm_entry.rip", "V6"), ("kvm_exit.guest_rip", "V5"), ("kvm_exit.vcpu_id", "V2")]
)
@pytest.mark.parametrize("at", [100, 500, 900])
def test_one_fault_among_a_thousand_like_rounds(field: str, rule: str, at: int, used: list[bool]) -> None:
    for size in (1 << 60, 1000):
        used.clear()
        capture, table = faulty(field, at)
        found = verdict(capture, table, size)
        assert found["rules"][rule]["violated"] >= 1
        assert found == each_judged(capture, table, size)
        if size == 1000:
            assert True in used
            assert False in used  # the piece that it lies in


@pytest.mark.parametrize("room", [50, 1 << 20])
@pytest.mark.parametrize("base", [2, 3, 64])
def test_sums_are_exact(room: int, base: int, used: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_contents, "ROOM", room)
    monkeypatch.setattr(round_contents, "BASE_OF_FEW", base)
    recording = open_recording(STORM)
    assert verdict(recording.capture, recording.events()) == each_judged(recording.capture, recording.events())
    assert True in used


def test_what_is_no_content_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that says that it is local, and reads what is not compared, has each round judged."""
    own = Rule("X1", "own", VIOLATION, ("kvm_cpuid.rax",), "The guest asks.", "ours", places="kvm_cpuid")
    asked: list[bool] = []

    @own.part(local=True)
    def _reads(excerpt, found):
        asked.append(isinstance(excerpt.sequence.table, round_contents.ContentTable))
        positions = excerpt.segments.positions("kvm_cpuid")
        excerpt.sequence.table.rows("kvm_cpuid")
        found.check(len(positions))

    monkeypatch.setattr(rounds, "FEWEST", 0)
    monkeypatch.setattr(rounds, "is_own", lambda _: True)
    recording = open_recording(STORM)
    monkeypatch.setitem(all_rules(), "X1", own)
    found = verdict(recording.capture, recording.events(), 2000)
    assert asked[0]
    assert not any(asked[1:])
    assert found == each_judged(recording.capture, recording.events(), 2000)
    assert found["rules"]["X1"]["checked"] > 900


def test_another_packages_part_that_calls_itself_local_and_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = Rule("X1", "theirs", VIOLATION, ("kvm_cpuid.rax",), "The guest asks.", "theirs", places="kvm_cpuid")

    @theirs.part(local=True)
    def _fails(excerpt, found):
        found.violate_rows(np.array([0]), lambda _: ("x", "y"))
        raise ValueError("theirs")

    monkeypatch.setattr(rounds, "FEWEST", 0)
    monkeypatch.setitem(all_rules(), "X1", theirs)
    recording = open_recording(STORM)
    assert verdict(recording.capture, recording.events(), 2000)["rules"]["X1"]["violated"] == 1


def test_rules_say_what_is_local() -> None:
    """Most of the work is: what looks at one VM-exit and what follows it."""
    local = {rule.id for rule in all_rules().values() if rule.local_rows or any(part.local for part in rule.parts)}
    assert local >= {"V1", "V2", "V4", "V5", "V6", "V7", "V8", "V12", "V13"}
    assert not any(part.local for rule in all_rules().values() if rule.id[0] in "INS" for part in rule.parts)
    assert v13_forbidden_follow_ups.RULE.local_rows
