"""Recorders and the exporter, killed at each of their system calls, leave nothing that the next command does not mend.

strace kills them when they enter the N-th call of a kind. In the suite: the first and last of the kinds after which
something else is left; with `make test-lab`: KVMTRACE_TRIALS of each kind, 400 if it is not set.
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvmtrace.capture import recorders
from kvmtrace.capture.tracefs import MOUNT_POINT
from kvmtrace.formats import open_recording
from tests.capture.bpf_held import forgotten_programs
from tests.capture.record_twice import wait_until

pytestmark = pytest.mark.kvm

# fmt: off
CALLS = (
    "mkdir", "mkdirat", "flock", "link", "linkat", "rename", "renameat", "unlink", "unlinkat", "rmdir", "fchmod",
    "fallocate", "ftruncate", "splice", "pwrite64", "copy_file_range", "write", "bpf", "perf_event_open", "clone",
)
# fmt: on
RECORD = ("record", "--force", "-o", "x.dat", "--guest", "lifecycle")
COMMANDS = {
    "ftrace": (*RECORD, "--backend", "ftrace"),
    "bpf": (*RECORD, "--backend", "bpf"),
    "summary": (*RECORD, "--summary"),
    "exporter": ("exporter", "--no-listen", "--textfile", "x.prom", "--interval", "1", "-d", "1"),
}
OUTPUTS = {"exporter": "x.prom"}
SMALL = {"ftrace": ("linkat", "renameat", "rmdir"), "bpf": ("renameat",)}  # what is left changes at these
TRIALS_OF_A_KIND = int(os.environ.get("KVMTRACE_TRIALS", "400"))
KVMTRACE = (sys.executable, "-m", "kvmtrace")


def kvmtrace(folder: Path, *arguments: str, strace: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with temporary files of its own."""
    (folder / "tmp").mkdir(exist_ok=True)
    command = [*(("strace", *strace) if strace else ()), *KVMTRACE, *arguments]
    environment = os.environ | {"TMPDIR": str(folder / "tmp")}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def calls_of(folder: Path, how: str) -> dict[str, int]:
    """Return how often the command makes each call."""
    options = ("-o", "calls.txt", "-e", f"trace={','.join(CALLS)}")
    assert kvmtrace(folder, *COMMANDS[how], strace=options).returncode == 0
    lines = (folder / "calls.txt").read_text().splitlines()
    (folder / "calls.txt").unlink()
    (folder / OUTPUTS.get(how, "x.dat")).unlink(missing_ok=True)  # an exporter that ends takes its textfile away
    return dict(collections.Counter(found[1] for line in lines if (found := re.match(r"(\w+)\(", line))))


def some_of(count: int) -> list[int]:
    """Return the numbers of the calls of a kind to kill at, the first and the last among them."""
    step = max((count - 1) / max(TRIALS_OF_A_KIND - 1, 1), 1)
    return sorted({1 + round(i * step) for i in range(min(count, TRIALS_OF_A_KIND))} & {*range(1, count + 1)} | {count})


def left_over() -> list[str]:
    """Name what recorders that are gone left in the kernel and in /run; others may be recording."""
    names = []
    for path in [*(MOUNT_POINT / "instances").glob("kvmtrace-*"), *recorders.RUN_DIR.glob("*")]:
        pid = path.name.removeprefix("kvmtrace-").partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            names.append(str(path))
    return names


def kill_and_look(folder: Path, how: str, call: str, number: int) -> bool:
    """Kill the command at a call; say whether an output came of it. Nothing else may be left."""
    where, output = (how, call, number), OUTPUTS.get(how, "x.dat")
    kvmtrace(folder, *COMMANDS[how], strace=("-o", "/dev/null", "-e", f"inject={call}:signal=KILL:when={number}"))
    there = (folder / output).exists()
    if how == "exporter":  # its next run is the next command
        assert kvmtrace(folder, *COMMANDS[how]).returncode == 0, where
    done = kvmtrace(folder, "doctor", "--format", "json")
    assert done.returncode == 0, (where, done.stderr)
    assert "cannot" not in done.stderr, (where, done.stderr)
    # without an entry, what was left beside the file is found by who asks for the file
    kvmtrace(folder, "check", output)
    assert left_over() == [], where
    wait_until(lambda: not forgotten_programs())  # the kernel frees them late
    assert [path.name for path in folder.iterdir() if path.name not in (output, "tmp")] == [], where
    assert list((folder / "tmp").iterdir()) == [], where
    there |= (folder / output).exists() and how != "exporter"
    if there and how in ("ftrace", "bpf"):
        open_recording(folder / output).events()
    (folder / output).unlink(missing_ok=True)
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
        for number in some_of(count):
            kept += kill_and_look(tmp_path, how, call, number)
            trials += 1
    print(f"{how}: {trials} kills, {kept} left an output; nothing else was left")
    assert trials > 10
    assert kept > 0


@pytest.mark.parametrize("count", [1, 2, 399, 400, 401, 5000])
def test_calls_are_spread_from_the_first_to_the_last(count: int) -> None:
    numbers = some_of(count)
    assert (numbers[0], numbers[-1]) == (1, count)
    assert len(numbers) == min(count, TRIALS_OF_A_KIND)
