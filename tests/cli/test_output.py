"""Nothing is destroyed: no command writes over what it reads, nor over a recording unless it is told to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvmtrace.cli.main import cli
from kvmtrace.cli.output import check_output
from kvmtrace.errors import UsageError

FIXTURES = Path(__file__).parents[2] / "fixtures"
RECORDING = FIXTURES / "vmx-6.1-mmio-split.dat"
OTHER = FIXTURES / "svm-6.1-mmio-split.dat"


def run(*args: object, stdout: object = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "kvmtrace", *map(str, args)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, timeout=300, check=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Path(shutil.copy(RECORDING, tmp_path / "run.dat"))


def named_as(file: Path, how: str) -> Path:
    """Return another name of a file."""
    other = file.parent / f"{how}.parquet"
    if how == "same":
        return file
    if how == "symbolic link":
        other.symlink_to(file)
    else:
        os.link(file, other)
    return other


@pytest.mark.parametrize("how", ["same", "symbolic link", "hard link"])
@pytest.mark.parametrize(
    "command",
    [
        ("report", "{in}", "--no-model", "-o", "{out}"),
        ("report", "{in}", "--format", "json", "--force", "-o", "{out}"),
        ("report", "{in}", "--explain", "1", "-o", "{out}"),
        ("compare", "{in}", str(OTHER), "-o", "{out}"),
        ("compare", str(OTHER), "{in}", "--force", "-o", "{out}"),
    ],
    ids=" ".join,
)
def test_no_command_writes_over_its_input(file: Path, how: str, command: tuple[str, ...]) -> None:
    before = file.read_bytes()
    target = named_as(file, how)
    done = CliRunner().invoke(cli, [word.replace("{in}", str(file)).replace("{out}", str(target)) for word in command])
    assert isinstance(done.exception, UsageError)
    assert f"is the input {file}" in str(done.exception)
    assert file.read_bytes() == before


@pytest.mark.parametrize("how", ["symbolic link", "hard link"])
def test_export_does_not_write_over_its_input(file: Path, how: str) -> None:
    before = file.read_bytes()
    done = run("export", file, "-o", named_as(file, how))
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"is the input" in done.stderr
    assert file.read_bytes() == before


FORMATS = ["vmx-6.1-mmio-split.dat", "trace-cmd text", "perf.data", "parquet", "bpf", "summary"]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_recording_is_written_over_only_with_force(kind: str, tmp_path: Path) -> None:
    heads = {
        "trace-cmd text": b"cpus=1\n   qemu-123   [000]   1.000000: kvm_exit:   reason HLT rip 0x10 info 0 0\n",
        "perf.data": b"PERFILE2" + bytes(200),
        "parquet": b"PAR1" + bytes(200),
        "bpf": b"KVMTRACE-BPF-1\n\0" + bytes(200),
        "summary": b'{"schema":"kvmtrace.summary/1"}',
        "vmx-6.1-mmio-split.dat": RECORDING.read_bytes(),
    }
    target = tmp_path / "out"
    target.write_bytes(heads[kind])
    with pytest.raises(UsageError, match="is a recording; --force"):
        check_output(target)
    check_output(target, force=True)


@pytest.mark.parametrize("text", ["kvmtrace report: x\n  Events: 1\n", "", "{}", "<!DOCTYPE html>"])
def test_earlier_reports_are_written_over(text: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text(text)
    check_output(target, [RECORDING])


def test_force_writes_over_another_recording(file: Path) -> None:
    assert run("report", RECORDING, "--no-model", "-o", file).returncode == 2
    assert run("report", RECORDING, "--no-model", "--force", "-o", file).returncode == 0
    assert file.read_bytes().startswith(b"kvmtrace report")


@pytest.mark.parametrize(
    ("command", "output", "why"),
    [
        ("report", "/no-such-folder/x", "No such directory"),
        ("report", "/dev/full", "No space left on device"),
        ("export", "/no-such-folder/x.csv", "No such directory"),
        ("compare", "/no-such-folder/x", "No such directory"),
    ],
)
def test_output_that_cannot_be_written_is_exit_code_4_and_names_the_users_path(
    command: str, output: str, why: str
) -> None:
    inputs = [RECORDING, OTHER] if command == "compare" else [RECORDING]
    done = run(command, *inputs, "-o", output)
    assert done.returncode == 4
    told = done.stderr.decode()
    assert told.startswith(f"kvmtrace: {output}")
    assert why in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ("fleet", "summarize", RECORDING, "-o"),
        ("lab", "run", "--isa", "svm", "-o"),
        ("suite", "--keep"),
        ("watch", "-a", "--on", "slower-than 1ms", "-o"),
    ],
)
def test_no_folders_are_made_above_that_of_the_outputs(command: tuple[str, ...], tmp_path: Path) -> None:
    """A mistyped path once became a tree of folders; a recorder that runs as root would make it anywhere."""
    done = run(*command, tmp_path / "a" / "b", *(() if "-a" in command or "fleet" in command else ("--", "true")))
    assert (done.returncode, done.stdout) == (4, b"")
    told = done.stderr.decode()
    assert "no such directory; make it, or choose another place" in told
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [("report", RECORDING, "--no-model"), ("check", RECORDING), ("model",)])
def test_full_standard_output_is_exit_code_4(args: tuple[object, ...]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = run(*args, stdout=full)
    assert (done.returncode, done.stderr.count(b"\n")) == (4, 1)
    assert b"No space left on device" in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ("report", RECORDING, "-o", "FOLDER"),
        ("check", RECORDING, "-o", "FOLDER"),
        ("check", RECORDING, "-o", ""),
        ("report", RECORDING, "-o", ""),
        ("compare", RECORDING, OTHER, "-o", ""),
        ("fleet", "summarize", RECORDING, "-o", "FILE"),
        ("fleet", "summarize", RECORDING, "-o", ""),
        ("exporter", "--textfile", "FILE"),
        ("exporter", "--textfile", "FOLDER/metrics.txt"),
    ],
)
def test_what_is_no_place_for_the_output_is_wrong_usage(command: tuple[object, ...], file: Path) -> None:
    before = file.read_bytes()
    words = {"FILE": str(file), "FOLDER": str(file.parent), "FOLDER/metrics.txt": str(file.parent / "metrics.txt")}
    done = run(*(words.get(str(one), one) for one in command))
    assert done.returncode == 2, done.stderr
    assert done.stdout == b""
    assert file.read_bytes() == before


@pytest.mark.parametrize("command", ["report", "compare"])
def test_fleet_writes_over_no_recording(command: str, tmp_path: Path) -> None:
    from kvmtrace.cli.fleet import command as fleet

    recording = tmp_path / "run.dat"
    shutil.copy(RECORDING, recording)
    before = recording.read_bytes()
    sides = ["--base", "true", "--new", "true"] if command == "compare" else []
    done = CliRunner().invoke(fleet, [command, str(tmp_path), *sides, "-o", str(recording)])
    assert "is a recording; --force writes over it" in str(done.exception)
    assert recording.read_bytes() == before


@pytest.mark.parametrize("more", [(), ("--summary",)])
def test_record_writes_over_no_recording(more: tuple[str, ...], tmp_path: Path) -> None:
    from kvmtrace.cli.record import command as record

    recording = tmp_path / "run.dat"
    shutil.copy(RECORDING, recording)
    before = recording.read_bytes()
    done = CliRunner().invoke(record, ["-o", str(recording), *more, "--", "true"])
    assert "is a recording; --force writes over it" in str(done.exception)
    assert recording.read_bytes() == before


def test_progress_tells_how_much_of_the_file_is_read(
    capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path
) -> None:
    import kvmtrace.cli.progress as shown

    monkeypatch.setattr(shown, "FIRST_S", 0.0)
    monkeypatch.setattr(shown, "EVERY_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with shown.opened(str(FIXTURES / "svm-6.12-linux-2vcpu.dat")) as (recording, progress):
        n_events = 0
        for table in recording.iter_events(20_000):
            n_events += len(table)
            progress(n_events)
        assert recording.read_share == 1
    told = capsys.readouterr().err
    assert re.search(r"\[#+\.+\] [\d.]+ of [\d.]+ kB, [\d,]+ events", told)
    assert f"[{'#' * 24}]" in told
    assert told.endswith("\r\x1b[K")
