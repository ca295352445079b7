"""tracefs: where it is, and whether we may use it. Both back ends and the diagnosis ask."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from kvmtrace.errors import CapabilityError

MOUNT_POINT = Path("/sys/kernel/tracing")
KNOWN_FORMAT = "events/sched/sched_switch/format"
LOCKDOWN = Path("/sys/kernel/security/lockdown")


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
