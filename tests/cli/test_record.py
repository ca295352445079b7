"""`kvmtrace record` as a user meets it: requests that make no sense, what is printed, exit codes."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from kvmtrace.capture.backend import choose_backend
from kvmtrace.capture.settings import RecordResult, RecordSettings, TargetSpec
from kvmtrace.cli import record
from kvmtrace.errors import CapabilityError, UsageError


def kvmtrace(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmtrace", *args], capture_output=True, text=True, timeout=300, check=False, **more
    )


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("64k", 65536), ("64K", 65536), ("1.5M", 1572864), ("2GiB", 2 << 30), ("3mb", 3 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert record.Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "12q", "M", "1e9", "nan", "9" * 400, "2000000000T"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(click.BadParameter):
        record.Size().convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "seconds"), [("10", 10.0), ("0.5s", 0.5), ("500ms", 0.5), ("2m", 120.0), ("1h", 3600.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert record.Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "x", "1e308", "9" * 400, "9" * 30 + "h"])
def test_no_durations(text: str) -> None:
    with pytest.raises(click.BadParameter):
        record.Duration().convert(text, None, None)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-p", "9" * 30],
        ["--exit-reason", "9" * 5000],
        ["--exit-reason", "0xfffffffff"],
        ["--exit-reason", "\u0663"],
        ["--vcpu", "9" * 30],
        ["--sample", "9" * 30],
        ["--count", "9" * 30],
        ["--slower-than", "9" * 400],
        ["--max-size", "9" * 400],
    ],
)
def test_numbers_beyond_all_bounds_are_wrong_usage(arguments: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(record.command, ["-o", str(tmp_path / "x.dat"), "-a", *arguments])
    assert done.exit_code == 2
    assert "Error:" in done.output


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "nothing to record"),
        (["-a", "--guest", "lifecycle"], "--guest and -a exclude each other"),
        (["-p", "1", "--", "true"], "-p and a command exclude each other"),
        (["-a", "--count", "3"], "--count belongs to --guest"),
        (["-p", "4194304"], "there is no process 4194304"),
        (["--qmp", "/none", "-a"], "--qmp asks the QEMU that is recorded"),
        (["--qmp", "/none", "-p", "1"], "--qmp /none: no such socket"),
        (["--qmp", "/none", "--backend", "bpf", "-p", "1"], "--qmp needs --backend ftrace"),
        (["--backend", "ftrace", "--summary", "-a"], "--summary needs --backend bpf"),
    ],
)
def test_senseless_requests(arguments: list[str], why: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(record.command, ["-o", str(tmp_path / "x.dat"), *arguments])
    assert isinstance(result.exception, UsageError)
    assert why in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_command_are_its_own() -> None:
    context = record.command.make_context("record", ["-d", "1", "sh", "-c", "true", "-o", "x"])
    assert context.params["command_line"] == ("sh", "-c", "true", "-o", "x")


def settings(**more: Any) -> RecordSettings:
    return replace(RecordSettings(Path("x"), TargetSpec("all")), **more)


def test_backend_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvmtrace.capture.backend.find_tracefs", lambda: Path("/sys/kernel/tracing"))
    assert choose_backend(settings())[0] == "ftrace"
    assert choose_backend(settings(backend="bpf"))[0] == "bpf"
    assert choose_backend(settings(summary=True))[0] == "bpf"
    assert choose_backend(settings(filters={"slower_than_ns": 5}))[0] == "bpf"


def test_backend_without_tracefs(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise CapabilityError("no tracefs here", "get one")

    monkeypatch.setattr("kvmtrace.capture.backend.find_tracefs", none)
    monkeypatch.setattr("kvmtrace.capture.backend.find_spec", lambda name: object())
    assert choose_backend(settings()) == ("bpf", "no tracefs here")
    monkeypatch.setattr("kvmtrace.capture.backend.find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match="no tracefs here; get one"):
        choose_backend(settings())


def result(**more: Any) -> RecordResult:
    meta = {
        "loss": {"events": 0, "by_cpu": {}},
        "duration_ns": 2_000_000_000,
        "backend": "ftrace",
        "notes": [],
        "ended_by": "target",
        "target_status": 0,
    }
    values: dict[str, Any] = {
        "path": Path("run.dat"),
        "meta": meta | more.pop("meta", {}),
        "n_events": 4000,
        "by_kind": None,
        "file_bytes": 3 << 20,
        "recorder_cpu_s": 0.002,
    }
    return RecordResult(**(values | more))


def test_what_is_said() -> None:
    assert record.describe(result()) == [
        "recorded 4,000 events (2,000/s) in 2.00 s with ftrace: run.dat (3.0 MiB)",
        "lost 0 events; the recorder took 0.00 s of CPU time, 500 ns per event",
    ]


def test_loss_is_said_per_cpu() -> None:
    lines = record.describe(result(meta={"loss": {"events": 1234, "by_cpu": {"0": 1000, "3": 234}}}))
    assert lines[1].startswith("lost 1,234 events (CPU 0: 1,000, CPU 3: 234);")
    assert "unknown number" in record.describe(result(meta={"loss": {"events": None, "by_cpu": {}}}))[1]


def test_discards_notes_ends_and_statuses_are_said() -> None:
    text = "\n".join(
        record.describe(
            result(
                meta={
                    "discarded": {"events": 77, "by_cpu": {"0": 77}},
                    "notes": ["so"],
                    "ended_by": "disk full",
                    "target_status": -9,
                },
                n_events=None,
            )
        )
    )
    assert "older events deleted to keep the size: 77" in text
    assert "note: so" in text
    assert "ended early: disk full" in text
    assert "killed by signal 9" in text
    assert "recorded events in" in text


@pytest.mark.kvm
class TestForReal:
    def test_output_goes_to_stderr_and_the_commands_to_stdout(self, tmp_path: Path) -> None:
        done = kvmtrace("record", "-o", str(tmp_path / "x.dat"), "--backend", "ftrace", "--", "echo", "hello")
        assert (done.returncode, done.stdout) == (0, "hello\n")
        assert done.stderr.startswith("recorded ")
        assert stat.S_IMODE((tmp_path / "x.dat").stat().st_mode) == 0o600

    def test_strict(self, tmp_path: Path) -> None:
        arguments = ["--backend", "ftrace", "-o", str(tmp_path / "x.dat"), "--strict", "--force", "--guest", "storm"]
        lossy = kvmtrace("record", *arguments, "--count", "100000", "--buffer-size", "8k")
        assert lossy.returncode == 5
        assert "events were lost; try a larger --buffer-size" in lossy.stderr
        assert (tmp_path / "x.dat").exists()
        assert kvmtrace("record", *arguments, "--count", "1000").returncode == 0

    def test_closed_pipe(self, tmp_path: Path) -> None:
        read, write = os.pipe()
        os.close(read)
        argv = [
            sys.executable,
            "-m",
            "kvmtrace",
            "record",
            "--backend",
            "ftrace",
            "-o",
            str(tmp_path / "x.dat"),
            "--guest",
            "lifecycle",
        ]
        with subprocess.Popen(argv, stdout=write, stderr=write) as recorder:
            os.close(write)
            assert recorder.wait(timeout=300) == 0
        assert (tmp_path / "x.dat").exists()
        assert [p.name for p in tmp_path.iterdir()] == ["x.dat"]

    @pytest.mark.skipif(os.geteuid() != 0, reason="becoming nobody takes root")
    def test_no_privilege_is_one_line_and_exit_code_4(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o777)
        done = kvmtrace(
            "record",
            "--backend",
            "ftrace",
            "-o",
            "/var/tmp/never.dat",
            "--",
            "true",
            user=65534,
            group=65534,
            extra_groups=[],
            cwd="/",
        )
        assert done.returncode == 4
        assert done.stderr.count("\n") == 1
        assert "sudo" in done.stderr

    @pytest.mark.skipif(os.geteuid() != 0, reason="sudo's variables count for root only")
    def test_under_sudo_file_and_command_belong_to_the_user(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o777)
        environment = os.environ | {"SUDO_UID": "65534", "SUDO_GID": "65534"}
        done = kvmtrace(
            "record", "--backend", "ftrace", "-o", str(tmp_path / "x.dat"), "--", "id", "-u", env=environment
        )
        assert (done.returncode, done.stdout) == (0, "65534\n"), done.stderr
        status = (tmp_path / "x.dat").stat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (65534, 0o600)
