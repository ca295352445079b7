"""What is planted in a made fleet is found, and nothing else is reported."""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fleet.found import ask, expected_and_found, make_whole_fleet
from fleet.real_sources import FAULTY, MANIFEST, N_DAMAGED, N_FORBIDDEN, N_VANISHED
from fleet.s3_server import s3_server
from kvmtrace.render.html.fleet_page import render_fleet_html
from kvmtrace.render.terminal import Style
from kvmtrace.render.text.fleet_text import describe_command, render_fleet_report

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fleet.found import MadeFleet
    from kvmtrace.fleet.cohorts import FleetComparison
    from kvmtrace.fleet.fleet_report import FleetReport

N_RECORDINGS = 600


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeFleet]:
    folder = tmp_path_factory.mktemp("fleet")
    # of this one, many peers' medians share a bucket: they look more alike than they are
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as files:
        yield make_whole_fleet(folder, N_RECORDINGS, 13, files)


@pytest.fixture(scope="module")
def asked(made: MadeFleet) -> tuple[FleetReport, FleetComparison]:
    return ask(made.folder)


def assert_all_found_and_nothing_else(made: MadeFleet, asked: tuple[FleetReport, FleetComparison]) -> None:
    for kind, (expected, found) in expected_and_found(made, *asked).items():
        assert found == expected, kind
    report, compared = asked
    mean = next(change for change in compared.regressions if change.metric == "mean")
    assert mean.low <= 1.08 <= mean.high
    assert report.n_failures == N_DAMAGED + N_FORBIDDEN + N_VANISHED


def test_no_orphans() -> None:
    assert {path.name for path in FAULTY.iterdir()} == {"manifest.json", *MANIFEST}
    for name, told in MANIFEST.items():
        assert hashlib.sha256((FAULTY / name).read_bytes()).hexdigest() == told["sha256"]


def test_one_fleet(made: MadeFleet, asked: tuple[FleetReport, FleetComparison]) -> None:
    assert_all_found_and_nothing_else(made, asked)


def test_it_is_read_in_narrow_terminals_and_leads_to_the_host(
    made: MadeFleet, asked: tuple[FleetReport, FleetComparison]
) -> None:
    report, _ = asked
    text = render_fleet_report(report, Style(width=60))
    sentences = text[text.index("unlike their peers") : text.index("VM-exits by")].splitlines()
    assert max(len(line) for line in sentences if "kvmtrace report" not in line) <= 60
    assert "\n7 hosts and 3 VMs unlike their peers\n" in text
    page = render_fleet_html(report)
    for host, vm in made.planted.outliers:
        assert f"\n  {host}  " in text if vm is None else f"{host}, VM {vm} " in text
    hosts = {*(host for host, _ in made.planted.outliers), *(row.example_host for row in report.findings)}
    assert all(f'<a href="#host={host}">{host}</a>' in page for host in hosts)


def test_the_command_of_a_finding_explains_it(asked: tuple[FleetReport, FleetComparison]) -> None:
    report, _ = asked
    text, page = render_fleet_report(report, Style(width=200)), render_fleet_html(report)
    for row in report.findings:
        command = describe_command(row)
        assert command in text
        assert command in page
        assert "s3://" in command
        assert "--explain" in command
    command = describe_command(report.findings[0])
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"VM-exit {report.findings[0].vm_exit:,}" in done.stdout


def test_a_recording_in_a_bucket_is_told_by_its_url(made: MadeFleet) -> None:
    url = next(iter(made.real.faulty.values()))
    done = subprocess.run(
        [sys.executable, "-m", "kvmtrace", "check", url, "s3://traces/damaged-0.dat", "s3://traces/none"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert f"kvmtrace check: {url}" in done.stdout
    assert f"kvmtrace report {url} --explain" in " ".join(done.stdout.split())
    assert "s3://traces/damaged-0.dat: " in done.stderr
    assert "s3://traces/none: no such file" in done.stderr
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 2


# more of 10,000: python tests/fleet/found.py 10000 21 40
@pytest.mark.slow
@pytest.mark.parametrize(("n_recordings", "seed"), [(10_000, 21), *((N_RECORDINGS, seed) for seed in range(21, 41))])
def test_twenty_fleets(n_recordings: int, seed: int, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as files:
        whole = make_whole_fleet(tmp_path / "dest", n_recordings, seed, files)
        assert_all_found_and_nothing_else(whole, ask(whole.folder))
