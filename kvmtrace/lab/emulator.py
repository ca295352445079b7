"""Runs an emulator, follows the lab host's console and output, and enforces the limits."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from dataclasses import field
from typing import TYPE_CHECKING

from kvmtrace.errors import CapabilityError
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import FrameType

MARK = b"kvmtrace-lab: "
POLL_S = 0.05
LAST_LINES = 15
# after the command has ended: bring files back, power off
SHUTDOWN_LIMIT_S = 120.0


@dataclass(frozen=True)
class Emulator:
    """How to start an emulator and where its guest writes.

    Parameters
    ----------
    name : str, for messages ("QEMU", "Bochs")
    command : argv
    folder : working directory
    console, stdout, stderr : files that grow while it runs
    results : tar archive of the files that the job made (zeros or missing if none)
    log : file for the emulator's own output
    """

    name: str
    command: list[str]
    folder: Path
    console: Path
    stdout: Path
    stderr: Path
    results: Path
    log: Path


@dataclass(frozen=True)
class Limits:
    """How long a lab may take to boot and to run the command, in seconds."""

    boot_s: float
    command_s: float


@dataclass
class Outcome:
    """What the console told: `status` is the command's exit code; times are seconds since the start."""

    status: int
    booted_s: float
    ended_s: float
    total_s: float = 0.0


class LabFailedError(CapabilityError):
    """The lab host did not get as far as it should; `console` holds the last lines it printed."""

    def __init__(self, problem: str, console: str) -> None:
        self.console = console
        where = f"; its console ended with:\n{console}" if console else "; its console is empty"
        super().__init__(problem + where)
        self.problem = problem

    def with_files(self, count: int, folder: Path | None) -> LabFailedError:
        """Return the error that also says what came back before it."""
        if not count:
            return self
        files = "1 file that was complete is" if count == 1 else f"{count} files that were complete are"
        return LabFailedError(f"{self.problem} ({files} in {folder})", self.console)


class Tail:
    """Reads what a file has gained since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> bytes:
        """Return the new bytes."""
        try:
            with self._path.open("rb") as handle:
                handle.seek(self._offset)
                data = handle.read()
        except FileNotFoundError:
            return b""
        self._offset += len(data)
        return data


@dataclass
class Console:
    """What the lab host's console said so far."""

    text: bytearray = field(default_factory=bytearray)
    started: bool = False
    ended: int | None = None
    finished: int | None = None
    problem: str | None = None
    _seen: int = 0

    def feed(self, data: bytes) -> None:
        """Take in new console output; complete lines are looked at."""
        self.text += data
        end = self.text.rfind(b"\n") + 1
        for line in bytes(self.text[self._seen : end]).splitlines():
            self._look(line)
        self._seen = max(self._seen, end)

    def _look(self, line: bytes) -> None:
        if b"Kernel panic - not syncing" in line:
            self.problem = "its kernel panicked: " + _printable(line).split("not syncing: ")[-1]
        if MARK not in line:
            return
        word, _, rest = _printable(line.split(MARK, 1)[1]).partition(" ")
        if word == "started":
            self.started = True
        elif word == "ended" and rest.isdigit():
            self.ended = int(rest)
        elif word == "exit" and rest.isdigit():
            self.finished = int(rest)
        elif word == "failed":
            self.problem = rest

    def last_lines(self) -> str:
        """Return the end of the console's text, safe to print."""
        lines = [_printable(line) for line in bytes(self.text).splitlines()]
        last = [line for line in lines if line.strip()][-LAST_LINES:]
        return "\n".join(f"  | {line[:200]}" for line in last)


