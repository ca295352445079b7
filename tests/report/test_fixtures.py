"""Every committed recording: budgets sum exactly, splits sum exactly, cuts change nothing, the guest's counts hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmtrace.formats import open_recording
from kvmtrace.isa.registry import BY_NAME
from kvmtrace.render.text.report_text import render_text
from kvmtrace.report.anonymize import anonymized
from kvmtrace.report.build import ReportOptions, build_report
from kvmtrace.report.json_document import to_json
from kvmtrace.spans.time_parts import EXIT_PARTS

from .tables import TableRecording

if TYPE_CHECKING:
    from kvmtrace.report.document import Report

FIXTURES = Path(__file__).parents[2] / "fixtures"
PATHS = sorted(FIXTURES.glob("*.dat"))


@pytest.fixture(scope="module", params=PATHS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def report(path: Path) -> Report:
    return build_report(open_recording(str(path)), ReportOptions(model=False))


def test_there_are_fixtures_of_both_isas() -> None:
    assert {path.name.split("-")[0] for path in PATHS} >= {"svm", "vmx"}


def test_parts_sum_to_the_wall_time_exactly(report: Report) -> None:
    assert report.vcpus
    for vcpu in report.vcpus:
        assert vcpu.budget.total_ns() == vcpu.wall_ns
        assert all(value is None or value >= 0 for value in vars(vcpu.budget).values())
    for row in report.exits:
        if row.samples:
            parts = [getattr(row, name) or 0 for name in EXIT_PARTS]
            assert sum(parts) == row.total_ns, row.name
            assert sum(row.histogram) == row.samples
            assert row.min_ns <= row.p50_ns <= row.p90_ns <= row.p99_ns <= row.p999_ns <= row.max_ns


def test_cuts_change_nothing(path: Path, report: Report) -> None:
    table = open_recording(str(path)).events()
    whole = TableRecording(table)
    pieces = TableRecording(table, range(997, len(table), 997))
    one, many = (to_json(build_report(r, ReportOptions(model=False))) for r in (whole, pieces))
    assert many == one


def test_the_guests_own_counts(path: Path, report: Report) -> None:
    known = (open_recording(str(path)).capture.meta.get("guest_run") or {}).get("known", {})
    isa = report.capture.isa
    exits = {row.name: row.count for row in report.exits if row.isa == isa}
    for name, count in known.get(isa, {}).items():
        assert exits.get(name, 0) == count, name
    userspace = {row.name: row.count for row in report.userspace_exits if row.errno == 0}
    for name, count in known.get("userspace_exits", {}).items():
        assert userspace.get(name, 0) == count, name
    perf = report.perf_compatible
    ports = {row.key: row.samples for row in perf.ioport}
    for key, count in known.get("ports", {}).items():
        if key != "0xf4:POUT":  # the last access ends the guest: no VM-entry closes it
            assert ports.get(key, 0) == count, key


def test_names_are_the_kernels(report: Report) -> None:
    assert all(row.name == BY_NAME[row.isa].describe(row.exit_reason) for row in report.exits if row.isa)


@pytest.mark.parametrize("name", ["svm-6.1-lifecycle", "vmx-6.1-linux-1vcpu"])
def test_anonymized_reports_render_and_name_nobody(name: str) -> None:
    path = str(FIXTURES / f"{name}.dat")
    plain = build_report(open_recording(path))
    hidden = anonymized(plain)
    text, document = render_text(hidden), to_json(hidden)
    assert hidden.bring_up is not None
    secrets = {plain.capture.host, plain.capture.cpu_model, path, *(row.comm for row in plain.vcpus)}
    secrets |= {f"{row.rip:#x}" for row in plain.detail.rips if row.rip >= 1 << 32}
    secrets |= {str(row.rip) for row in plain.detail.rips if row.rip >= 1 << 32}
    assert not [secret for secret in secrets - {None} if secret in text + document]
    assert [row.total_ns for row in hidden.exits] == [row.total_ns for row in plain.exits]


def test_text_fits_100_columns(report: Report) -> None:
    assert max(map(len, render_text(report).splitlines())) <= 100
