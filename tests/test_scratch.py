"""What a killed process left in the temporary folder goes with the next command; nobody else's does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from kvmtrace import scratch
from kvmtrace.scratch import ScratchFolder, remove_dead, scratch_file

FIXTURE = Path(__file__).parents[1] / "fixtures" / "svm-6.1-lifecycle.dat"
HOLD = """
import sys
from kvmtrace.scratch import ScratchFolder
folder = ScratchFolder("t")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own, for this process and those it starts."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def holder() -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    Path(process.stdout.readline().strip(), "full").mkdir(parents=True)
    return process


def ended(process: subprocess.Popen[str], number: int) -> None:
    process.send_signal(number)
    process.communicate()


def test_it_goes_with_the_process(place: Path) -> None:
    with ScratchFolder("a") as folder:
        (folder / "x").write_text("x")
        assert [path.name.partition(".")[0] for path in place.iterdir()] == ["kvmtrace-a"]
        assert folder.stat().st_mode & 0o777 == 0o700
    assert list(place.iterdir()) == []


def test_the_next_command_removes_what_a_killed_process_left(place: Path) -> None:
    dead, living = holder(), holder()
    ended(dead, signal.SIGKILL)
    assert len(list(place.iterdir())) == 2
    subprocess.run([sys.executable, "-m", "kvmtrace", "check", str(FIXTURE)], capture_output=True, check=True)
    (left,) = place.iterdir()
    assert (left / "full").is_dir()
    ended(living, signal.SIGTERM)
    remove_dead()
    assert list(place.iterdir()) == []


def test_nothing_of_others_is_touched(place: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    (place / "kvmtrace-cells.link").symlink_to(elsewhere)
    (place / "kvmtrace-file.link").symlink_to(elsewhere / "data")
    for name in ("kvmtrace-mine", "kvmtrace-cells.a.b", "other.ab", "kvmtrace-cells.ok-not"):
        (place / name).mkdir()
    (place / "kvmtrace-cells.file").write_text("no folder")
    (place / "kvmtrace-findings-ab").mkdir()
    dead = place / "kvmtrace-cells.dead"
    dead.mkdir()
    (dead / "link").symlink_to(elsewhere)
    before = {path.name for path in place.iterdir()}
    remove_dead()
    assert {path.name for path in place.iterdir()} == before - {"kvmtrace-cells.dead"}
    assert (elsewhere / "data").is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's folder")
def test_another_users_stay(place: Path) -> None:
    theirs = place / "kvmtrace-cells.theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    remove_dead()
    assert theirs.is_dir()


def test_a_folder_taken_for_a_dead_ones_is_made_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock_new, taken = scratch._lock_new, []

    def late(path: str) -> int | None:
        if not taken:
            taken.append(path)
            remove_dead()
        return lock_new(path)

    monkeypatch.setattr(scratch, "_lock_new", late)
    with ScratchFolder("a") as folder:
        assert not Path(taken[0]).exists()
        assert list(place.iterdir()) == [folder]


def test_files_have_no_name(place: Path) -> None:
    with scratch_file() as file:
        file.write(b"x")
        assert list(place.iterdir()) == []
    old, new = place / "kvmtrace-file.old", place / "kvmtrace-file.new"  # as where every file has a name at first
    for path in (old, new):
        path.write_bytes(b"")
    os.utime(old, (time.time() - 3600,) * 2)
    remove_dead()
    assert list(place.iterdir()) == [new]


def test_no_temporary_folder_stops_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    remove_dead()


def test_nothing_else_makes_named_temporary_folders() -> None:
    """Whatever does goes through scratch.py, or stands in a folder that its own command cleans up."""
    inside = {"scratch.py", "magic.py", "run_folder.py", "cache.py", "image.py", "compiling.py", "arm64_packages.py"}
    inside.add("build_hook.py")  # runs where the package is built, and is no part of what runs later
    package = Path(scratch.__file__).parent
    named = re.compile(r"tempfile\.(mk|TemporaryDirectory|Named|Spooled)")
    found = {path.name for path in package.rglob("*.py") if named.search(path.read_text())}
    assert found <= inside
