"""Record one run of a bundled guest with both back ends at once: OUT/ftrace.dat and OUT/bpf.dat.

python record_twice.py OUT GUEST [ARGUMENT...]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

WAIT_S = 600  # to compile eBPF programs for the first time takes minutes on a machine that is very busy
# an emulated host's Python does not have kvmtrace installed
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}


def start_guest(guest: str, arguments: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """Start a guest that waits; return it and the descriptor that lets it go."""
    ready_read, ready_write = os.pipe()
    go_read, go_write = os.pipe()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "kvmtrace.workload",
            guest,
            *arguments,
            "--ready-fd",
            str(ready_write),
            "--go-fd",
            str(go_read),
        ],
        pass_fds=(ready_write, go_read),
        stdout=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )
    os.close(ready_write)
    assert os.read(ready_read, 1)
    os.close(ready_read)
    return process, go_write


def kvmtrace() -> list[str]:
    """Return how kvmtrace is started: an emulated host has the command, but not its libraries for this Python."""
    return [sys.executable, "-m", "kvmtrace"] if find_spec("click") else ["kvmtrace"]


def start_recorder(backend: str, pid: int, output: Path, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*kvmtrace(), "record", "--backend", backend, "-p", str(pid), "-o", str(output), *options], env=ENVIRONMENT
    )


def bpf_runs(output: Path) -> bool:
    """Say whether the recorder has written its header: all programs are attached then."""
    return any(path.stat().st_size for path in output.parent.glob(f".{output.name}.kvmtrace-*/out"))


def ftrace_runs(pid: int) -> bool:
    """Say whether the recorder records: a trace instance that was just made says so, too, but has no events yet."""
    try:
        return any(
            (path / "set_event").read_text() and (path / "tracing_on").read_text().strip() == "1"
            for path in Path("/sys/kernel/tracing/instances").glob(f"kvmtrace-{pid}-*")
        )
    except FileNotFoundError:  # it is just being made
        return False


def wait_until(condition: Callable[[], object], *running: subprocess.Popen[Any]) -> None:
    """Wait for a condition, not longer than the processes live that are to bring it about."""
    end = time.monotonic() + WAIT_S
    while not condition():
        ended = [process for process in running if process.poll() is not None]
        if ended and not condition():
            raise AssertionError(f"{ended[0].args} ended with {ended[0].returncode}")
        assert time.monotonic() < end, f"not within {WAIT_S} s"
        time.sleep(0.05)


def record_twice(folder: Path, guest: str, arguments: list[str]) -> None:
    process, go = start_guest(guest, arguments)
    ftrace = start_recorder("ftrace", process.pid, folder / "ftrace.dat")
    bpf = start_recorder("bpf", process.pid, folder / "bpf.dat")
    wait_until(lambda: bpf_runs(folder / "bpf.dat") and ftrace_runs(ftrace.pid), bpf, ftrace)
    time.sleep(0.1)
    os.write(go, b"G")
    os.close(go)
    assert process.wait(WAIT_S) == 0
    assert ftrace.wait(WAIT_S) == 0
    assert bpf.wait(WAIT_S) == 0


if __name__ == "__main__":
    record_twice(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
