"""What one event costs the traced thread, measured on this machine in some milliseconds.

A system call that nothing else records is made with and without its event. A second event, of a call that is
not made, keeps the kernel on its traced path both times, so that the difference is one event's way into the
buffer: clock, reservation, fields, commit. Events with more fields cost a little more.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvmtrace.capture.ftrace.instance import Instance

CALLS = 1500
BATCHES = 4
MEASURED = "events/syscalls/sys_enter_getppid/enable"
KEEPER = "events/syscalls/sys_enter_getpgid/enable"


def cost_ns_per_event(instance: Instance) -> float | None:
    """Measure what recording one event costs; None where the kernel has no syscall tracepoints.

    Parameters
    ----------
    instance : Instance whose recording is over and has been read; only its clock and buffer are used
    """
    try:
        instance.write("events/enable", "0")
        instance.write("set_event_pid", str(os.getpid()))
        instance.write(KEEPER, "1")
        instance.write("tracing_on", "1")
        without, with_event = [], []
        for _ in range(BATCHES):
            without.append(_time_batch())
            instance.write(MEASURED, "1")
            with_event.append(_time_batch())
            instance.write(MEASURED, "0")
    except OSError:
        return None
    return max(0.0, round((min(with_event) - min(without)) / CALLS, 1))


def _time_batch() -> int:
    """Return the CPU time of CALLS system calls, ns."""
    getppid = os.getppid
    before = time.thread_time_ns()
    for _ in range(CALLS):
        getppid()
    return time.thread_time_ns() - before
