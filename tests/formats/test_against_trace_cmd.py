"""Events, time stamps and fields equal what trace-cmd prints of the same file."""

from __future__ import annotations

import struct
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from writers import trace_cmd
from writers.ring_buffer import discarded, event, page, record, time_stamp
from writers.trace_dat import TraceDatWriter

from kvmtrace.formats import open_recording
from kvmtrace.table.event_table import LOST_EVENTS

FIXTURES = sorted((Path(__file__).parents[2] / "fixtures").rglob("*.dat"))
COMPARED = {
    "kvm_entry": ("vcpu_id", "rip"),
    "kvm_exit": ("exit_reason", "guest_rip", "isa", "info1", "info2", "intr_info", "error_code", "vcpu_id"),
}
COMPARED_ARM64 = {
    "kvm_entry": ("vcpu_pc",),
    "kvm_exit": ("ret", "esr_ec", "vcpu_pc"),
    "kvm_guest_fault": ("vcpu_pc", "hsr", "hxfar", "ipa"),
    "kvm_mmio": ("type", "len", "gpa", "val"),
    "kvm_handle_sys_reg": ("hsr",),
    "kvm_sys_access": ("vcpu_pc", "is_write", "Op0", "Op1", "CRn", "CRm", "Op2"),
    "kvm_hvc_arm64": ("vcpu_pc", "r0", "imm"),
    "kvm_wfx_arm64": ("vcpu_pc", "is_wfe"),
    "kvm_timer_update_irq": ("vcpu_id", "irq", "level"),
    "kvm_userspace_exit": ("reason", "errno"),
}


def random_pages(seed: int, count: int, start: int) -> bytes:
    """Pages of entries and exits with random contents, long deltas, absolute stamps and discarded events."""
    rng = np.random.default_rng(seed)
    pages, ts = [], start
    for _ in range(count):
        records, size, first = [], 0, ts
        while size < 3800:
            delta = int(rng.choice([0, 7, 900, 1 << 28]))
            body = rng.bytes(52)
            if rng.random() < 0.5:
                data = event(11, body[:16] + struct.pack("<I", 1) + body[20:], tid=int(rng.integers(1, 9)))
            else:
                data = event(10, body[:16], tid=int(rng.integers(1, 9)))
            part = record(data, delta)
            ts += delta
            if rng.random() < 0.05:
                ts += 50
                part += time_stamp(ts)
            if rng.random() < 0.05:
                part += discarded(16, 3)
                ts += 3
            records.append(part)
            size += len(part)
        pages.append(page(first, records, lost=5 if rng.random() < 0.3 else None))
        ts += 10
    return b"".join(pages)


def number(text: str) -> int:
    """Read a number as trace-cmd prints it, in decimal with leading zeros too."""
    return int(text, 16) if text.startswith("0x") else int(text)


def compare(path: Path) -> int:
    """Hold every event of a file against trace-cmd's; return how many there were."""
    events = open_recording(path).events()
    compared = COMPARED_ARM64 if events.has("kvm_exit", "esr_ec") else COMPARED
    want = trace_cmd.report(path)
    names = [kind.name for kind in events.kinds]
    rows = np.flatnonzero(events.kind != events.kind_index[LOST_EVENTS])
    got = [
        (int(events.ts_ns[i]), int(events.cpu[i]), int(events.tid[i]), names[events.kind[i]].split(":")[-1])
        for i in rows
    ]
    assert got == [w[:4] for w in want]
    position: Counter[str] = Counter()
    columns = {(n, f): events.field(n, f) for n, fields in compared.items() for f in fields if events.has(n, f)}
    for _, _, _, name, texts in want:
        for field in compared.get(name, ()):
            if (name, field) in columns:
                assert int(columns[name, field][position[name]]) == number(texts[field]), (name, field)
        position[name] += 1
    return len(want)


def test_synthetic_file_of_two_cpus(tmp_path):
    path = tmp_path / "trace.dat"
    path.write_bytes(TraceDatWriter([random_pages(1, 6, 1000), random_pages(2, 5, 1100)]).v6())
    assert compare(path) > 400


@pytest.mark.parametrize(
    "options",
    [
        [(14, struct.pack("<IIQ", 2_111_333_333, 32, 0))],
        [(7, b"-1000\0")],
        [(1, b"0x1234\0")],
        [(14, struct.pack("<IIQ", 999_999_937, 29, 77)), (7, b"123456\0")],
    ],
)
def test_clock_options(tmp_path, options):
    path = tmp_path / "trace.dat"
    path.write_bytes(TraceDatWriter([random_pages(3, 3, 1 << 40), random_pages(4, 3, 1 << 40)], options=options).v6())
    assert compare(path) > 200


@pytest.mark.parametrize(
    "arguments",
    [
        ["--file-version", "7", "--compression", "none"],
        ["--file-version", "7", "--compression", "zstd"],
        ["--file-version", "6"],
    ],
)
def test_files_that_trace_cmd_converted(tmp_path, arguments):
    source, path = tmp_path / "source.dat", tmp_path / "converted.dat"
    source.write_bytes(TraceDatWriter([random_pages(5, 4, 1000), b"", random_pages(6, 30, 1300)]).v6())
    subprocess.run(
        ["trace-cmd", "convert", *arguments, "-i", str(source), "-o", str(path)], check=True, capture_output=True
    )
    assert compare(path) == len(trace_cmd.report(source))


def test_fixtures():
    for path in FIXTURES:
        assert compare(path) > 0, path


@pytest.mark.parametrize("guest", ["lifecycle", "smp", "dabt-split"])
@pytest.mark.parametrize("arguments", [[], ["-N"]], ids=["plug-ins", "plain"])
def test_arm64s_text_says_what_the_recording_says(guest: str, arguments: list[str], tmp_path: Path) -> None:
    path = next(one for one in FIXTURES if one.name == f"arm64-6.1-{guest}.dat")
    text = tmp_path / "report.txt"
    command = ["trace-cmd", "report", *arguments, str(path)]
    text.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
    told, whole = open_recording(str(text)).events(), open_recording(str(path)).events()
    for name, fields in COMPARED_ARM64.items():
        assert told.count(name) == whole.count(name), name
        for field in fields:
            if whole.count(name) and told.has(name, field):
                assert np.array_equal(told.field(name, field), whole.field(name, field)), (name, field)


@pytest.mark.parametrize("max_events", [None, 100])
def test_a_part_that_trace_cmd_split_from_before_the_beginning(max_events: int | None, tmp_path: Path) -> None:
    """It writes the first event twice: once is counted, the repeat is stated."""
    fixture = Path(__file__).parents[2] / "fixtures" / "svm-6.12-lifecycle.dat"
    command = ["trace-cmd", "split", "-i", str(fixture), "-o", str(tmp_path / "part.dat"), "1.0"]
    subprocess.run(command, check=True, capture_output=True)
    whole, part = open_recording(fixture).events(), open_recording(tmp_path / "part.dat.1")
    tables = [part.events()] if max_events is None else list(part.iter_events(max_events))
    assert [ts for table in tables for ts in table.ts_ns.tolist()] == whole.ts_ns.tolist()
    assert part.loss.repeated == 1
    assert open_recording(fixture).loss.repeated == 0
