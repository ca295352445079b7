"""The trigger `monitor`: each vCPU thread's automaton is stepped in the kernel, and a forbidden step is told at once.

It knows the rules that forbid a step (V1, V2); `model` checks all rules, over parts that have been saved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.capture.bpf.detach import closing_elsewhere
from kvmtrace.watch.triggers import Fired

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtrace.capture.bpf.monitor import Monitor, Table
    from kvmtrace.capture.target import Target
    from kvmtrace.watch.triggers import Trigger


class MonitorTrigger:
    """Asks the monitor what was forbidden.

    Parameters
    ----------
    trigger : Trigger
    monitor : Monitor, started
    """

    def __init__(self, trigger: Trigger, monitor: Monitor) -> None:
        self._trigger, self._monitor = trigger, monitor

    @classmethod
    def of(cls, triggers: Sequence[Trigger], table: Table | None, target: Target) -> MonitorTrigger | None:
        """Attach the monitor of an automaton if it was asked for.

        Raises
        ------
        CapabilityError
            This host does not allow it.
        """
        trigger = next((one for one in triggers if one.kind == "monitor"), None)
        if trigger is None or table is None:
            return None
        from kvmtrace.capture.bpf.monitor import Monitor

        monitor = Monitor(table, target.pid)
        try:
            monitor.start(target.tids())
        except BaseException:
            with closing_elsewhere():
                monitor.close()
            raise
        return cls(trigger, monitor)

    def look(self) -> list[Fired]:
        """Return the forbidden steps since the last look."""
        return [
            Fired(self._trigger, one.ts_ns, one.pid, one.tid, detail=f"{one.step}, in state {one.state}")
            for one in self._monitor.take_forbidden()
        ]

    def close(self) -> None:
        """Detach the monitor."""
        self._monitor.close()
