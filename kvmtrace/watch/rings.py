"""Two tracing instances that take turns: one goes round in its buffers, the other is saved, and nothing is missed.

The kernel's ring buffers overwrite their oldest events by themselves. To save, the other instance is switched on first
and then this one off: it holds what happened until then, and is read at leisure. What is recorded twice in between
stands in both. Events are enabled in one instance only, so the host pays for one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.buffer_size import buffer_bytes
from kvmtrace.capture.first_metadata import first_metadata
from kvmtrace.capture.ftrace.event_plan import enable, plan_events
from kvmtrace.capture.ftrace.ftrace_recorder import DEFAULT_CLOCK
from kvmtrace.capture.ftrace.instance import INSTANCE_PREFIX, Instance
from kvmtrace.capture.ftrace.probe_events import GROUP_PREFIX, Probes
from kvmtrace.capture.ftrace.trace_dat_writer import build_head
from kvmtrace.errors import CapabilityError

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.capture.ftrace.event_plan import Plan
    from kvmtrace.capture.settings import RecordSettings
    from kvmtrace.capture.target import Target

DEFAULT_BUFFER_BYTES = 32 << 20  # per CPU and instance


class Ring:
    """One of the two instances.

    Parameters
    ----------
    tracefs : Path
    name : PID-TOKEN, by which a dead recorder's is found

    Attributes
    ----------
    began_ns : CLOCK_MONOTONIC since which it records
    """

    def __init__(self, tracefs: Path, name: str) -> None:
        self.name = name
        self.token = name.partition("-")[2]
        self.instance = Instance(tracefs, INSTANCE_PREFIX + name)
        self.began_ns = 0

    def start(self, plan: Plan, target: Target) -> None:
        """Record from now on; the buffers are empty."""
        self.follow(target)
        enable(self.instance, plan)
        self.began_ns = time.monotonic_ns()
        self.instance.write("tracing_on", "1")

    def follow(self, target: Target) -> None:
        """Record the target's threads, those it has now included."""
        if target.pid is not None:
            with contextlib.suppress(OSError):
                self.instance.write("set_event_pid", " ".join(map(str, target.tids())))

    def stop(self) -> None:
        """Record no more; what is there stays."""
        self.instance.write("tracing_on", "0")

    def clear(self) -> None:
        """Switch the events off, and forget what was recorded."""
        self.instance.write("events/enable", "0")
        with (self.instance.path / "trace").open("w"):
            pass

    def oldest_ns(self) -> int:
        """Return the time from which on every event is still there."""
        told = [self.instance.oldest_ns(cpu) for cpu in self.instance.cpus() if self._overwritten(cpu)]
        return max([self.began_ns, *(oldest for oldest in told if oldest is not None)])

    def _overwritten(self, cpu: int) -> bool:
        return self.instance.stats(cpu).get("overrun", 0) > 0


class Rings:
    """Both instances, their probes, and what is recorded.

    Parameters
    ----------
    tracefs : Path
    settings : RecordSettings, of which target, event_set and buffer_bytes count
    target : Target

    Attributes
    ----------
    active : Ring that records
    meta : the metadata as far as it is known when the recording begins
    head : of the files
    """

    def __init__(self, tracefs: Path, settings: RecordSettings, target: Target) -> None:
        names = [f"{os.getpid()}-{secrets.token_hex(4)}" for _ in range(2)]
        self._rings = [Ring(tracefs, name) for name in names]
        self.probes = Probes(tracefs, GROUP_PREFIX + names[0].replace("-", "_"))
        self.target = target
        self.tracefs = tracefs
        try:
            for ring in self._rings:
                ring.instance.create()
                self._configure(ring.instance, settings)
            self.plan = plan_events(self._rings[0].instance, self.probes, settings)
            self.meta = self._first_metadata(settings)
            self.head = build_head(self._rings[0].instance.path, tracefs, self.plan.events)
            self.active, self._idle = self._rings
            self.active.start(self.plan, target)
        except BaseException:
            self.remove()
            raise

    @staticmethod
    def _configure(instance: Instance, settings: RecordSettings) -> None:
        instance.set_clock(DEFAULT_CLOCK)
        n_cpus = len(instance.cpus())
        asked = settings.buffer_bytes or min(DEFAULT_BUFFER_BYTES, 2 * buffer_bytes(None, n_cpus))
        instance.set_buffer(buffer_bytes(asked, 2 * n_cpus))
        instance.try_write("options/overwrite", "1")
        instance.try_write("options/record-tgid", "1")
        if settings.target.kind != "all":
            instance.write("options/event-fork", "1")

    def _first_metadata(self, settings: RecordSettings) -> dict[str, Any]:
        size = int(self._rings[0].instance.read("buffer_size_kb").split()[0]) * 1024
        plan = self.plan
        return first_metadata(
            settings, self.target, backend="ftrace", clock=DEFAULT_CLOCK, events=plan.names(),
            missing_events=plan.missing, probes=plan.probes, filters=plan.filters, buffer_bytes=size,
        )  # fmt: skip

    def swap(self) -> Ring:
        """Let the other instance record, and return the one that did: it is still, and holds the past.

        Raises
        ------
        CapabilityError
            The other one cannot record; this one goes on.
        """
        full = self.active
        try:
            self._idle.start(self.plan, self.target)
        except OSError as error:
            raise CapabilityError(f"the second trace instance does not record: {error.strerror}") from error
        full.stop()
        self.active, self._idle = self._idle, full
        return full

    def remove(self) -> None:
        """Leave tracefs as it was."""
        for ring in self._rings:
            with contextlib.suppress(OSError):
                ring.instance.write("tracing_on", "0")
                ring.instance.write("events/enable", "0")
            ring.instance.remove()
        self.probes.remove()
