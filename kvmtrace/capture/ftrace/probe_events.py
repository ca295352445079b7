"""Probe events in a group of our own in tracefs; other people's probes are never touched."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from kvmtrace.capture.run_fields import probes_here
from kvmtrace.capture.tracefs import may
from kvmtrace.isa.probes import PROBES

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from kvmtrace.isa.probes import Probe

GROUP_PREFIX = "kvmtrace_"
# kretprobe instances: one per thread that is inside the function; KVM_RUN stays inside for long
MAX_ACTIVE = 1024
ARGUMENT_REGISTERS = {"$arg1": "%di", "$arg2": "%si", "$arg3": "%dx"}  # before Linux 4.20


class Probes:
    """kprobe, kretprobe and uprobe events in a group of our own.

    Parameters
    ----------
    tracefs : Path
    group : str, unique group name
    """

    def __init__(self, tracefs: Path, group: str) -> None:
        self.control = tracefs / "kprobe_events"
        self.user_control = tracefs / "uprobe_events"
        self.group = group
        self.events: list[str] = []

    def available(self) -> bool:
        """Say whether the kernel has kprobe events and lets us use them."""
        return may(self.control, os.W_OK)

    def add(self, names: Iterable[str]) -> list[str]:
        """Add the events of PROBES whose function this kernel has; return the names of those added."""
        if self.available():
            here = probes_here()
            self.events = [name for name in names if self._add(name, dict.fromkeys((here[name], PROBES[name])))]
        return self.events

    def _add(self, name: str, variants: Iterable[Probe]) -> bool:
        """Add an event in the first variant that the kernel takes."""
        for function, is_return, arguments in variants:
            kind = f"r{MAX_ACTIVE}" if is_return else "p"
            text = " ".join(arguments)
            old = text
            for argument, register in ARGUMENT_REGISTERS.items():
                old = old.replace(argument, register)
            if any(self._write(f"{kind}:{self.group}/{name} {function} {fields}") for fields in (text, old)):
                return True
        return False

    def add_user(self, name: str, place: str, fields: Iterable[str], *, is_return: bool) -> bool:
        """Add a uprobe event at `place` ("/path/of/binary:0xoffset"); say whether the kernel took it."""
        if not may(self.user_control, os.W_OK):
            return False
        line = f"{'r' if is_return else 'p'}:{self.group}/{name} {place} {' '.join(fields)}"
        return self._write(line.rstrip(), self.user_control)

    def _write(self, line: str, control: Path | None = None) -> bool:
        try:
            fd = os.open(control or self.control, os.O_WRONLY | os.O_APPEND)  # truncating removes everybody's probes
        except OSError:
            return False
        try:
            os.write(fd, line.encode() + b"\n")
        except OSError:  # no such function, or locked down
            return False
        finally:
            os.close(fd)
        return True

    def remove(self) -> None:
        """Remove every probe of the group, whoever added it."""
        for control in (self.control, self.user_control):
            try:
                lines = control.read_text().splitlines()
            except OSError:
                continue
            for line in lines:
                event = line.split(" ", 1)[0].partition(":")[2]
                if event.startswith(f"{self.group}/"):
                    self._write(f"-:{event}", control)

    @staticmethod
    def groups(tracefs: Path) -> list[str]:
        """Name all probe groups of ours that exist, whoever made them."""
        lines: list[str] = []
        for name in ("kprobe_events", "uprobe_events"):
            with contextlib.suppress(OSError):
                lines += (tracefs / name).read_text().splitlines()
        found = {line.split(" ", 1)[0].partition(":")[2].partition("/")[0] for line in lines}
        return sorted(group for group in found if group.startswith(GROUP_PREFIX))

    def missed(self) -> int:
        """Return how many hits of our probes the kernel could not record (kretprobe instances used up)."""
        try:
            lines = (self.control.parent / "kprobe_profile").read_text().splitlines()
        except OSError:
            return 0
        rows = [line.split() for line in lines]  # name (without its group), hits, misses
        return sum(int(row[2]) for row in rows if len(row) == 3 and row[0] in self.events)
