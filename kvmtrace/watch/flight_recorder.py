"""`kvmtrace watch`: events go round in the kernel's buffers, and the last seconds are saved when a trigger fires."""

from __future__ import annotations

import os
import select
import signal
import time
from dataclasses import field
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.bpf.detach import closing_elsewhere
from kvmtrace.capture.running_vms import Vms
from kvmtrace.capture.target import Target
from kvmtrace.capture.tracefs import find_tracefs
from kvmtrace.errors import CapabilityError, KvmtraceError
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.watch.commands import Commands
from kvmtrace.watch.detectors import FROM_MAPS, Detectors, fired_by, limits_of
from kvmtrace.watch.model_trigger import ModelTrigger
from kvmtrace.watch.monitor_trigger import MonitorTrigger
from kvmtrace.watch.rings import Rings
from kvmtrace.watch.saved_files import RateLimit, keep_quota, name_of
from kvmtrace.watch.saved_summaries import SavedSummaries
from kvmtrace.watch.saving import Wanted, save, with_vm
from kvmtrace.watch.service import ERROR, NOTICE, STOPS, WARNING, Signals, notify, notify_reload, say
from kvmtrace.watch.triggers import Fired, Trigger
from kvmtrace.watch.vm_counters import VmCounters

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.capture.bpf.monitor import Table
    from kvmtrace.capture.bpf.summary_maps import SummaryPrograms
    from kvmtrace.capture.settings import RecordSettings

LOOK_S = 0.1  # between looks at what the programs told
SECOND_S = 1.0  # between looks at counters and names
MOST_NOTED = 20  # triggers of one recording
MOST_VCPUS = 1024
RESERVE_S = 10.0  # how often the buffers' reach is looked at


@dataclass(frozen=True)
class WatchSettings:
    """What is watched, what makes it save, and where to.

    Parameters
    ----------
    record : RecordSettings, of which target, event_set, buffer_bytes and argv count
    folder : where recordings go
    triggers : what makes it save
    keep_s, tail_s : how much before and after a trigger
    at_most : how many recordings in how many seconds
    quota_bytes : of all recordings in the folder, None for any
    vm : as `--vm` gave it
    duration_s : end after so long
    automaton : of the reference model, for the trigger `monitor`
    summaries : where each recording is summarised to for `kvmtrace fleet`, None for nowhere
    """

    record: RecordSettings
    folder: Path
    triggers: tuple[Trigger, ...]
    keep_s: float = 30.0
    tail_s: float = 1.0
    at_most: tuple[int, float] = (5, 3600.0)
    quota_bytes: int | None = None
    vm: str | None = None
    duration_s: float | None = None
    automaton: Table | None = None
    summaries: str | None = None


@dataclass
class _Pending:
    """A recording that waits for its tail."""

    fired: list[Fired]
    due: float
    more: int = field(default=0)


