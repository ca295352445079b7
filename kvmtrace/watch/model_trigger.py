"""The trigger `model`: what went round in the buffers is checked every so often; what contradicts the model is kept.

A part is saved under a hidden name, checked by `kvmtrace check` in a process of its own, and removed if it conforms.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvmtrace.errors import KvmtraceError
from kvmtrace.watch.saved_files import name_of
from kvmtrace.watch.saving import Wanted, save
from kvmtrace.watch.service import WARNING, say
from kvmtrace.watch.triggers import Fired

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvmtrace.watch.rings import Rings
    from kvmtrace.watch.triggers import Trigger

LEAST_S = 2.0
MOST_CHECK_S = 300.0


class ModelTrigger:
    """Checks what was recorded, part by part.

    Parameters
    ----------
    trigger : Trigger
    keep_s : how much is kept before a trigger: a part is half of it
    """

    def __init__(self, trigger: Trigger, keep_s: float) -> None:
        self._trigger = trigger
        self._every_s = max(LEAST_S, keep_s / 2)
        self._next = time.monotonic() + self._every_s

    @classmethod
    def of(cls, triggers: Sequence[Trigger], keep_s: float) -> ModelTrigger | None:
        """Return it if it was asked for."""
        return next((cls(trigger, keep_s) for trigger in triggers if trigger.kind == "model"), None)

    def is_due(self) -> bool:
        """Say whether a part is to be checked now."""
        return time.monotonic() >= self._next

    def look(self, rings: Rings, vms: list[dict[str, Any]], folder: Path) -> Path | None:
        """Check the part that has just been recorded; return the recording if it contradicts the model."""
        ring = rings.swap()
        hidden = folder / f".kvmtrace-part-{os.getpid()}.dat"
        fired = Fired(self._trigger, time.monotonic_ns())
        try:
            path, _ = save(rings, ring, hidden, Wanted((fired,), 0, 0, vms, whole=True))
            found = check(path)
            if found is None:
                path.unlink()
                return None
            return path.rename(folder / name_of(replace(fired, vm=found.get("vm")), folder))
        except (KvmtraceError, OSError, ValueError, subprocess.SubprocessError) as error:
            say(f"the model was not asked: {error}", WARNING)
            with contextlib.suppress(OSError):
                hidden.unlink(missing_ok=True)
            return None
        finally:
            ring.clear()
            self._next = time.monotonic() + self._every_s


def check(path: Path) -> dict[str, Any] | None:
    """Return the first violation of a recording, None if it has none."""
    argv = [sys.executable, "-m", "kvmtrace", "check", "--format", "json", "--limit", "1", str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=MOST_CHECK_S)
    if done.returncode != 1:
        return None
    violations = json.loads(done.stdout)["model"]["violations"]
    return next((one for one in violations if one["severity"] == "violation"), None)
