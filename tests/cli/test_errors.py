"""Exit code 1 is for verdicts alone: whatever goes wrong ends in one line with a documented code."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import click
import pytest

from kvmtrace import errors
from kvmtrace.cli import main as boundary
from kvmtrace.cli.error_line import explain
from kvmtrace.errors import CapabilityError, FormatError, KvmtraceError

if TYPE_CHECKING:
    from pathlib import Path


def run(monkeypatch: pytest.MonkeyPatch, error: BaseException, *args: str) -> int:
    @click.command()
    @click.option("--debug", is_flag=True)
    def fails(debug: bool) -> None:
        raise error

    monkeypatch.setattr(boundary, "cli", fails)
    with pytest.raises(SystemExit) as end:
        boundary.main(args)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(
    "error", [OverflowError("65536 does not fit"), RecursionError("deep\nvery"), AssertionError(), KeyError("x")]
)
def test_the_unforeseen_is_one_line_and_code_70(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KVMTRACE_DEBUG", raising=False)
    assert run(monkeypatch, error) == 70
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert type(error).__name__ in said
    assert "please report it" in said


def test_debug_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OverflowError):
        run_raising(monkeypatch, OverflowError("x"))


def run_raising(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(**_: Any) -> None:
        raise error

    monkeypatch.setattr(boundary.cli, "main", fails)
    boundary.main(["--debug"])


@pytest.mark.parametrize(
    ("number", "code", "remedy"),
    [
        (errno.EMFILE, 4, "ulimit -n"),
        (errno.ENFILE, 4, "fs.file-max"),
        (errno.ENOMEM, 4, "memory"),
        (errno.ENOSPC, 4, "make room"),
        (errno.EROFS, 4, "another place"),
        (errno.EACCES, 4, ""),
        (errno.ENOENT, 3, ""),
        (errno.EIO, 3, ""),
    ],
)
def test_errors_of_the_system_name_what_failed_and_what_to_do(number: int, code: int, remedy: str) -> None:
    text, exit_code = boundary.explain(OSError(number, os.strerror(number), "some/file"))
    assert exit_code == code
    assert text.startswith(f"some/file: {os.strerror(number)}")
    assert remedy in text


def test_no_class_of_ours_ends_with_1() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, KvmtraceError)]
    assert len(classes) > 5
    assert {kind.exit_code for kind in classes} == {2, 3, 4, 5, 70}
    assert boundary.explain(MemoryError())[1] == CapabilityError.exit_code
    assert boundary.explain(FormatError("x", 1, "a", "b"))[1] == 3


def kvmtrace(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kvmtrace", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
        **more,
    )


def test_standard_output_that_takes_nothing() -> None:
    with open("/dev/full", "w") as full:
        done = kvmtrace("--help", stdout=full)
    assert done.returncode == 4
    assert done.stderr.startswith("kvmtrace: standard output: No space left on device")
    assert done.stderr.count("\n") == 1


@pytest.mark.kvm
@pytest.mark.parametrize("backend", ["ftrace", "bpf"])
def test_few_open_files_allowed(backend: str, tmp_path: Path) -> None:
    command = f"record --backend {backend} -o {tmp_path}/x.dat -- true"
    for limit in (8, 12, 16, 20, 24, 28, 40):
        done = subprocess.run(
            ["sh", "-c", f"ulimit -n {limit}; exec {sys.executable} -m kvmtrace {command}"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        (tmp_path / "x.dat").unlink(missing_ok=True)
        assert done.returncode in (0, 4), done.stderr
        assert done.returncode == 0 or "ulimit -n" in done.stderr.splitlines()[-1]
        assert list(tmp_path.iterdir()) == []
        assert kvmtrace("doctor", stdout=subprocess.DEVNULL).stderr == ""  # it found nothing to remove


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("recrod", "record"),
        ("chekc", "check"),
        ("docter", "doctor"),
        ("exprot", "export"),
        ("explain", "'report FILE --explain N'"),
        ("diff", "compare"),
    ],
)
def test_did_you_mean(typed: str, meant: str) -> None:
    done = kvmtrace(typed)
    assert done.returncode == 2
    assert f"Did you mean {meant}" in done.stderr


def test_exit_codes_stand_in_the_help() -> None:
    done = subprocess.run([sys.executable, "-m", "kvmtrace", "--help"], capture_output=True, text=True, check=True)
    for code in ("0", "1", "2", "3", "4", "5", "70"):
        assert f"\n    {code:2}  " in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [("top", "-i", "nan"), ("compare", "a", "b", "--min-effect", "nan"), ("lab", "run", "--timeout", "inf")],
)
def test_what_is_no_number_is_wrong_usage(arguments: tuple[str, ...]) -> None:
    done = kvmtrace(*arguments)
    assert done.returncode == 2
    assert "is no number" in done.stderr


def test_a_missing_package_is_the_environment() -> None:
    text, exit_code = explain(ModuleNotFoundError("No module named 'numpy'", name="numpy"))
    assert (text, exit_code) == ("the Python package numpy is not installed; pip install kvmtrace", 4)
    assert explain(ModuleNotFoundError("No module named 'kvmtrace.x'", name="kvmtrace.x"))[1] == 70


def test_an_object_store_that_refuses_is_the_environment() -> None:
    refusal = type("NoCredentialsError", (Exception,), {"__module__": "botocore.exceptions"})
    assert explain(refusal("Unable to locate credentials")) == (
        "the object store: Unable to locate credentials; docs/fleet.md",
        4,
    )
    assert explain(ValueError("x"))[1] == 70