class FlightRecorder:
    """The running flight recorder.

    Parameters
    ----------
    settings : WatchSettings
    target : Target

    Raises
    ------
    CapabilityError, UsageError
        This host does not allow it.
    """

    def __init__(self, settings: WatchSettings, target: Target) -> None:
        self.settings, self.target = settings, target
        self.limit = RateLimit(*settings.at_most)
        self.vms = Vms(target.pid)
        self.programs: SummaryPrograms | None = None
        self.counters: VmCounters | None = None
        self.saved: list[Path] = []
        self._detectors = Detectors(settings.triggers)
        self._commands = Commands(settings.triggers)
        self._monitor: MonitorTrigger | None = None
        self._model = ModelTrigger.of(settings.triggers, settings.keep_s, settings.folder)
        self._summaries = None if settings.summaries is None else SavedSummaries(settings.summaries)
        self._pending: _Pending | None = None
        self._second = self._reach = 0.0
        self._told_short = False
        self.rings = Rings(find_tracefs(), settings.record, target)
        try:
            self._attach()
        except BaseException:
            self.close()
            raise

    def _attach(self) -> None:
        """Hang the programs on their events, where a trigger needs them."""
        self._monitor = MonitorTrigger.of(self.settings.triggers, self.settings.automaton, self.target)
        wanted = [trigger for trigger in self.settings.triggers if trigger.kind in FROM_MAPS]
        if not wanted:
            return
        from kvmtrace.capture.bpf.summary_maps import SummaryPrograms

        self.programs = SummaryPrograms(self.target.pid, max_threads=MOST_VCPUS, limits=limits_of(wanted))
        self.programs.attach(self.target.tids())
        self.programs.add_tids(self.target.tids())
        self.counters = VmCounters(self.programs.snapshot, self.programs.forget, self.vms, linger_s=0.0)

    def run(self, signals: Signals) -> None:
        """Watch until a signal, the target's end or the time ends it; what waits for its tail is saved first."""
        began = time.monotonic()
        while True:
            came = signals.take()
            if signal.SIGHUP in came:
                self._reload()
            self._take(self._fired(came))
            over = bool(set(came) & set(STOPS)) or self.target.ended() or self._is_over(began)
            if self._pending is not None and (over or time.monotonic() >= self._pending.due):
                self._save(self._pending)
                self._pending = None
            if over:
                return
            select.select([signals.fd], [], [], LOOK_S)

    def _is_over(self, began: float) -> bool:
        return self.settings.duration_s is not None and time.monotonic() - began >= self.settings.duration_s

    def _fired(self, came: list[int]) -> list[Fired]:
        """Return the triggers that have happened since the last look."""
        sent = [one for one in self.settings.triggers if one.kind == "signal" and signal.SIGUSR1 in came]
        fired = [Fired(trigger, time.monotonic_ns(), detail="SIGUSR1") for trigger in sent]
        fired += self._commands.look()
        if self.programs is not None:
            fired += fired_by(self.programs.take_alarms(), self.settings.triggers)
        if self._monitor is not None:
            fired += self._monitor.look()
        if time.monotonic() >= self._second:
            self._second = time.monotonic() + SECOND_S
            fired += self._each_second()
        return fired

    def _each_second(self) -> list[Fired]:
        """Look at names and counters, and whether the buffers reach back as far as promised."""
        self.vms.look()
        fired: list[Fired] = []
        if self.counters is not None:
            self.counters.update()
            fired += self._detectors.look(self.counters.vms())
        if self._model is not None:
            self._ask_the_model(self._model)
        if self._summaries is not None:
            self._summaries.look()
        if time.monotonic() >= self._reach:
            self._reach = time.monotonic() + RESERVE_S
            self._look_at_reach()
        return fired

    def _ask_the_model(self, model: ModelTrigger) -> None:
        path = model.look()
        if path is not None:
            self.limit.note()
            self._note_saved(path, "model")
        if self._pending is not None or not model.is_due() or not self.limit.is_free():
            return
        try:
            model.begin(self.rings, self._vm_rows())
        except CapabilityError as error:
            say(str(error), ERROR)

    def _note_saved(self, path: Path, why: str) -> None:
        """Tell of a recording, and make room for the next."""
        self.saved.append(path)
        say(f"saved {path}: {why}", NOTICE)
        notify(f"STATUS=saved {len(self.saved)}, the last one {path.name}")
        if self._summaries is not None:
            self._summaries.add(path)
        if self.settings.quota_bytes is not None:
            for name in keep_quota(self.settings.folder, self.settings.quota_bytes):
                say(f"removed {name}: --quota")

    def _look_at_reach(self) -> None:
        ring = self.rings.active
        ring.follow(self.target)
        oldest = ring.oldest_ns()
        reach_s = (time.monotonic_ns() - oldest) / 1e9
        if oldest > ring.began_ns and reach_s < self.settings.keep_s and not self._told_short:
            self._told_short = True
            say(
                f"the buffers reach back {reach_s:.1f} s now, not {self.settings.keep_s:g} s: "
                "a larger --buffer-size, or --events minimal, keeps more",
                WARNING,
            )

    def _take(self, fired: list[Fired]) -> None:
        """Begin a recording, or add to the one that waits."""
        for one in fired:
            if self._pending is not None:
                if len(self._pending.fired) < MOST_NOTED:
                    self._pending.fired.append(one)
                continue
            if self.limit.allows():
                self._pending = _Pending([one], time.monotonic() + self.settings.tail_s)

    def _vm_rows(self) -> list[dict[str, Any]]:
        return self.vms.as_meta()

    def _save(self, pending: _Pending) -> None:
        """Save, while the other ring records; what goes wrong is told, and the watch goes on."""
        vms = self._vm_rows()
        fired = tuple(with_vm(one, vms) for one in pending.fired)
        folder = self.settings.folder
        try:
            ring = self.rings.swap()
        except CapabilityError as error:
            say(str(error), ERROR)
            return
        try:
            suppressed = self.limit.note()
            name, keep_ns = name_of(fired[0], folder), round(self.settings.keep_s * 1e9)
            before = None
            if self._model is not None and fired[0].ts_ns - keep_ns < ring.began_ns:
                before = self._model.give_part(name)
            path, meta = save(self.rings, ring, folder / name, Wanted(fired, keep_ns, suppressed, vms, before=before))
            n_events = "" if meta["n_events"] is None else f", {meta['n_events']:,} events"
            self._note_saved(path, fired[0].trigger.text + n_events)
        except (KvmtraceError, OSError) as error:
            say(f"nothing was saved: {getattr(error, 'strerror', None) or error}", ERROR)
        finally:
            ring.clear()
            if self._model is not None:
                self._model.break_off()

    def _reload(self) -> None:
        notify_reload()
        self.vms.look(force=True)
        say("looked at the VMs again")
        notify("READY=1")

    def close(self) -> None:
        """Leave nothing behind but recordings."""
        self._commands.close()
        self.rings.remove()
        if self._model is not None:
            self._model.close()
        with closing_elsewhere():
            for programs in (self.programs, self._monitor):
                if programs is not None:
                    programs.close()
        if self._summaries is not None:
            self._summaries.close()


def watch(settings: WatchSettings) -> list[Path]:
    """Watch until it is ended; return the recordings.

    Raises
    ------
    CapabilityError, UsageError
        This host does not allow it.
    """
    if not os.access(settings.folder, os.W_OK):
        raise CapabilityError(f"{settings.folder}: not a folder that can be written to", "make it, or choose another")
    with Signals(signal.SIGHUP, signal.SIGUSR1) as signals, Target(settings.record.target) as target:
        recorder = FlightRecorder(settings, target)
        try:
            size = recorder.rings.meta["buffer_bytes"] >> 20
            say(f"watching, twice {size} MiB per CPU in the kernel; recordings go to {settings.folder}")
            notify("READY=1")
            recorder.run(signals)
        finally:
            notify("STOPPING=1")
            recorder.close()
        return recorder.saved
