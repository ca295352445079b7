"""The recorder, killed at each of its system calls, leaves nothing that the next command does not put in order.

strace kills it when it enters the N-th call of a kind. In the suite: the first and last of the kinds after which
something else is left; with `make test-lab`: all of them.
"""

from __future__ import annotations

import collections
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmtrace.capture import recorders
from kvmtrace.capture.tracefs import MOUNT_POINT
from kvmtrace.formats import open_recording

pytestmark = pytest.mark.kvm

# fmt: off
CALLS = (
    "mkdir", "mkdirat", "flock", "link", "linkat", "rename", "renameat", "unlink", "unlinkat", "rmdir", "fchmod",
    "fallocate", "ftruncate", "splice", "pwrite64", "copy_file_range", "write", "bpf", "perf_event_open", "clone",
)
# fmt: on
COMMANDS = {
    "ftrace": ["--backend", "ftrace", "--guest", "lifecycle"],
    "bpf": ["--backend", "bpf", "--guest", "lifecycle"],
    "summary": ["--summary", "--guest", "lifecycle"],
}
SMALL = {"ftrace": ("linkat", "renameat", "rmdir"), "bpf": ("renameat",)}  # what is left changes at these
TRIALS_OF_A_KIND = 400


def record(folder: Path, how: str, *strace: str) -> int:
    command = [sys.executable, "-m", "kvmtrace", "record", "--force", "-o", "x.dat", *COMMANDS[how]]
    done = subprocess.run(
        ["strace", *strace, *command], cwd=folder, stderr=subprocess.DEVNULL, timeout=120, check=False
    )
    return done.returncode


def calls_of(folder: Path, how: str) -> dict[str, int]:
    """Return how often the recorder makes each call."""
    assert record(folder, how, "-o", "calls.txt", "-e", f"trace={','.join(CALLS)}") == 0
    lines = (folder / "calls.txt").read_text().splitlines()
    (folder / "calls.txt").unlink()
    (folder / "x.dat").unlink()
    return dict(collections.Counter(found[1] for line in lines if (found := re.match(r"(\w+)\(", line))))


def left_over() -> list[str]:
    """Name what recorders that are gone left in the kernel and in /run; others may be recording."""
    names = []
    for path in [*(MOUNT_POINT / "instances").glob("kvmtrace-*"), *recorders.RUN_DIR.glob("*")]:
        pid = path.name.removeprefix("kvmtrace-").partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            names.append(str(path))
    return names


def kill_and_look(folder: Path, how: str, call: str, number: int) -> bool:
    """Kill the recorder at a call; say whether a recording came of it. Nothing else may be left."""
    record(folder, how, "-o", "/dev/null", "-e", f"inject={call}:signal=KILL:when={number}")
    look = [sys.executable, "-m", "kvmtrace", "doctor", "--format", "json"]
    done = subprocess.run(look, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (how, call, number, done.stderr)
    assert "cannot" not in done.stderr, (how, call, number, done.stderr)
    # without an entry, what was left beside the file is found by who asks for the file
    subprocess.run([*look[:3], "check", "x.dat"], cwd=folder, capture_output=True, timeout=120, check=False)
    assert left_over() == [], (how, call, number)
    assert [path.name for path in folder.iterdir() if path.name != "x.dat"] == [], (how, call, number)
    there = (folder / "x.dat").exists()
    if there and how != "summary":
        open_recording(folder / "x.dat").events()
    (folder / "x.dat").unlink(missing_ok=True)
    return there


@pytest.mark.parametrize(("how", "calls"), SMALL.items())
def test_first_and_last_of_some_calls(how: str, calls: tuple[str, ...], tmp_path: Path) -> None:
    counts = calls_of(tmp_path, how)
    for call in calls:
        for number in sorted({1, counts[call]}):
            kill_and_look(tmp_path, how, call, number)


@pytest.mark.slow
@pytest.mark.parametrize("how", COMMANDS)
def test_each_call(how: str, tmp_path: Path) -> None:
    trials = kept = 0
    for call, count in calls_of(tmp_path, how).items():
        for number in range(1, min(count, TRIALS_OF_A_KIND) + 1):
            kept += kill_and_look(tmp_path, how, call, number)
            trials += 1
    print(f"{how}: {trials} kills, {kept} left a recording")
    assert trials > 50
    assert kept > 0
