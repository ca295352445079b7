"""The perf-compatible tables against an event-by-event model of perf's own code."""

from __future__ import annotations

import random

import pytest

from kvmtrace.render.text.perf_text import render_perf_table
from kvmtrace.report.build import ReportOptions, build_report

from .perf_oracle import perf_samples, rel_stderr
from .tables import TableRecording, make_table, recording

KINDS = ["kvm_entry", "kvm_exit", "kvm_mmio", "kvm_msr", "kvm_pio"]


def random_rows(seed: int, n: int = 400) -> list[tuple]:
    """Return events in any order that perf might meet, sensible or not."""
    rng = random.Random(seed)
    now, rows = 0 if seed % 5 == 0 else 1000, []
    for _ in range(n):
        now += rng.choice([0, 1, 7, 1000]) if rng.random() < 0.98 else -rng.randrange(50)
        kind = rng.choices(KINDS, [5, 5, 3, 1, 2])[0]
        fields = {
            "kvm_entry": {"vcpu_id": 0},
            "kvm_exit": {"exit_reason": rng.choice([10, 12, 30, 48]), "isa": 1},
            "kvm_mmio": {"type": rng.randrange(3), "gpa": rng.choice([0, 0xFEE00000, 0x300000])},
            "kvm_msr": {"write": rng.randrange(2), "ecx": rng.choice([0x10, 0xC0000080])},
            "kvm_pio": {"rw": rng.randrange(2), "port": rng.choice([0x3F8, 0x64])},
        }[kind]
        rows.append((max(now, 0), 0, rng.choice([7, 8, 9]), kind, fields))
    return rows


def expected_rows(event: str, rows: list[tuple]) -> dict[str, tuple]:
    names = {10: "CPUID", 12: "HLT", 30: "IO_INSTRUCTION", 48: "EPT_VIOLATION"}

    def name(key: tuple) -> str:
        if event == "vmexit":
            return names[key[0]]
        number = f"{key[0]:#x}" if key[0] else "0"
        words = {"mmio": "??W", "ioport": ("PIN", "POUT"), "msr": "RW"}[event]
        return f"{number}:{'R' if event == 'mmio' and key[1] == 1 else words[key[1]]}"

    return {
        name(key): (len(v), sum(v), min(v), max(v), pytest.approx(rel_stderr(v), abs=1e-6))
        for key, v in perf_samples(event, rows).items()
    }


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("perf_only", [False, True])
def test_equals_perf_on_arbitrary_events_however_they_are_cut(seed: int, perf_only: bool) -> None:
    rows = random_rows(seed)
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(len(rows)), rng.randrange(6)))
    options = ReportOptions(model=False, perf_only=perf_only)
    tables = build_report(TableRecording(make_table(rows, KINDS), cuts), options).perf_compatible
    for event in ("vmexit", "mmio", "ioport", "msr"):
        found = {
            row.key: (row.samples, row.total_ns, row.min_ns, row.max_ns, row.rel_stderr)
            for row in getattr(tables, event)
        }
        assert found == expected_rows(event, rows), event


def test_rows_are_ordered_by_samples_then_by_hash_bucket() -> None:
    rows = [(10, 0, 5, "kvm_entry", {})]
    for i, msr in enumerate([0x835, 0x1B, 0x10, 0x10]):
        rows.append((100 + 20 * i, 0, 5, "kvm_msr", {"ecx": msr, "write": 1}))
        rows.append((110 + 20 * i, 0, 5, "kvm_entry", {}))
    tables = build_report(recording(rows), ReportOptions(model=False)).perf_compatible
    assert [row.key for row in tables.msr] == ["0x10:W", "0x1b:W", "0x835:W"]


def test_failed_entries_and_unknown_reasons_are_what_perf_calls_them() -> None:
    rows = [(10, 0, 5, "kvm_entry", {})]
    for i, reason in enumerate([0x80000021, 0x4D0]):
        rows.append((100 + 20 * i, 0, 5, "kvm_exit", {"exit_reason": reason, "isa": 1}))
        rows.append((110 + 20 * i, 0, 5, "kvm_entry", {}))
    vmexit = build_report(recording(rows), ReportOptions(model=False)).perf_compatible.vmexit
    assert {(row.key, row.exit_reason, row.isa) for row in vmexit} == {
        ("UNKNOWN", 0x80000021, "vmx"),
        ("UNKNOWN", 0x4D0, "vmx"),
    }


def test_layout_is_perfs() -> None:
    rows = [(10, 0, 5, "kvm_entry", {})]
    for i, dur in enumerate([1000, 3000]):
        rows.append((10_000 * (i + 1), 0, 5, "kvm_exit", {"exit_reason": 10, "isa": 1}))
        rows.append((10_000 * (i + 1) + dur, 0, 5, "kvm_entry", {}))
    vmexit = build_report(recording(rows), ReportOptions(model=False)).perf_compatible.vmexit
    lines = render_perf_table("VM-EXIT", vmexit, "all VMs, all VCPUs").split("\n")
    # the spaces are those of perf 6.1's own output
    assert lines[4] == ("             VM-EXIT    Samples  Samples%     Time%    Min Time    Max Time         Avg time ")
    assert lines[6] == (
        "               CPUID          2   100.00%   100.00%      1.00us      3.00us      2.00us ( +-  50.00% ) "
    )
    assert "Total Samples:2, Total events handled time:4.00us." in lines
