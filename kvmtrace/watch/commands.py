"""The commands whose end is a trigger."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

from kvmtrace.errors import CapabilityError
from kvmtrace.watch.triggers import Fired

if TYPE_CHECKING:
    from kvmtrace.watch.triggers import Trigger

COMMAND_PAUSE_S = 1.0


class Commands:
    """The commands whose end is a trigger; each is started again after it has ended."""

    def __init__(self, triggers: tuple[Trigger, ...]) -> None:
        self._triggers = [trigger for trigger in triggers if trigger.kind == "command"]
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._next = dict.fromkeys(range(len(self._triggers)), 0.0)

    def look(self) -> list[Fired]:
        """Start what does not run; return those that have ended."""
        fired = []
        for number, trigger in enumerate(self._triggers):
            process = self._running.get(number)
            if process is not None and process.poll() is not None:
                del self._running[number]
                self._next[number] = time.monotonic() + COMMAND_PAUSE_S
                fired.append(Fired(trigger, time.monotonic_ns(), detail=f"status {process.returncode}"))
            elif process is None and time.monotonic() >= self._next[number]:
                self._start(number, trigger)
        return fired

    def _start(self, number: int, trigger: Trigger) -> None:
        try:
            self._running[number] = subprocess.Popen(
                trigger.command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            raise CapabilityError(f"cannot run {trigger.command[0]}: {error.strerror}", "see --on command") from error

    def close(self) -> None:
        """End what runs."""
        for process in self._running.values():
            process.terminate()
            try:
                process.wait(2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
