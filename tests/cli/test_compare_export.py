"""`kvmtrace compare` and `kvmtrace export` as a user calls them, and the files read back by their real readers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow.feather
import pytest

from kvmtrace.formats import open_recording

FIXTURES = Path(__file__).parents[2] / "fixtures"
OLD, NEW = FIXTURES / "svm-6.1-storm.dat", FIXTURES / "svm-6.12-storm.dat"
SMALL = FIXTURES / "svm-6.1-lifecycle.dat"


def kvmtrace(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmtrace", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_compare_prints_what_changed_within_100_columns() -> None:
    done = kvmtrace("compare", OLD, NEW)
    assert done.returncode == 0
    assert "significant change" in done.stdout
    # file names are as long as they are
    assert all(len(line) <= 100 for line in done.stdout.splitlines() if str(FIXTURES) not in line)


def test_a_recording_compared_with_itself_has_not_changed() -> None:
    done = kvmtrace("compare", OLD, OLD, "--fail-on-regression")
    assert done.returncode == 0
    assert done.stdout.startswith("no significant change")


def test_compare_json_and_exit_code_on_regression() -> None:
    done = kvmtrace("compare", OLD, NEW, "--format", "json", "--fail-on-regression")
    document = json.loads(done.stdout)
    assert document["schema"] == "kvmtrace.compare/1"
    assert document["regressed"] == (done.returncode == 1)
    assert {row["name"] for row in document["counts"]} >= {"cpuid", "npf"}


def test_exits_of_one_level_alone_are_compared() -> None:
    nested = FIXTURES / "svm-6.12-nested.dat"
    counts = {}
    for level in ("1", "2"):
        document = json.loads(kvmtrace("compare", nested, nested, "--level", level, "--format", "json").stdout)
        assert document["notes"][0] == f"only VM-exits of L{level} are compared"
        counts[level] = {row["name"]: row["base"] for row in document["counts"] if row["kind"] == "vm_exit"}
    assert counts["1"]["vmrun"] == 28
    assert "vmrun" not in counts["2"]
    assert counts["2"]["cpuid"] == counts["2"]["hlt"] == 7
    assert "cpuid" not in counts["1"]


def test_what_ran_no_nested_guest_has_no_exits_of_one() -> None:
    done = kvmtrace("compare", SMALL, SMALL, "--level", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "tells of no VM-exit of L2" in done.stderr


def test_recordings_made_differently_are_not_compared() -> None:
    pair = [FIXTURES / f"vmx-{kernel}-linux-1vcpu.dat" for kernel in ("6.1", "6.12")]
    done = kvmtrace("compare", *pair, "--fail-on-regression")
    assert done.returncode == 4
    assert done.stdout.startswith("not comparable: the sides recorded different events")
    assert "significant" not in done.stdout
    assert "vanish" not in done.stdout
    blocked = next(line for line in done.stdout.splitlines() if line.split()[:1] == ["blocked"])
    assert blocked.split()[-1] == "-"
    assert done.stderr.count("\n") == 1


def test_compare_html_is_one_file(tmp_path: Path) -> None:
    out = tmp_path / "compare.html"
    assert kvmtrace("compare", OLD, NEW, "--format", "html", "-o", out).returncode == 0
    text = out.read_text()
    assert text.endswith("</html>")
    assert "src=" not in text


@pytest.mark.parametrize("arguments", [("compare", OLD), ("export", SMALL, "-o", "x.docx"), ("export", SMALL)])
def test_wrong_usage_is_exit_code_2(arguments: tuple[object, ...]) -> None:
    done = kvmtrace(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["compare", "export"])
def test_what_is_no_trace_is_exit_code_3(command: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.dat"
    bad.write_bytes(b"no trace")
    arguments = (bad, bad) if command == "compare" else (bad, "-o", tmp_path / "x.csv")
    done = kvmtrace(command, *arguments)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "x.csv").exists()


def test_parquet_is_read_by_duckdb_and_pandas_and_by_us(tmp_path: Path) -> None:
    out = tmp_path / "x.parquet"
    assert kvmtrace("export", SMALL, "-o", out).returncode == 0
    events = open_recording(SMALL).events()
    query = f"select event, count(*) from '{out}' group by event"
    counted = dict(duckdb.sql(query).fetchall())
    assert counted == {kind.name: events.count(kind.name) for kind in events.kinds if events.count(kind.name)}
    frame = pd.read_parquet(out)
    exits = frame[frame["event"] == "kvm_exit"]
    assert exits["kvm_exit.exit_reason"].astype(int).tolist() == events.field("kvm_exit", "exit_reason").tolist()
    again = open_recording(out).events()
    assert (again.ts_ns == events.ts_ns).all()


def test_arrow_and_csv_hold_every_event(tmp_path: Path) -> None:
    n_events = len(open_recording(SMALL).events())
    for suffix in ("arrow", "csv"):
        assert kvmtrace("export", SMALL, "-o", tmp_path / f"x.{suffix}").returncode == 0
    assert len(pyarrow.feather.read_table(tmp_path / "x.arrow")) == n_events
    assert len(pd.read_csv(tmp_path / "x.csv", low_memory=False)) == n_events


@pytest.mark.parametrize("suffix", ["pftrace", "perfetto.json"])
def test_perfetto_has_a_slice_for_every_vm_exit(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"x.{suffix}"
    assert kvmtrace("export", SMALL, "-o", out).returncode == 0
    if suffix == "perfetto.json":
        events = json.loads(out.read_text())["traceEvents"]
        assert sum(event["ph"] == "X" and "vm_exit" in event["args"] for event in events) > 100
    else:
        assert out.stat().st_size > 10_000


def test_an_export_is_private_and_replaces_no_link_target(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    out = tmp_path / "x.csv"
    out.symlink_to(victim)
    assert kvmtrace("export", SMALL, "-o", out).returncode == 0
    assert victim.read_text() == "precious"
    assert out.stat().st_mode & 0o777 == 0o600
