"""`kvmtrace report` and `kvmtrace check` as commands: formats, exit codes, one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from fuzz.seeds import summary
from report.tables import KVM_RUN, Row, TableRecording, make_table

from kvmtrace.cli import check, report
from kvmtrace.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


def run(*args: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "kvmtrace", *map(str, args)], input=stdin, capture_output=True, timeout=300, check=False
    )


def life() -> list[Row]:
    """Return a vCPU's events of two KVM_RUNs, as a healthy KVM makes them."""
    rows: list[Row] = []
    now = 1_000_000
    for vcpu_id, tid in ((0, 50), (1, 51)):
        for turn in range(20):
            for after, kind, fields in (
                (1000, "sys_enter_ioctl", {"cmd": KVM_RUN, "fd": 7}),
                (100, "kvm_fpu", {"load": 1}),
                (100, "kvm_entry", {"vcpu_id": vcpu_id, "rip": 0x1000}),
                (500, "kvm_exit", {"vcpu_id": vcpu_id, "exit_reason": 12, "isa": 1, "guest_rip": 0x1000 + turn}),
                (30 * turn, "kvm_fpu", {"load": 0}),
                (50, "kvm_userspace_exit", {"reason": 5}),
                (20, "sys_exit_ioctl", {}),
            ):
                now += after
                rows.append((now, 0, tid, kind, fields))
    return rows


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every path a recording of `life`."""

    def opened(path: str) -> TableRecording:
        return TableRecording(make_table(life()), path=path)

    monkeypatch.setattr("kvmtrace.formats.open_recording", opened)


@pytest.mark.usefixtures("recording")
class TestReport:
    def invoke(self, *args: str) -> str:
        result = CliRunner().invoke(report.command, args, catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    def test_text(self) -> None:
        text = self.invoke("a.dat", "--no-model")
        assert text.startswith("kvmtrace report: a.dat\n")
        assert "HLT is 100% of the host's work on" in text

    def test_json_has_what_the_interface_promises(self) -> None:
        document = json.loads(self.invoke("a.dat", "--format", "json"))
        assert document["schema"] == "kvmtrace.report/1"
        assert set(document) >= {
            "schema",
            "capture",
            "loss",
            "exits",
            "perf_compatible",
            "userspace_exits",
            "vcpus",
            "detail",
            "bring_up",
            "model",
            "replay",
        }
        assert set(document["exits"][0]) >= {
            "isa",
            "exit_reason",
            "name",
            "count",
            "samples",
            "total_ns",
            "min_ns",
            "max_ns",
            "mean_ns",
            "rel_stderr",
            "p50_ns",
            "p90_ns",
            "p99_ns",
            "to_userspace",
            "guest_before_ns",
        }
        assert document["capture"]["isa"] == "vmx"
        assert document["model"]["n_events"] == len(life())
        assert {
            "rules",
            "transitions",
            "coverage",
            "violations",
            "first_divergence",
            "explained_events",
            "cannot_see",
        } <= set(document["model"])

    def test_several_files_are_a_list_in_json(self) -> None:
        documents = json.loads(self.invoke("a.dat", "b.dat", "--format", "json", "--no-model"))
        assert [document["capture"]["path"] for document in documents] == ["a.dat", "b.dat"]

    def test_one_vcpu(self) -> None:
        document = json.loads(self.invoke("a.dat", "--format", "json", "--no-model", "--vcpu", "1"))
        assert [vcpu["tid"] for vcpu in document["vcpus"]] == [51]
        assert document["exits"][0]["count"] == 20
        assert document["capture"]["selection"] == "vCPU 1"

    def test_one_thread(self) -> None:
        document = json.loads(self.invoke("a.dat", "--format", "json", "--no-model", "--tid", "50"))
        assert [vcpu["vcpu_id"] for vcpu in document["vcpus"]] == [0]

    def test_a_stretch_of_time(self) -> None:
        rows = life()
        exits = [row[0] for row in rows if row[3] == "kvm_exit"]
        begin, end = exits[3] - rows[0][0], exits[9] - rows[0][0]
        document = json.loads(
            self.invoke("a.dat", "--format", "json", "--no-model", "--from", f"{begin}ns", "--to", f"{end}ns")
        )
        assert document["exits"][0]["count"] == 7
        absolute = json.loads(
            self.invoke("a.dat", "--format", "json", "--no-model", "--from", f"@{exits[3]}ns", "--to", f"@{exits[9]}ns")
        )
        assert absolute["exits"] == document["exits"]

    def test_one_table(self) -> None:
        text = self.invoke("a.dat", "--no-model", "--by", "rip", "--sort", "key")
        assert text.index("0x1000 ") < text.index("0x1013 ")
        assert "Userspace exits" not in text

    def test_output_file(self, tmp_path: Path) -> None:
        target = tmp_path / "report.txt"
        assert self.invoke("a.dat", "--no-model", "-o", str(target)) == ""
        assert target.read_text().startswith("kvmtrace report")

    def test_perf_layout(self) -> None:
        assert "Analyze events for all VMs, all VCPUs:" in self.invoke("a.dat", "--perf-compatible")

    def test_guest_symbols(self, tmp_path: Path) -> None:
        symbols = tmp_path / "System.map"
        symbols.write_text("0000000000001000 T start\n0000000000001010 t loop\n")
        text = self.invoke("a.dat", "--no-model", "--by", "rip", "--guest-symbols", str(symbols))
        assert "start+0xf" in text
        assert "loop+0x3" in text


@pytest.mark.usefixtures("recording")
class TestNothingThere:
    """A selection or a table without a row says so."""

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["--vcpu", "99"], "a.dat has no vCPU 99; it has vCPUs 0, 1"),
            (["--tid", "99"], "a.dat has no event of thread 99; vCPUs ran on threads 50, 51"),
            (["--from", "5"], "a.dat has no event (from 5 s after the start); its events are from 0.000000 to 0.0"),
            (["--to", "@0.0001"], "a.dat has no event (to 0.0001 s); its events are from 0.001"),
        ],
    )
    def test_of_a_selection(self, args: list[str], words: str) -> None:
        result = CliRunner().invoke(report.command, ["a.dat", "--no-model", *args])
        assert isinstance(result.exception, UsageError)
        assert words in str(result.exception)

    @pytest.mark.parametrize(
        ("by", "words"),
        [
            ("cr", "No access to a control register"),
            ("msr", "No access to an MSR"),
            ("port", "No access to an I/O port"),
        ],
    )
    def test_of_a_table(self, by: str, words: str) -> None:
        result = CliRunner().invoke(report.command, ["a.dat", "--no-model", "--by", by], catch_exceptions=False)
        assert words in result.output


def many_sites(n: int) -> TableRecording:
    rows: list[Row] = []
    for i in range(n):
        rows.append((10_000 * i, 0, 50, "kvm_exit", {"exit_reason": 12, "isa": 1, "guest_rip": 0x1000 + i}))
        rows.append((10_000 * i + i + 1, 0, 50, "kvm_entry", {"vcpu_id": 0, "rip": 0x1000 + i}))
    return TableRecording(make_table(rows))


class TestAllRows:
    """What promises all rows gives all rows; what does not says how much it left out."""

    N = 5000

    @pytest.fixture(autouse=True)
    def sites(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("kvmtrace.formats.open_recording", lambda _: many_sites(self.N))

    def invoke(self, *args: str) -> str:
        return CliRunner().invoke(report.command, ["a.dat", "--no-model", *args], catch_exceptions=False).output

    def test_text(self) -> None:
        text = self.invoke("--by", "rip")
        assert sum(" HLT" in line for line in text.splitlines()) >= self.N
        assert "more" not in text

    def test_json(self) -> None:
        detail = json.loads(self.invoke("--by", "rip", "--format", "json"))["detail"]
        assert len(detail["rips"]) == detail["distinct"]["rips"] == self.N
        assert detail["left_out"] == {}

    def test_what_is_left_out_of_a_whole_report_is_told(self) -> None:
        detail = json.loads(self.invoke("--format", "json"))["detail"]
        left = self.N - len(detail["rips"])
        assert detail["left_out"]["rips"] == {"rows": left, "count": left, "total_ns": left * (left + 1) // 2}
        assert detail["distinct"]["rips"] == self.N
        assert f"... {self.N - 6:,} more (--by rip)" in self.invoke("--show", "details")
        assert f"rip ({self.N:,})" in self.invoke()


@pytest.mark.parametrize("args", [("check",), ("report", "--explain", "1"), ("report", "--by", "rip"), ("compare",)])
def test_a_summary_is_told_in_one_line(args: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "counts"
    path.write_bytes(summary())
    done = run(*args, path, *([path] if args == ("compare",) else []))
    assert done.returncode in {2, 3}
    assert done.stderr.count(b"\n") == 1
    assert b"a recording of --summary" in done.stderr


@pytest.mark.usefixtures("recording")
def test_check_conforms() -> None:
    result = CliRunner().invoke(check.command, ["a.dat"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "conforms" in result.output


@pytest.mark.usefixtures("recording")
def test_check_json_holds_model_and_nothing_statistical() -> None:
    result = CliRunner().invoke(check.command, ["a.dat", "--format", "json"], catch_exceptions=False)
    assert list(json.loads(result.output)) == ["schema", "capture", "loss", "model"]


def test_check_reports_a_violation_with_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row for row in life() if not (row[3] == "kvm_entry" and row[2] == 50)][:-3]
    kept = [row for row in life() if row[2] == 51]
    monkeypatch.setattr(
        "kvmtrace.formats.open_recording", lambda path: TableRecording(make_table([*rows, *kept]), path=path)
    )
    result = CliRunner().invoke(check.command, ["a.dat"], catch_exceptions=False)
    assert result.exit_code == 1
    assert "VIOLATION" in result.output
    assert "First divergence from the model: violation of" in result.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--from", "soon"], "is no time"),
        (["--by", "colour"], "--by"),
        (["--sort", "colour"], "--sort"),
        (["--from", "1", "--to", "@2"], "both"),
        (["--tid", "0"], "--tid"),
        (["--limit", "x"], "--limit"),
        (["--tid", "99999999999999999999"], "--tid"),
        (["--vcpu", "99999999999999999999"], "--vcpu"),
        (["--from", "99999999999999999999"], "longer than any recording"),
        (["--from", "1e308"], "is no time"),
        (["--from", "5", "--to", "2"], "--from is behind --to"),
        (["--explain", "1", "--format", "json"], "--format does not go with --explain"),
        (["--explain", "1", "--by", "port"], "--by does not go with --explain"),
        (["--perf-compatible", "--by", "port"], "--by does not go with --perf-compatible"),
        (["--perf-compatible", "--format", "html"], "--format does not go with --perf-compatible"),
        (["--format", "html", "--by", "port"], "--by does not go with --format html"),
        (["--format", "json", "--sort", "time"], "--sort does not go with --format"),
    ],
)
def test_wrong_usage_is_exit_code_2(args: list[str], words: str, tmp_path: Path) -> None:
    done = run("report", tmp_path / "x.dat", *args)
    assert done.returncode == 2
    assert words.encode() in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["report", "check"])
def test_no_trace_is_exit_code_3_and_one_line(command: str, tmp_path: Path) -> None:
    path = tmp_path / "x.dat"
    path.write_bytes(b"hello" * 100)
    done = run(command, path)
    assert done.returncode == 3
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"kvmtrace: ")


@pytest.mark.parametrize("command", ["report", "check"])
def test_standard_input_is_read(command: str) -> None:
    done = run(command, "-", stdin=b"no trace")
    assert done.returncode == 3
    assert b"Traceback" not in done.stderr


def test_bad_symbols_are_located(tmp_path: Path) -> None:
    symbols = tmp_path / "System.map"
    symbols.write_text("0000000000001000 T start\nnonsense\n")
    done = run("report", tmp_path / "x.dat", "--guest-symbols", symbols)
    assert done.returncode == 3
    assert b"offset 0x19" in done.stderr


@pytest.mark.parametrize("command", ["report", "check"])
def test_help_has_an_example(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert b"Example: kvmtrace" in done.stdout
