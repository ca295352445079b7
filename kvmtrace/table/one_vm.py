"""Of a recording of several VMs the events of some: what would have been recorded had only they been."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.errors import UsageError
from kvmtrace.kvm.vm_names import is_meant, vm_label
from kvmtrace.table.event_table import LOST_EVENTS
from kvmtrace.table.recording import Recording
from kvmtrace.table.vm_threads import processes_of, recorded_vms

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Loss

MAX_LISTED = 8
# events on other threads that are about one of the VM's: as the kernel's own filter by process keeps them
ABOUT = {
    "sched_switch": "next_pid",
    "sched_waking": "pid",
    "sched_wakeup": "pid",
    "sched_wakeup_new": "pid",
    "sched_migrate_task": "pid",
}


def only_vm(recording: Recording, wanted: str | None) -> Recording:
    """Return the recording as if only the VMs that `--vm` means had been recorded; itself for None.

    Raises
    ------
    UsageError
        The recording names no VM, or none that is meant.
    """
    return recording if wanted is None else OneVmRecording(recording, wanted)


class OneVmRecording(Recording):
    """The events of some VMs of a recording.

    Parameters
    ----------
    recording : Recording
    wanted : name, uuid, or pattern of names

    Raises
    ------
    UsageError
        The recording names no VM, or none that is meant.
    """

    def __init__(self, recording: Recording, wanted: str) -> None:
        self._recording = recording
        vms = recorded_vms(recording)
        meant = [vm for vm in vms if is_meant(wanted, vm.get("name"), vm.get("uuid"))]
        if not meant:
            raise UsageError(_none_meant(recording, wanted))
        pids = {vm["pid"] for vm in meant}
        processes = processes_of(recording)
        tids = pids | {tid for tid, pid in processes.items() if pid in pids}
        self._tids = np.array(sorted(tids), np.int64)
        capture = recording.capture
        threads = capture.meta.get("threads") or {}
        meta = {
            **capture.meta,
            "vms": meant,
            "threads": {tid: row for tid, row in threads.items() if int(tid) in tids},
            "target": {**(capture.meta.get("target") or {}), "kind": "pid"},
        }
        self.capture = replace(capture, meta=meta)
        self.vm = ", ".join(dict.fromkeys(vm["name"] or vm["uuid"] for vm in meant))
        self.kinds = recording.kinds
        self.comms = recording.comms
        self.processes = {**recording.processes, **{tid: pid for tid, pid in processes.items() if pid in pids}}
        self.partly_told = recording.partly_told
        self.samples = recording.samples

    @property
    def read_share(self) -> float | None:  # type: ignore[override]
        """How much of the recording is read."""
        return self._recording.read_share

    @property
    def loss(self) -> Loss:  # type: ignore[override]
        """What is missing; losses are told per CPU, whose VM nobody knows."""
        return self._recording.loss

    def events(self) -> EventTable:
        """Return the VMs' events."""
        return self._of(self._recording.events())

    def iter_events(self, max_events: int = 4_000_000) -> Iterator[EventTable]:
        """Yield consecutive tables."""
        return map(self._of, self._recording.iter_events(max_events))

    def _of(self, table: EventTable) -> EventTable:
        keep = np.isin(table.tid, self._tids)
        for event, field in ABOUT.items():
            if table.count(event) and table.has(event, field):
                keep[table.rows(event)[np.isin(table.field(event, field), self._tids)]] = True
        keep[table.rows(LOST_EVENTS)] = True
        return table.take(np.flatnonzero(keep))


def _none_meant(recording: Recording, wanted: str) -> str:
    path, vms = recording.capture.path, recorded_vms(recording)
    if not vms:
        return f"{path} names no VM (another tool's recording, or an older one); choose with --tid or --vcpu"
    labels = [vm_label(vm["name"], vm["kind"], vm["comm"], vm["pid"]) for vm in vms]
    more = f" and {len(labels) - MAX_LISTED} more" if len(labels) > MAX_LISTED else ""
    return f"{path} has no VM {wanted}; it has {', '.join(labels[:MAX_LISTED])}{more}"
