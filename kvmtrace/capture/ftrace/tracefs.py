"""tracefs: where it is, an own instance in it, and the probe events we add.

Only our own instance and our own probe group are ever written to. An instance is locked (flock on its
`trace_clock`) as long as its recorder lives, in whatever pid namespace; that is how a left-over one is told
from one in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.errors import CapabilityError
from kvmtrace.kvm.tracepoints import PROBES

if TYPE_CHECKING:
    from collections.abc import Iterable

MOUNT_POINT = Path("/sys/kernel/tracing")
KNOWN_FORMAT = "events/sched/sched_switch/format"
INSTANCE_PREFIX = "kvmtrace-"
GROUP_PREFIX = "kvmtrace_"
LOCKDOWN = Path("/sys/kernel/security/lockdown")
# kretprobe instances: one per thread that is inside the function; KVM_RUN stays inside for long
MAX_ACTIVE = 1024
ARGUMENT_REGISTERS = {"$arg1": "%di", "$arg2": "%si", "$arg3": "%dx"}  # before Linux 4.20


def lockdown_mode() -> str | None:
    """Return "none" "integrity" "confidentiality", or None where the kernel has no lockdown."""
    try:
        text = LOCKDOWN.read_text()
    except OSError:
        return None
    return text.partition("[")[2].partition("]")[0] or None


def mounted() -> Path | None:
    """Return where tracefs is mounted (the standard place preferred), or None."""
    places = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split(" ")
        if kind == "tracefs":
            places.append(Path(place.encode().decode("unicode_escape")))
    return MOUNT_POINT if MOUNT_POINT in places else next(iter(places), None)


def find_tracefs(*, write: bool = True) -> Path:
    """Return a usable tracefs; it is mounted at its standard place if it is mounted nowhere.

    Parameters
    ----------
    write : bool, an instance is to be made in it; BPF programs only need to know the events

    Raises
    ------
    CapabilityError
        The kernel has none, it is locked, or privileges are missing.
    """
    place = mounted()
    if place is None:
        place = mount_tracefs()
    wanted, mode = (place / "instances", os.W_OK | os.X_OK) if write else (place / KNOWN_FORMAT, os.R_OK)
    if not may(wanted, mode):
        raise no_access(wanted, write=write)
    return place


def may(path: Path, mode: int) -> bool:
    """Say whether we can use a path so, by the privileges in effect; capabilities count."""
    return os.access(path, mode, effective_ids=True)


def mount_tracefs() -> Path:
    """Mount tracefs where systemd would have."""
    if not MOUNT_POINT.is_dir():
        raise CapabilityError("this kernel has no tracefs", "use a kernel with CONFIG_EVENT_TRACING")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tracefs", bytes(MOUNT_POINT), b"tracefs", 0, None) == 0:
        return MOUNT_POINT
    code = ctypes.get_errno()
    raise CapabilityError(
        f"tracefs is not mounted, and mounting it failed: {os.strerror(code)}",
        f"as root: mount -t tracefs tracefs {MOUNT_POINT}",
    )


def no_access(path: Path, *, write: bool = True) -> CapabilityError:
    """Say what it takes to use `path` of tracefs."""
    if os.geteuid() != 0:
        group = "" if write else f", or let a group of yours read it: mount -o remount,gid=GROUP,mode=750 {MOUNT_POINT}"
        return CapabilityError(f"no permission to use {path}", f"run it as root (sudo kvmtrace ...){group}")
    if lockdown_mode() == "confidentiality":
        return CapabilityError(
            "the kernel is locked down (confidentiality): tracefs cannot be opened",
            "boot without lockdown=confidentiality, or use `kvmtrace lab run`",
        )
    return CapabilityError(
        f"{path} is not writable",
        "mount tracefs read-write: mount -o remount,rw "
        f"{MOUNT_POINT}; in a container, give it the host's tracefs and CAP_SYS_ADMIN",
    )


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

    def remove(self) -> None:
        """Remove the instance; does nothing if it is gone."""
        if self._lock >= 0:
            os.close(self._lock)  # an open file keeps the instance busy
            self._lock = -1
        with contextlib.suppress(FileNotFoundError):
            self.path.rmdir()

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
            self.events = [name for name in names if self._add(name)]
        return self.events

    def _add(self, name: str) -> bool:
        function, is_return, arguments = PROBES[name]
        kind = f"r{MAX_ACTIVE}" if is_return else "p"
        text = " ".join(arguments)
        old = text
        for argument, register in ARGUMENT_REGISTERS.items():
            old = old.replace(argument, register)
        return any(self._write(f"{kind}:{self.group}/{name} {function} {fields}") for fields in (text, old))

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
