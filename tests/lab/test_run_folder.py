"""Runs that were killed leave nothing behind the next one; what a host made before it failed comes back."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from kvmtrace.cli import lab as lab_command
from kvmtrace.lab import lab_run
from kvmtrace.lab.emulator import LabFailedError, Outcome
from kvmtrace.lab.job import Job
from kvmtrace.lab.lab_run import run_lab
from kvmtrace.lab.run_folder import LOCK, run_folder

RUN = """
import sys, time
from pathlib import Path
from kvmtrace.lab.emulator import Emulator, Limits, run_emulator
from kvmtrace.lab.run_folder import run_folder
with run_folder("svm") as folder:
    paths = [folder / name for name in ("console", "stdout", "stderr", "results", "log")]
    command = ["sh", "-c", "echo on; exec sleep 600"]
    print(folder, flush=True)
    run_emulator(Emulator("QEMU", command, folder, *paths), Limits(600, 600), lambda *_: None, str)
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMTRACE_LAB_CACHE", str(tmp_path / "cache"))


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def working_in(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                found += [int(process.name)] if (process / "cwd").readlink() == folder else []
            except OSError:
                continue
    return found


def test_a_killed_run_leaves_no_emulator_and_its_folder_goes_with_the_next() -> None:
    with subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True) as lab:
        assert lab.stdout is not None
        folder = Path(lab.stdout.readline().strip())
        wait_for(lambda: (folder / "log").exists() and (folder / "log").read_text())
        lab.send_signal(signal.SIGKILL)
    wait_for(lambda: not working_in(folder))
    assert folder.is_dir()
    with run_folder("svm") as mine:
        assert not folder.exists()
    assert not mine.exists()


CALLS = ("mkdir", "flock", "unlink", "unlinkat", "rmdir", "clone", "vfork", "clone3", "write", "openat")
SMALL = ("mkdir", "flock", "vfork", "rmdir")
RUN_TO_THE_END = RUN.replace("exec sleep 600", "echo 'kvmtrace-lab: exit 0' >console")


def kill_lab_at(call: str, number: int, folder: Path) -> bool:
    """Run a lab that is killed when it makes a system call for the n-th time; say whether it got as far."""
    inject = ["strace", "-f", "-o", "/dev/null", "-e", f"inject={call}:signal=KILL:when={number}"]
    done = subprocess.run(
        [*inject, sys.executable, "-c", RUN_TO_THE_END], capture_output=True, cwd=folder, timeout=300, check=False
    )
    # or its emulator was killed, which is told
    assert done.returncode in (0, -signal.SIGKILL) or b"LabFailedError" in done.stderr, done.stderr.decode()
    return done.returncode != 0


def nothing_is_left(cache: Path) -> None:
    """The next command removes what a killed one left, and ends what still works there."""
    with run_folder("svm") as mine:
        assert [path.name for path in (cache / "runs").iterdir()] == [mine.name]
    assert list((cache / "runs").iterdir()) == []


def test_killed_at_some_system_calls(tmp_path: Path) -> None:
    for call in SMALL:
        for number in (1, 2):
            kill_lab_at(call, number, tmp_path)
            nothing_is_left(tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_killed_at_each_system_call(call: str, tmp_path: Path) -> None:
    killed = 0
    for number in range(1, 60):
        if not kill_lab_at(call, number, tmp_path):
            break
        killed += 1
        nothing_is_left(tmp_path / "cache")
    print(f"{call}: {killed} kills")


def test_an_emulator_that_outlived_its_run_is_ended(tmp_path: Path) -> None:
    runs = tmp_path / "cache" / "runs"
    folder = runs / "svm-dead"
    folder.mkdir(parents=True)
    (folder / LOCK).touch()
    left = subprocess.Popen(["sleep", "600"], cwd=folder)
    with run_folder("svm"):
        assert left.wait(timeout=120) == -signal.SIGKILL
    assert not folder.exists()


def test_runs_in_use_and_young_ones_without_a_lock_stay(tmp_path: Path) -> None:
    other = tmp_path / "cache" / "runs" / "svm-of-an-older-version"
    other.mkdir(parents=True)
    (other / "log").touch()
    with run_folder("svm") as first, run_folder("vmx") as second:
        assert first.is_dir()
        assert second.is_dir()
    assert (other / "log").exists()
    os.utime(other, (1, 1))
    with run_folder("svm"):
        assert not other.exists()


@pytest.fixture
def fake_host(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for the emulated host: `outcomes` says how each run ends, `files` what it brings out before."""
    host = SimpleNamespace(outcomes=[], files={}, runs=0)

    def run(emulator: Any, *_: Any) -> Outcome:
        host.runs += 1
        for name, text in host.files.items():
            path = emulator.folder / "job" / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        outcome = host.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return Outcome(outcome, 1.0, 2.0)

    def prepare(job: Job, kernel: Any, folder: Path) -> Any:
        return SimpleNamespace(folder=folder, results=folder / "none.tar")

    monkeypatch.setattr(lab_run, "run_emulator", run)
    monkeypatch.setattr(lab_run, "get_kernel", lambda series: SimpleNamespace(release="6.1"))
    monkeypatch.setattr(lab_run, "link_linux_guest", lambda *_: None)
    monkeypatch.setattr(lab_run.svm_host, "prepare", prepare)
    return host


def test_what_was_complete_before_a_panic_comes_back(fake_host: SimpleNamespace, tmp_path: Path) -> None:
    fake_host.outcomes = [LabFailedError("its kernel panicked", "  | last words")]
    fake_host.files = {"one.dat": "1", "sub/two.dat": "2"}
    with pytest.raises(LabFailedError, match="2 files that were complete are in") as error:
        run_lab(Job("svm", ("true",), out=tmp_path / "out"))
    assert "last words" in str(error.value)
    assert (tmp_path / "out" / "sub" / "two.dat").read_text() == "2"


def test_retries(fake_host: SimpleNamespace) -> None:
    job = Job("svm", ("true",), retries=2)
    fake_host.outcomes = [LabFailedError("hung", ""), LabFailedError("hung", ""), 3]
    assert run_lab(job).status == 3
    fake_host.outcomes = [LabFailedError("hung", "")] * 3
    with pytest.raises(LabFailedError):
        run_lab(job)
    fake_host.outcomes = [LabFailedError("hung", "")]
    with pytest.raises(LabFailedError):
        run_lab(replace(job, retries=0))
    assert fake_host.runs == 7


def test_deletions_do_not_come_back_as_devices(tmp_path: Path) -> None:
    archive = tmp_path / "out.tar"
    with tarfile.open(archive, "w") as tar:
        gone = tarfile.TarInfo("./deleted.txt")
        gone.type = tarfile.CHRTYPE
        tar.addfile(gone)
        kept = tarfile.TarInfo("./kept.txt")
        kept.size = 4
        tar.addfile(kept, io.BytesIO(b"text"))
    assert lab_run._bring_back(archive, tmp_path / "out") == ("kept.txt",)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept.txt"]


def test_the_options_are_documented() -> None:
    text = CliRunner().invoke(lab_command.command, ["run", "--help"]).output
    assert "--retries" in text
    assert "preempt=full" in text