def _printable(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip("\r")
    return "".join(c if c.isprintable() else "?" for c in text)


def run_emulator(
    emulator: Emulator, limits: Limits, write: Callable[[int, bytes], None], phase: Callable[[str], object]
) -> Outcome:
    """Run an emulator until its guest has powered off.

    Parameters
    ----------
    write : called with 1 or 2 (standard output, standard error) and new bytes of the command
    phase : called when the lab gets on: "booting", "running", "fetching"

    Raises
    ------
    LabFailedError
        A boot that hangs, a kernel panic, a limit that passed, an emulator that died. It is gone by then.
    """
    phase("booting")
    with emulator.log.open("wb") as log, _sigterm_raises(), _started(emulator, log) as process:
        follower = _Follower(emulator, limits, write, phase)
        while True:
            alive = process.poll() is None
            follower.look()
            if follower.console.finished is not None and not alive:
                return follower.outcome()
            if not alive:
                raise follower.failure(_why_dead(emulator, process.returncode))
            follower.check_limits()
            if follower.console.finished is not None and follower.lingering():
                return follower.outcome()
            time.sleep(POLL_S)


class _Follower:
    """The state of one run: output passed on so far, and how far the lab host got."""

    def __init__(
        self,
        emulator: Emulator,
        limits: Limits,
        write: Callable[[int, bytes], None],
        phase: Callable[[str], object],
    ) -> None:
        self.console = Console()
        self._emulator = emulator
        self._limits = limits
        self._write = write
        self._phase = phase
        self._tails = {1: Tail(emulator.stdout), 2: Tail(emulator.stderr)}
        self._console_tail = Tail(emulator.console)
        self._start = time.monotonic()
        self._times: dict[str, float] = {}

    def look(self) -> None:
        """Pass on new output and note progress."""
        self.console.feed(self._console_tail.read())
        for stream, tail in self._tails.items():
            data = tail.read()
            if data:
                self._write(stream, data)
        done = self.console.finished is not None
        ended = done or self.console.ended is not None  # a console may lose the line before
        if (ended or self.console.started) and self._note("running"):
            self._phase("running")
        if ended and self._note("ended"):
            self._phase("fetching")
        if done:
            self._note("finished")
        if self.console.problem is not None:
            raise self.failure(f"the lab host failed: {self.console.problem}")

    def check_limits(self) -> None:
        """Raise if a phase took too long."""
        now = self._elapsed()
        if "running" not in self._times:
            if now > self._limits.boot_s:
                raise self.failure(f"the lab host did not boot within {self._limits.boot_s:.0f} s")
        elif "ended" not in self._times:
            if now - self._times["running"] > self._limits.command_s:
                limit = self._limits.command_s
                raise self.failure(f"the command did not end within {limit:.0f} s (--timeout)")
        elif now - self._times["ended"] > SHUTDOWN_LIMIT_S:
            raise self.failure("the lab host did not power off")

    def lingering(self) -> bool:
        """Whether the job is complete but the emulator has not ended for some seconds."""
        return self._elapsed() - self._times["finished"] > 5.0

    def failure(self, problem: str) -> LabFailedError:
        """Return the error, with the console's last lines (or what the emulator itself said)."""
        said = self.console.last_lines()
        if not said:
            log = Console()
            log.feed(Tail(self._emulator.log).read() + b"\n")
            said = log.last_lines()
        return LabFailedError(problem, said)

    def outcome(self) -> Outcome:
        """Return the result of a complete run."""
        assert self.console.finished is not None
        return Outcome(self.console.finished, self._times["running"], self._times["ended"], self._elapsed())

    def _note(self, phase: str) -> bool:
        """Note the time of a phase; whether it is news."""
        if phase in self._times:
            return False
        self._times[phase] = self._elapsed()
        return True

    def _elapsed(self) -> float:
        return time.monotonic() - self._start


def _why_dead(emulator: Emulator, status: int) -> str:
    how = f"signal {-status}" if status < 0 else f"exit code {status}"
    return f"{emulator.name} ended before the lab host was done ({how})"


@contextlib.contextmanager
def _started(emulator: Emulator, log: object) -> Iterator[subprocess.Popen[bytes]]:
    """Start the emulator, killed with us whatever happens (setpriv: also when we are killed)."""
    # an own session: Ctrl-C at the terminal reaches us alone, and we end the emulator
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *emulator.command],
        cwd=emulator.folder,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,  # type: ignore[call-overload]
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that nothing is left behind (main thread only)."""

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the signature of handlers)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
