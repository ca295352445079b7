"""Names and processes of the recorded threads, gathered while they live."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.capture import pid_namespace
from kvmtrace.capture.running_vms import Vms

if TYPE_CHECKING:
    from collections.abc import Sequence

LOOK_EVERY_S = 0.5


class Threads:
    """tid -> (pid, comm) of a process's threads, or of all threads of the machine.

    Parameters
    ----------
    pid : int or None, the process; None for the whole machine
    tracefs : Path or None, to tell threads that begin from now on from the kernel's memory of older ones
    argv : the command that the process will become, or ()

    Attributes
    ----------
    known : tid -> (pid, comm)
    vms : Vms, who the VMs among them are
    """

    def __init__(self, pid: int | None, tracefs: Path | None = None, argv: Sequence[str] = ()) -> None:
        self.pid = pid
        self.vms = Vms(pid, argv)
        self.known: dict[int, tuple[int, str]] = {}
        self._next = 0.0
        self._ids_are_ours = pid_namespace.is_initial()  # else /proc's ids are not those of the events
        before = _pairs(_read(tracefs / "saved_cmdlines")) if tracefs else []
        self._before = {tid for tid, _ in before} if tracefs else None
        self._others: set[int] = set()  # not the target's, but switched to and from

    def look(self, *, force: bool = False) -> None:
        """Note the threads that exist now; does nothing if that was done a moment ago, unless forced."""
        now = time.monotonic()
        if not self._ids_are_ours or (now < self._next and not force):
            return
        self._next = now + LOOK_EVERY_S
        self.vms.look(force=force)
        pids = [str(self.pid)] if self.pid is not None else _names(Path("/proc"))
        for pid in pids:
            for tid in _names(Path("/proc", pid, "task")):
                comm = _read(Path("/proc", pid, "task", tid, "comm"))
                if comm:
                    self.known[int(tid)] = int(pid), comm

    def add_saved(self, tracefs: Path) -> None:
        """Add what the kernel noted of threads that have ended since, and of those that still live."""
        pids = dict(_pairs(_read(tracefs / "saved_tgids")))
        for tid, comm in _pairs(_read(tracefs / "saved_cmdlines")):
            if tid in self.known or comm == "<...>":
                continue
            pid = int(pids[tid]) if pids.get(tid, "").isdigit() else -1
            began = self._before is not None and tid not in self._before
            if began or pid == self.pid:
                self.known[tid] = pid, comm
            elif not self._ids_are_ours or Path("/proc", str(tid)).exists():
                self.known[tid] = pid, comm
                self._others.add(tid)

    def comms(self) -> dict[int, str]:
        """Return tid -> thread name."""
        return {tid: comm for tid, (_, comm) in self.known.items()}

    def as_meta(self) -> dict[str, list[int | str]]:
        """Return the metadata's `threads`: tid -> [pid or -1, comm]; with a target its own and new ones."""
        left_out = self._others if self.pid is not None else set()
        return {str(tid): [pid, comm] for tid, (pid, comm) in sorted(self.known.items()) if tid not in left_out}


def _names(path: Path) -> list[str]:
    """Name the numeric entries of a directory; [] if it is gone."""
    try:
        return [entry.name for entry in path.iterdir() if entry.name.isdigit()]
    except OSError:
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="surrogateescape").rstrip("\n")
    except OSError:
        return ""


def _pairs(text: str) -> list[tuple[int, str]]:
    """Return the (number, rest) of each line "number rest"."""
    rows = [line.partition(" ") for line in text.splitlines()]
    return [(int(number), rest) for number, _, rest in rows if number.isdigit()]
