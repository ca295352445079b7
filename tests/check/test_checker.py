"""The checker as a whole: no alarm without reason, the same answer in pieces, losses, missing events."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from writers.healthy import joined, with_loss

from kvmtrace.check.engine import Checker
from kvmtrace.check.findings import Findings, constant, merged
from kvmtrace.check.rule_registry import all_rules
from kvmtrace.formats import open_recording
from kvmtrace.report.json_document import dump
from kvmtrace.table.event_table import TRACE_FLAG_IRQS_NOSUPPORT, EventKind, EventTable
from kvmtrace.table.parking import materialise
from kvmtrace.table.payload import ColumnPayload
from kvmtrace.table.pipeline import run_stages

if TYPE_CHECKING:
    from kvmtrace.check.verdict import Comparison
    from kvmtrace.table.recording import Capture

ISAS = ("vmx", "svm")
FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


def check(capture: Capture, table: EventTable, pieces: int | None = None, limit: int = 20) -> Comparison:
    checker = Checker(capture, limit)
    size = pieces or max(len(table), 1)
    for start in range(0, len(table), size):
        checker.feed(table.slice(start, min(start + size, len(table))))
    return checker.finish()


def alarms(comparison: Comparison) -> list[tuple[str, int, str, str]]:
    return [(v.rule, v.event_index, v.expected, v.observed) for v in comparison.violations]


@pytest.mark.parametrize("isa", ISAS)
def test_healthy_threads_conform(isa: str) -> None:
    capture, table = joined(isa)
    comparison = check(capture, table)
    assert alarms(comparison) == []
    assert comparison.isa == isa
    assert comparison.conforms
    assert comparison.n_events == len(table)
    assert comparison.explained_events + comparison.unknown_events + comparison.environment_events == len(table)
    assert comparison.explained_events > 0.7 * len(table)
    assert all(result.checked == result.held for result in comparison.rules.values())
    assert comparison.rules["V6"].checked > 5


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("pieces", [1, 2, 7, 50])
def test_pieces_give_the_same_answer(isa: str, pieces: int) -> None:
    capture, table = joined(isa)
    whole, parts = check(capture, table), check(capture, table, pieces)
    assert alarms(parts) == []
    steps = {"VM-entry", "VM-exit", "FPU unload", "userspace exit"}
    assert [t for t in parts.transitions if t.event in steps] == [t for t in whole.transitions if t.event in steps]
    for rule in ("V2", "V3", "V4", "V6", "V7", "V8"):
        assert parts.rules[rule].checked == whole.rules[rule].checked, rule
    for rule in ("V2", "V3"):  # an event that two parts share counts once
        assert parts.rules[rule].unknown == whole.rules[rule].unknown, rule


@pytest.mark.parametrize("isa", ISAS)
def test_violation_is_found_in_pieces_at_its_place(isa: str) -> None:
    capture, table = joined(isa)
    rip = table.payloads[table.kind_index["kvm_entry"]].columns["rip"]
    rip += np.where(np.arange(len(rip)) % 2 == 1, 0x100000, 0).astype(rip.dtype)
    for limit in (5, 1000):
        expected = sorted(a[:2] for a in alarms(check(capture, table, limit=limit)))
        assert expected
        for pieces in (3, 64):
            assert sorted(a[:2] for a in alarms(check(capture, table, pieces, limit))) == expected


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(40))
def test_losses_invent_nothing(isa: str, seed: int) -> None:
    rng = random.Random(seed)
    capture, table = joined(isa)
    for _ in range(rng.randrange(1, 4)):
        cpu = rng.randrange(4)
        table = with_loss(table, cpu, rng.randrange(1, max(2, int((table.cpu == cpu).sum()) - 8)), rng.randrange(1, 6))
    assert alarms(check(capture, table, rng.choice([None, 9, 40]))) == []


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(40))
def test_mid_run_start_invents_nothing(isa: str, seed: int) -> None:
    rng = random.Random(seed)
    capture, table = joined(isa)
    start = rng.randrange(len(table) - 2)
    part = materialise(table, np.arange(start, rng.randrange(start + 1, len(table))))
    assert alarms(check(capture, part)) == []


def without(table: EventTable, gone: set[str], fields: set[tuple[str, str]]) -> EventTable:
    """Return the table as if these kinds and fields had never been recorded."""
    kept = [kind for kind in table.kinds if kind.name not in gone]
    part = materialise(table, np.flatnonzero(~np.isin(table.kind, [table.kind_index[name] for name in gone])))
    kinds = tuple(
        EventKind(k.name, k.system, {f: d for f, d in k.fields.items() if (k.name, f) not in fields}) for k in kept
    )
    index = {kind.name: i for i, kind in enumerate(kinds)}
    mapping = np.array([index.get(kind.name, 0) for kind in part.kinds], np.uint16)
    payloads = {
        index[part.kinds[i].name]: ColumnPayload(
            {f: c for f, c in payload.columns.items() if (part.kinds[i].name, f) not in fields}
        )
        for i, payload in part.payloads.items()
    }
    columns = {name: getattr(part, name) for name in ("ts_ns", "cpu", "tid", "irq_flags", "preempt_count")}
    return EventTable({**columns, "kind": mapping[part.kind]}, kinds, payloads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(60))
def test_missing_events_and_fields_invent_nothing(isa: str, seed: int) -> None:
    rng = random.Random(seed)
    capture, table = joined(isa)
    names = sorted({table.kinds[i].name for i in np.unique(table.kind)})
    gone = set(rng.sample(names, rng.randrange(1, len(names) - 3)))
    fields = {(kind.name, field) for kind in table.kinds for field in kind.fields if rng.random() < 0.06}
    poorer = without(table, gone, fields)
    events = tuple(f"kvm:{kind.name}" for kind in poorer.kinds)
    comparison = check(dataclasses.replace(capture, events=events if seed % 2 else ()), poorer)
    assert alarms(comparison) == []
    if "kvm_exit" in gone:
        assert any("kvm_exit" in one.missing for one in comparison.not_checked)


def test_empty_recording() -> None:
    capture, table = joined("vmx")
    comparison = check(capture, table.slice(0, 0))
    assert not comparison.conforms
    assert comparison.verdict == "no KVM event"
    assert comparison.n_events == 0
    assert comparison.isa is None


def test_filtered_exits_are_not_joined() -> None:
    capture, table = joined("vmx")
    entries = table.rows("kvm_entry")
    sampled = materialise(table, np.setdiff1d(np.arange(len(table)), entries[::2]))
    assert check(capture, sampled).n_violations > 0
    told = dataclasses.replace(capture, meta={"filters": {"sample": 2}})
    assert alarms(check(told, sampled)) == []


def test_slow_exits_alone_owe_no_follow_ups() -> None:
    """Record --slower-than writes a VM-exit and its VM-entry; what lay between was dropped before it was known."""
    capture, table = joined("vmx")
    first = int(table.rows("kvm_exit")[0])
    edges = np.isin(table.kind, [table.kind_index[name] for name in ("kvm_entry", "kvm_exit")])
    slow = materialise(table, np.flatnonzero(edges | (np.arange(len(table)) < first)))
    assert check(capture, slow).rules["V4"].violated
    told = dataclasses.replace(capture, meta={"filters": {"slower_than_ns": 1000}})
    comparison = check(told, slow)
    assert alarms(comparison) == []
    assert comparison.rules["V2"].held


def test_unrelated_threads_are_environment() -> None:
    capture, table = joined("vmx")
    table.tid[table.tid >= 1010] = 5  # many vCPUs' events of one thread would not fit together
    keep = np.flatnonzero((table.tid != 5) | (table.kind == table.kind_index["sched_switch"]))
    part = materialise(table, keep)
    comparison = check(capture, part)
    assert comparison.environment_events >= int((part.tid == 5).sum())


def test_limit_bounds_the_list_not_the_count() -> None:
    capture, table = joined("vmx")
    rip = table.payloads[table.kind_index["kvm_entry"]].columns["rip"]
    rip += 0x100000
    checker = Checker(capture, limit=2)
    checker.feed(table)
    comparison = checker.finish()
    assert comparison.rules["V6"].violated > 2
    assert sum(v.rule == "V6" for v in comparison.violations) == 2


def test_document_has_the_interface_keys() -> None:
    capture, table = joined("vmx")
    document = dump(check(capture, table))
    assert {
        "name",
        "isa",
        "rules",
        "transitions",
        "coverage",
        "violations",
        "first_divergence",
        "explained_events",
        "n_events",
        "cannot_see",
    } <= document.keys()
    assert {"from", "event", "to", "count", "p50_ns", "p99_ns"} == document["transitions"][0].keys()


@pytest.mark.parametrize("isa", ISAS)
def test_without_interrupt_flags_their_rule_is_unknown(isa: str) -> None:
    """BPF programs cannot see whether interrupts were off: nothing that depends on it may count as held."""
    capture, table = joined(isa)
    told = check(capture, table)
    table.irq_flags[:] = TRACE_FLAG_IRQS_NOSUPPORT
    blind = check(capture, table)
    assert blind.conforms
    assert any("whether interrupts were off at kvm_entry" in line for line in blind.cannot_see)
    assert not any("interrupts were off" in line for line in told.cannot_see)
    v3, before = blind.rules["V3"], told.rules["V3"]
    assert v3.unknown >= table.count("kvm_entry")
    if isa == "vmx":  # that kvm_exit is traced with interrupts off needs no flag there: scheduling is still checked
        assert 0 < v3.checked == before.checked - v3.unknown
    else:
        assert v3.checked == 0
        assert any("scheduling in guest mode is not checked" in line for line in blind.cannot_see)


def holed(name: str, seed: int) -> tuple[Capture, EventTable]:
    """Return a recording that lacks one of fifty events."""
    recording = open_recording(FIXTURES / name)
    events = recording.events()
    kept = np.flatnonzero(np.random.default_rng(seed).random(len(events)) > 0.02)
    return recording.capture, events.take(kept)


@pytest.mark.parametrize("name", ["svm-6.12-linux-2vcpu.dat", "vmx-6.1-smp.dat"])
@pytest.mark.parametrize("limit", [1, 20])
def test_stages_in_threads_find_the_same(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    capture, table = holed(name, 3)
    size = max(len(table) // 20, 1)
    tables = [table.slice(start, min(start + size, len(table))) for start in range(0, len(table), size)]
    found = []
    for cores in ({0}, {0, 1}):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: cores)
        checker = Checker(capture, limit)
        run_stages(tables, checker.stages)
        found.append(checker.finish())
    assert found[0].n_violations > 10
    assert dataclasses.asdict(found[0]) == dataclasses.asdict(found[1])


def test_what_several_found_is_merged_as_if_they_had_taken_turns() -> None:
    capture, table = joined("svm")
    checker = Checker(capture)
    checker.feed(table)
    sequence, index = checker._findings[0].sequence, checker._findings[0].event_index
    rules = all_rules()
    several, one = (Findings(rules, 3), Findings(rules, 3)), Findings(rules, 3)
    for part in range(3):
        one.begin(sequence, index)
        for half, findings in enumerate(several):
            findings.begin(sequence, index)
            for position in (5 * part + half, 20 + part):
                for taker in (findings, one):
                    taker.check("V4", 2, 1)
                    taker.violate("V4" if half else "V5", [position], constant("this", f"{part} {half}"))
                    taker.violate("V13", [position, position + 1], constant("this", f"{part} {half}"))
    whole = merged(several)
    assert whole.results() == one.results()
    assert sorted(whole.violations, key=lambda v: (v.event_index, v.rule)) == sorted(
        one.violations, key=lambda v: (v.event_index, v.rule)
    )
    assert len(whole.violations) == 9  # three of each rule
