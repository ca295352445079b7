"""A tracing instance of our own; nothing else in tracefs is written to but our probe group.

An instance is locked (flock on its `trace_clock`) as long as its recorder lives, in whatever pid namespace; that is
how a left-over one is told from one in use.
"""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING

from kvmtrace.capture.tracefs import no_access
from kvmtrace.errors import CapabilityError

if TYPE_CHECKING:
    from pathlib import Path

INSTANCE_PREFIX = "kvmtrace-"


class Instance:
    """An own tracing instance, locked while this object lives.

    Parameters
    ----------
    tracefs : Path
    name : str, unique; the directory below `instances`
    """

    def __init__(self, tracefs: Path, name: str) -> None:
        self.tracefs = tracefs
        self.path = tracefs / "instances" / name
        self._lock = -1

    def create(self) -> None:
        """Make and lock the instance, not tracing yet.

        Raises
        ------
        CapabilityError
            Not allowed, or no memory.
        """
        try:
            self.path.mkdir()
        except (PermissionError, FileNotFoundError) as error:
            raise no_access(self.path.parent) from error
        except OSError as error:
            raise CapabilityError(f"{self.path}: {error.strerror}", "free some memory") from error
        if not self.lock():
            raise CapabilityError(f"{self.path} is used by another process")
        self.write("tracing_on", "0")

    def lock(self) -> bool:
        """Take the lock; False if another process holds it.

        Raises
        ------
        FileNotFoundError
            There is no such instance.
        """
        fd = os.open(self.path / "trace_clock", os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._lock = fd
        return True

    def unlock(self) -> None:
        """Give the lock back."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> None:
        """Remove the instance; does nothing if it is gone.

        If somebody else has a file of it open, it is switched off and made small: a later command removes it.
        """
        self.unlock()  # an open file keeps the instance busy
        try:
            self.path.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            for name, text in (("events/enable", "0"), ("tracing_on", "0"), ("buffer_size_kb", "4")):
                self.try_write(name, text)

    def write(self, name: str, text: str) -> None:
        """Write a control file in one write(2)."""
        fd = os.open(self.path / name, os.O_WRONLY | os.O_TRUNC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)

    def read(self, name: str) -> str:
        """Read a control file."""
        return (self.path / name).read_text()

    def try_write(self, name: str, text: str) -> bool:
        """Write a control file that not every kernel has or accepts; say whether it worked."""
        try:
            self.write(name, text)
        except OSError:
            return False
        return True

    def has_event(self, system: str, name: str) -> bool:
        """Say whether the kernel knows the tracepoint or probe."""
        return (self.path / "events" / system / name / "enable").exists()

    def event_id(self, system: str, name: str) -> int:
        """Return the number by which a tracepoint's or probe's events are told in the buffer."""
        return int(self.read(f"events/{system}/{name}/id"))

    def events_of(self, system: str) -> list[str]:
        """Name the tracepoints of a system; [] if the kernel has no such system."""
        try:
            return sorted(path.name for path in (self.path / "events" / system).iterdir() if path.is_dir())
        except FileNotFoundError:
            return []

    def cpus(self) -> list[int]:
        """Return the numbers of the CPUs that have a buffer."""
        return sorted(int(path.name[3:]) for path in (self.path / "per_cpu").iterdir())

    def set_clock(self, clock: str) -> None:
        """Choose the trace clock.

        Raises
        ------
        CapabilityError
            The kernel does not have it.
        """
        known = self.read("trace_clock").replace("[", "").replace("]", "").split()
        if clock not in known:
            raise CapabilityError(f"this kernel has no trace clock {clock}", f"it has: {' '.join(known)}")
        self.write("trace_clock", clock)

    def set_buffer(self, size_bytes: int) -> int:
        """Give every CPU a buffer of that size, or of what the memory allows; return the size."""
        while True:
            if self.try_write("buffer_size_kb", str(max(4, size_bytes // 1024))):
                return size_bytes
            if size_bytes <= 64 << 10:
                raise CapabilityError("no memory for the kernel's buffers", "try a smaller --buffer-size")
            size_bytes //= 2

    def stats(self, cpu: int) -> dict[str, int]:
        """Return the counters of a CPU's buffer: entries, overrun, "commit overrun", "read events", ..."""
        counters = {}
        for line in self.read(f"per_cpu/cpu{cpu}/stats").splitlines():
            name, _, value = line.partition(":")
            if value.strip().isdigit():
                counters[name] = int(value)
        return counters

    def oldest_ns(self, cpu: int) -> int | None:
        """Return the time of the oldest event that was not read yet, at most 1 us too early; None if all were."""
        if not self.stats(cpu).get("entries"):
            return None
        lines = self.read(f"per_cpu/cpu{cpu}/stats").splitlines()
        text = next(line.partition(":")[2].strip() for line in lines if line.startswith("oldest event ts"))
        seconds, point, micros = text.partition(".")
        if not point:  # a clock that does not count ns
            return int(seconds)
        return int(seconds) * 10**9 + (int(micros) - 1) * 1000  # it is printed rounded

    def lost(self, cpu: int) -> int:
        """Return how many events of a CPU were lost so far, for whatever reason."""
        counters = self.stats(cpu)
        return sum(counters.get(name, 0) for name in ("overrun", "commit overrun", "dropped events"))
