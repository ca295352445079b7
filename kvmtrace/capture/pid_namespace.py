"""Process ids in containers: the kernel's events carry those of the initial PID namespace, /proc those of its own.

Nothing in a container tells which id of the one is which of the other, so a target is not accepted there, and names
are taken from the kernel's own notes.
"""

from __future__ import annotations

from pathlib import Path

from kvmtrace.errors import CapabilityError

INITIAL = 0xEFFFFFFC  # PROC_PID_INIT_INO, include/linux/proc_ns.h
OWN = Path("/proc/self/ns/pid")


def is_initial() -> bool:
    """Say whether process ids here are those that events carry; also where there are no PID namespaces."""
    try:
        return OWN.stat().st_ino == INITIAL
    except OSError:
        return True


def require_initial(what: str, instead: str) -> None:
    """Refuse to look for a process by an id that events do not carry.

    Parameters
    ----------
    what, instead : str, what is not possible here, and what is; for the message

    Raises
    ------
    CapabilityError
        This is another PID namespace.
    """
    if not is_initial():
        raise CapabilityError(
            f"{what} is not possible in a container's PID namespace: events carry the host's process ids",
            "run kvmtrace on the host, or give the container the host's PID namespace (docker run --pid=host); "
            f"{instead} works here",
        )
