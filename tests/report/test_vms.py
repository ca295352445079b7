"""Reports tell VMs apart by their names, and look at one of them alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import kvmtrace
from kvmtrace.ab.collect_run import load_run
from kvmtrace.cli.main import cli
from kvmtrace.errors import UsageError
from kvmtrace.formats import open_recording
from kvmtrace.formats.common.metadata import clean_meta
from kvmtrace.report.build import build_report, check_report
from kvmtrace.table.one_vm import only_vm
from tests.writers.capture_meta import HOST_PIDS, WEB_UUID, read_meta, two_vms, write_with_meta

FIXTURES = Path(__file__).parents[2] / "fixtures"
SMP = FIXTURES / "svm-6.12-smp.dat"
WEB, DB = HOST_PIDS["web-1"], HOST_PIDS["db"]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_vms(SMP, tmp_path_factory.mktemp("vms") / "host.dat")


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code in (0, 1), done.output
    return done.stdout


def test_the_document_has_each_vm(host: Path) -> None:
    report = build_report(open_recording(host))
    rows = {row.name: row for row in report.vms}
    assert rows.keys() == {"web-1", "db", "idle"}
    web, db, idle = rows["web-1"], rows["db"], rows["idle"]
    assert (web.pid, web.kind, web.uuid, web.debugfs) == (WEB, "qemu", WEB_UUID, ("300-12",))
    assert (db.unit, db.pod, idle.exits, idle.tids, idle.budget) == (None, None, 0, (), None)
    assert web.exits + db.exits == sum(row.count for row in report.exits)
    assert {row.tid: row.vm for row in report.vcpus} == {web.tids[0]: "web-1", db.tids[0]: "db"}
    assert web.budget is not None
    assert web.wall_ns == web.budget.total_ns()
    assert {row.vm for row in report.slowest} == {"web-1", "db"}


@pytest.mark.parametrize(("wanted", "pid"), [("web-1", WEB), ("db", DB), (WEB_UUID.upper(), WEB), ("w*", WEB)])
def test_one_vm_is_as_if_it_alone_had_been_recorded(host: Path, wanted: str, pid: int) -> None:
    everything = build_report(open_recording(host))
    report = build_report(only_vm(open_recording(host), wanted))
    (whole,) = [row for row in everything.vms if row.pid == pid]
    assert [row for row in report.vms if row.tids] == [whole]
    assert sum(row.count for row in report.exits) == whole.exits
    assert report.capture.vm == whole.name
    assert report.model is not None
    # in truth the two are one VM's vCPUs: what the other's thread accepted for this one was accepted by nobody here
    assert report.model.violations
    assert {(one.rule, one.event) for one in report.model.violations} == {("V11", "kvm_inj_virq")}
    assert check_report(only_vm(open_recording(host), wanted)).model is not None


def test_patterns_mean_several(host: Path) -> None:
    report = build_report(only_vm(open_recording(host), "*"))
    assert {row.name for row in report.vms} == {"web-1", "db", "idle"}
    assert report.capture.vm == "web-1, db, idle"


def test_no_such_vm_is_told_with_those_that_are(host: Path) -> None:
    with pytest.raises(UsageError, match="has no VM x; it has web-1, db, idle"):
        only_vm(open_recording(host), "x")
    with pytest.raises(UsageError, match="names no VM"):
        only_vm(open_recording(SMP), "x")


def test_text_groups_by_vm(host: Path) -> None:
    text = run("report", host)
    assert text.index("\nVMs ") < text.index("\nVM-exits by reason")
    assert "web-1" in text.split("Time budget")[1]
    assert "idle" in run("report", host, "--by", "vm")
    only = run("report", host, "--vm", "db")
    assert "only db" in only
    assert "web-1" not in only
    assert "only web-1" in run("check", host, "--vm", "web-1")
    assert "of db (thread" in run("report", host, "--explain", "3", "--vm", "db")


def test_recordings_without_names_look_as_before() -> None:
    assert "\nVMs " not in run("report", SMP)
    assert "  VM  " not in run("report", SMP, "--by", "vcpu")


def test_compare_takes_one_vm(host: Path) -> None:
    both, web = load_run(str(host)), load_run(str(host), vm="web-1")
    assert sum(len(own.dur_ns) for own in web.samples.values()) < sum(len(own.dur_ns) for own in both.samples.values())
    assert "no significant change" in run("compare", host, host, "--vm", "web-1")


def test_exports_name_the_vm(host: Path, tmp_path: Path) -> None:
    for table in ("vm_exits", "userspace_exits"):
        out = tmp_path / f"{table}.csv"
        run("export", host, "-o", out, "--table", table)
        header, *rows = out.read_text().splitlines()
        at = header.replace('"', "").split(",").index("vm")
        assert {row.replace('"', "").split(",")[at] for row in rows} == {"web-1", "db"}
    out = tmp_path / "x.perfetto.json"
    run("export", host, "-o", out)
    names = {event["args"]["name"] for event in json.loads(out.read_text())["traceEvents"]
             if event.get("name") == "process_name"}  # fmt: skip
    assert names == {f"VM web-1 ({WEB})", f"VM db ({DB})"}
    run("export", host, "-o", tmp_path / "db.parquet", "--vm", "db")
    again = build_report(open_recording(tmp_path / "db.parquet"))
    assert [row.name for row in again.vms] == ["db"]


def test_html_names_the_vm(host: Path) -> None:
    page = run("report", host, "--format", "html")
    assert 'id="vms-section"' in page
    assert "web-1 vCPU 0" in page
    assert 'id="vms-section"' not in run("report", SMP, "--format", "html")


@pytest.mark.parametrize("arguments", [["report"], ["report", "--format", "json"], ["report", "--format", "html"],
                                       ["check"], ["report", "--explain", "2"]])  # fmt: skip
def test_anonymized_reports_name_no_vm(host: Path, arguments: list[str]) -> None:
    text = run(*arguments, host, "--anonymize")
    for secret in ("web-1", WEB_UUID, "machine-qemu", "firecracker\0"):
        assert secret not in text
    if arguments == ["report"]:
        assert "vm-1" in text


def test_anonymized_exports_keep_vms_apart(host: Path, tmp_path: Path) -> None:
    run("export", host, "-o", tmp_path / "a.parquet", "--anonymize")
    data = (tmp_path / "a.parquet").read_bytes()
    assert b"web-1" not in data
    assert WEB_UUID.encode() not in data
    report = build_report(open_recording(tmp_path / "a.parquet"))
    assert [row.name for row in report.vms if row.tids] == ["vm-1", "vm-2"]


def test_python_names_the_vm(host: Path) -> None:
    loaded = kvmtrace.load(host)
    assert set(loaded.vcpus["vm"]) == {"web-1", "db"}
    assert set(loaded.vm_exits["vm"]) == {"web-1", "db"}
    assert set(kvmtrace.load(host, vm="db").userspace_exits["vm"]) == {"db"}
    assert list(loaded.vm_exits.columns[4:8]) == ["tid", "pid", "vm", "vcpu_id"]


def test_fleet_summaries_name_vms(host: Path) -> None:
    from kvmtrace.fleet.summarize import summarize

    rows = {row["pid"]: (row["name"], row["uuid"]) for row in summarize(host, "x")["vms"]}
    assert rows == {WEB: ("web-1", WEB_UUID), DB: ("db", None), 999: ("idle", None)}


BAD_VMS: list[Any] = [
    7, {}, None, "x", [7], [{}], [{"pid": "1"}], [{"pid": -1}], [{"pid": 5, "name": 7, "vcpus": [], "debugfs": {}}],
    [{"pid": WEB, "name": "\x1b[2J\ud800", "vcpus": {"x": 1, "5": "y", "6": 2}}], [{"pid": 1}] * 5000,
]  # fmt: skip


@pytest.mark.parametrize("vms", BAD_VMS, ids=range(len(BAD_VMS)))
def test_what_a_file_says_of_vms_is_not_trusted(vms: Any, tmp_path: Path) -> None:
    path = write_with_meta(SMP, read_meta(SMP) | {"vms": vms}, tmp_path / "bad.dat")
    text = run("report", path)
    assert "\x1b" not in text
    assert all(row["pid"] >= 0 for row in clean_meta({"vms": vms}).get("vms") or [])


@pytest.mark.parametrize("arguments", [["report"], ["check"], ["compare"], ["export", "-o", "x.csv"]])
def test_a_vm_that_is_not_there_is_wrong_usage(host: Path, arguments: list[str]) -> None:
    files = [str(host)] * (2 if arguments == ["compare"] else 1)
    result = CliRunner().invoke(cli, [*arguments, *files, "--vm", "x"])
    assert getattr(result.exception, "code", None) == 2 or isinstance(result.exception, UsageError)
