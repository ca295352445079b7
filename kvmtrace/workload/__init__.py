"""The bundled tiny VMM and its guests: `GUESTS`, `run_guest`, and `python -m kvmtrace.workload`.

A guest is a commented listing (`listings/NAME.lst`), a description of its machine, and what is known of its
run before it starts: how often it leaves guest mode and why. The VMM is pure Python over /dev/kvm. Nothing
here needs more than the standard library, so a recorder may import it.

Running a guest under a recorder
--------------------------------
`python -m kvmtrace.workload NAME [--count N] --ready-fd R --go-fd G --json-fd J` is the child of a recorder
that passes it the ends of three pipes (`pass_fds`). In order:

1. the child writes one byte, ``b"R"``, to R when the interpreter is up and the guest's listing is loaded,
   and closes R. It has not opened /dev/kvm yet, so that the bring-up of the VM can be recorded;
2. the child reads one byte from G, any byte. The recorder sends it once it traces the child's pid (and
   threads it will start: every vCPU has one). End of file instead means that the recorder gave up: the
   child ends with exit code 1 and has touched nothing;
3. the guest runs;
4. the child writes one JSON object to J, closes it and ends: the `GuestRun` (schema "kvmtrace.guest_run/1"),
   or ``{"schema": ..., "guest": ..., "error": one line, "exit_code": n}`` when it could not run.

Each of the three options may be left out; then that step is. Without `--json-fd` a summary for people is
printed. Exit codes are those of `kvmtrace`: 0 the guest ran to its end, 1 it ran but did not end as its
listing says, 2 wrong usage, 4 this machine cannot run it (one line on stderr says why).

The VMM runs every vCPU in its own thread named "CPU n/KVM", the main thread only waits; VM and vCPU file
descriptors are made by the main thread. The file descriptors R, G and J are the VMM's only other I/O.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvmtrace.workload.guest_run import run_guest
    from kvmtrace.workload.guests import GUESTS, Guest
    from kvmtrace.workload.result import GuestRun, KnownCounts

__all__ = ["GUESTS", "Guest", "GuestRun", "KnownCounts", "run_guest"]

_HOME = {"GUESTS": "guests", "Guest": "guests", "GuestRun": "result", "KnownCounts": "result", "run_guest": "guest_run"}


def __getattr__(name: str) -> Any:
    """Import what is asked for: a prediction needs the guests' listings, not what runs them."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
