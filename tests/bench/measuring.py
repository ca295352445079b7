"""Commands that are measured in turn, and what came of them."""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from loads import ROOT

RESULTS = ROOT / "bench-results"
MIB = 1 << 20
ONE_CORE = ("taskset", "-c", "0")


@dataclass
class Command:
    """A command and how its runs went (s, s, bytes).

    Parameters
    ----------
    folder : the kvmtrace that Python shall load
    """

    argv: list[str]
    exits: tuple[int, ...] = (0,)
    folder: Path = ROOT
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def run(self, *, keep: bool = True) -> None:
        """Run once."""
        began = time.perf_counter()
        process = subprocess.Popen(
            self.argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self._environment(), cwd=self.folder
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in self.exits:
            raise SystemExit(f"{' '.join(self.argv)}: exit code {process.returncode}")
        if keep:
            self.wall.append(wall)
            self.cpu.append(usage.ru_utime + usage.ru_stime)
            self.memory.append(usage.ru_maxrss * 1024)

    def _environment(self) -> dict[str, str]:
        """Byte code is kept, as in any installation."""
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        cache = RESULTS / "pycache" / self.folder.name
        return environment | {"PYTHONPYCACHEPREFIX": str(cache), "PYTHONPATH": str(self.folder)}

    @property
    def seconds(self) -> float:
        """Elapsed time of the median run."""
        return statistics.median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        """CPU time of the median run."""
        return statistics.median(self.cpu)

    @property
    def peak(self) -> int:
        """The largest resident set of all runs, bytes."""
        return max(self.memory)

    @property
    def said(self) -> str:
        """Its times in words."""
        return f"{self.seconds:.2f} s (CPU {self.cpu_seconds:.2f} s, {self.peak / MIB:.0f} MiB)"

    def figures(self, name: str) -> dict[str, float]:
        """Return what is kept of it."""
        return {f"{name}_s": self.seconds, f"{name}_cpu_s": self.cpu_seconds, f"{name}_peak": self.peak}


@dataclass
class Result:
    """One line of the table.

    Parameters
    ----------
    goal : its number in what the project wants
    what : what was measured, in words
    measured, wanted : in words
    met : None where nothing was promised
    figures : name -> number, for those who compare runs
    """

    goal: str
    what: str
    measured: str
    wanted: str
    met: bool | None
    figures: dict[str, float] = field(default_factory=dict)


def alternate(rounds: int, *commands: Command) -> None:
    """Run all once for nothing, then in turn, so that a busy moment hits all alike."""
    for command in commands:
        command.run(keep=False)
    for _ in range(rounds):
        for command in commands:
            command.run()


def alternate_cold(rounds: int, path: Path, *commands: Command) -> None:
    """Run in turn, each time with nothing of a file in memory."""
    for _ in range(rounds):
        for command in commands:
            evict(path)
            command.run()


def evict(path: Path) -> None:
    """Let the kernel forget a file's pages."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def kvmtrace(*arguments: str | Path, one_core: bool = False, folder: Path = ROOT) -> Command:
    """Return a kvmtrace command; exit code 1 of `check` is a finding."""
    exits = (0, 1) if arguments[0] == "check" else (0,)
    prefix = [*(ONE_CORE if one_core else ()), sys.executable, "-m", "kvmtrace"]
    return Command([*prefix, *map(str, arguments)], exits, folder)


def python(text: str) -> Command:
    """Return a command that runs a text of Python."""
    return Command([sys.executable, "-c", text])


def at_least(goal: str, what: str, ratio: float, least: float, *commands: tuple[str, Command]) -> Result:
    """Return the result of a ratio that shall be large."""
    figures = {"ratio": ratio}
    for name, command in commands:
        figures |= command.figures(name)
    return Result(goal, what, f"{ratio:.2f} x", f">= {least:g} x", ratio >= least, figures)


def at_most(goal: str, what: str, ratio: float, most: float, *commands: tuple[str, Command]) -> Result:
    """Return the result of a ratio that shall be small."""
    found = at_least(goal, what, ratio, most, *commands)
    found.wanted, found.met = f"<= {most:g} x", ratio <= most
    return found


def other_commit(commit: str) -> Path:
    """Return a folder with another commit of kvmtrace, its loops compiled."""
    git = ["git", "-C", str(ROOT)]
    full = subprocess.run(
        [*git, "rev-parse", "--verify", f"{commit}^{{commit}}"], capture_output=True, text=True, check=False
    )
    if full.returncode:
        raise SystemExit(f"BASE={commit}: no such commit")
    folder = RESULTS / f"base-{full.stdout.strip()[:12]}"
    if folder.exists():
        return folder
    scratch = folder.with_suffix(".part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    packed = subprocess.run([*git, "archive", full.stdout.strip()], stdout=subprocess.PIPE, check=True)
    subprocess.run(["tar", "-x", "-C", str(scratch)], input=packed.stdout, check=True)
    if (scratch / "kvmtrace/_native/compiling.py").exists():
        subprocess.run([sys.executable, "kvmtrace/_native/compiling.py"], cwd=scratch, check=True)
    if (old := scratch / "kvmtrace/kernel").exists():  # in early commits
        flags = ["-std=c11", "-O3", "-fPIC", "-shared"]
        subprocess.run(["cc", *flags, "-o", str(old / "_kernel.so"), str(old / "kernel.c")], check=True)
    return scratch.rename(folder)


def machine() -> dict[str, str | int | None]:
    """Return what the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine())
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": model,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
    }
