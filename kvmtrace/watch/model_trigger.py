"""The trigger `model`: what went round in the buffers is checked, part by part; what contradicts the model is kept.

A part is saved under a hidden name and checked by `kvmtrace check` in a process of its own, while the watch goes on.
The last part stays until the next one is there: whatever is saved meanwhile is given it as what was before.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from kvmtrace.errors import KvmtraceError
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.watch.saved_files import name_before, name_of
from kvmtrace.watch.saving import Wanted, save
from kvmtrace.watch.service import WARNING, say
from kvmtrace.watch.triggers import Fired

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtrace.watch.rings import Rings
    from kvmtrace.watch.triggers import Trigger

LEAST_S = 2.0
MOST_CHECK_S = 300.0
NO_KVM_EVENT = 3  # exit code of the check: no VM ran
PART = re.compile(r"\.kvmtrace-part-(\d+)-\d+\.dat\Z")


@dataclass
class _Check:
    """A check that runs."""

    path: Path
    fired: Fired
    process: subprocess.Popen[bytes]
    said: IO[bytes]
    until: float


class ModelTrigger:
    """Checks what was recorded, part by part.

    Parameters
    ----------
    trigger : Trigger
    keep_s : how much is kept before a trigger: as long is a part
    folder : where parts and recordings are
    """

    def __init__(self, trigger: Trigger, keep_s: float, folder: Path) -> None:
        self._trigger, self._folder = trigger, folder
        self._every_s = max(LEAST_S, keep_s)
        self._next = time.monotonic() + self._every_s
        self._parts: list[Path] = []  # without a gap; the last one ends where the ring that records now begins
        self._check: _Check | None = None
        self._number = 0

    @classmethod
    def of(cls, triggers: Sequence[Trigger], keep_s: float, folder: Path) -> ModelTrigger | None:
        """Return it if it was asked for; what a killed one left in the folder is removed."""
        trigger = next((one for one in triggers if one.kind == "model"), None)
        if trigger is None:
            return None
        remove_left(folder)
        return cls(trigger, keep_s, folder)

    def is_due(self) -> bool:
        """Say whether a part is to be checked now."""
        return self._check is None and time.monotonic() >= self._next

    def begin(self, rings: Rings, vms: list[dict[str, Any]]) -> None:
        """Save the part that has just been recorded, and begin to check it."""
        ring = rings.swap()
        self._number += 1
        hidden = self._folder / f".kvmtrace-part-{os.getpid()}-{self._number}.dat"
        fired = Fired(self._trigger, time.monotonic_ns())
        try:
            path, _ = save(rings, ring, hidden, Wanted((fired,), 0, 0, vms, whole=True))
            self._keep([*self._parts[-1:], path])
            self._check = start_check(path, fired)
        except (KvmtraceError, OSError) as error:
            say(f"the model was not asked: {error}", WARNING)
            self._keep([])
        finally:
            ring.clear()
            self._next = time.monotonic() + self._every_s

    def look(self) -> Path | None:
        """Return the recording, under its name, if the check has ended and the part contradicts the model."""
        check = self._check
        if check is None or (check.process.poll() is None and time.monotonic() < check.until):
            return None
        self._check = None
        try:
            found = result_of(check)
            return None if found is None else self._name(check, found)
        except (OSError, ValueError) as error:
            say(f"the model was not asked: {error}", WARNING)
            return None
        finally:
            self._keep(self._parts if check.path in self._parts else [], check.path)

    def _name(self, check: _Check, found: dict[str, Any]) -> Path:
        """Make recordings of the part that contradicts the model, and of the one before it."""
        path = self._folder / name_of(replace(check.fired, vm=found.get("vm")), self._folder)
        give_name(check.path, path)
        if check.path in self._parts[1:]:
            give_name(self._parts[0], self._folder / name_before(path.name))
        return path

    def give_part(self, name: str) -> str | None:
        """Name the last part as what was before a recording that begins where it ended; return that name.

        None where there is no such part.
        """
        if not self._parts:
            return None
        try:
            give_name(self._parts[-1], self._folder / name_before(name))
        except OSError as error:
            say(f"what was before {name} is not kept: {error.strerror}", WARNING)
            return None
        return name_before(name)

    def break_off(self) -> None:
        """Another recording was saved: what comes next does not begin where the last part ended."""
        self._keep([])
        self._next = time.monotonic() + self._every_s

    def _keep(self, parts: list[Path], done: Path | None = None) -> None:
        """Have these parts, and remove the others but the one that is being checked."""
        kept = {*parts, *([self._check.path] if self._check else [])}
        for path in {*self._parts, *([done] if done else [])} - kept:
            path.unlink(missing_ok=True)
        self._parts = parts

    def close(self) -> None:
        """Leave no part."""
        check, self._check = self._check, None
        if check is not None:
            check.process.kill()
            check.process.wait()
            check.said.close()
        self._keep([], check.path if check else None)


def start_check(path: Path, fired: Fired) -> _Check:
    """Begin to check a recording."""
    argv = [sys.executable, "-m", "kvmtrace", "check", "--format", "json", "--limit", "1", str(path)]
    said = tempfile.TemporaryFile()  # noqa: SIM115 (closed when it is read)
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.DEVNULL)
    return _Check(path, fired, process, said, time.monotonic() + MOST_CHECK_S)


def result_of(check: _Check) -> dict[str, Any] | None:
    """Return the first violation that a check has found, None if there is none.

    Raises
    ------
    ValueError
        It did not come to an end.
    """
    with check.said:
        if check.process.poll() is None:
            check.process.kill()
            check.process.wait()
            raise ValueError(f"the check took more than {MOST_CHECK_S:.0f} s")
        if check.process.returncode in (0, NO_KVM_EVENT):
            return None
        if check.process.returncode != 1:
            raise ValueError(f"the check ended with {check.process.returncode}")
        check.said.seek(0)
        violations = json.loads(check.said.read())["model"]["violations"]
    return next((one for one in violations if one["severity"] == "violation"), None)


def give_name(part: Path, path: Path) -> None:
    """Give a part a further name, of a recording; the check may be reading it."""
    try:
        path.hardlink_to(part)
    except OSError:  # a file system without links
        shutil.copy2(part, path)


def remove_left(folder: Path) -> None:
    """Remove the parts of watches that were killed."""
    for path in folder.iterdir():
        match = PART.match(path.name)
        if match is not None and not Path("/proc", match[1]).exists():
            with contextlib.suppress(OSError):
                path.unlink()
