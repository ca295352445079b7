"""What is told of more than one piece of a recording: the VM's construction, and the replay of a bundled guest."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.errors import MissingEventError
from kvmtrace.kvm.vmm_symbols import VMM_FUNCTIONS
from kvmtrace.table.event_table import EventTable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvmtrace.bring_up.followed import BringUp
    from kvmtrace.predict.replayed import ReplayedGuest
    from kvmtrace.table.recording import Recording

MAX_REPLAYED = 1_000_000  # events; bounds the memory that long recordings take
MAX_CONSTRUCTION = 1_000_000  # events of CONSTRUCTION, likewise; a VM is built within far fewer
# what bring_up.py follows
CONSTRUCTION = (
    *(f"sys_{side}_{call}" for call in ("ioctl", "openat", "mmap", "close") for side in ("enter", "exit")),
    "sched_process_fork",
    *(function.role for function in VMM_FUNCTIONS),
)


class Beginning:
    """Keeps the events of a recording that tell of the construction, and all events of one short enough to replay."""

    def __init__(self) -> None:
        self._whole: list[EventTable] | None = []
        self._construction: list[EventTable] = []
        self._n_construction = 0
        self._rows: list[NDArray[np.intp]] = []  # of the recording, for each row of the construction
        self._n_events = 0

    def feed(self, table: EventTable) -> None:
        """Take in the next table."""
        if self._whole is not None:
            self._whole.append(table)
            if self._n_events + len(table) > MAX_REPLAYED:
                self._whole = None
        self._feed_construction(table)
        self._n_events += len(table)

    def _feed_construction(self, table: EventTable) -> None:
        from kvmtrace.table.parking import materialise

        rows = np.sort(np.concatenate([table.rows(kind) for kind in CONSTRUCTION]))
        self._n_construction += len(rows)
        if self._n_construction <= MAX_CONSTRUCTION:
            self._construction.append(materialise(table, rows))
            self._rows.append(rows + self._n_events)

    def bring_up(self, recording: Recording, isa: str | None) -> BringUp | None:
        """Return the VM's construction, None if its ioctls were not recorded."""
        if not self._construction or not self._construction[0].has("sys_enter_ioctl", "cmd"):
            return None
        from kvmtrace.bring_up.follow import follow_bring_up

        events, row = EventTable.concat(self._construction), np.concatenate(self._rows)
        try:
            found = follow_bring_up(
                events, processes=recording.processes, isa=isa, qmp=recording.capture.meta.get("qmp")
            )
        except MissingEventError:  # a recorder that kept only some fields of the ioctls
            return None
        if found is not None and self._n_construction > MAX_CONSTRUCTION:
            note = f"too many system calls: {self._n_construction - len(row):,} of their events were not followed"
            found = replace(found, notes=(*found.notes, note))
        return None if found is None else _in_recording(found, row)

    def replay(self, recording: Recording, *, every_step: bool = True) -> ReplayedGuest | None:
        """Return a bundled guest's prediction beside its recording, None if it is none, or too long; see replayed."""
        if not self._whole:
            return None
        from kvmtrace.predict.align_recording import find_guest, replay_events
        from kvmtrace.predict.replayed import replayed

        if find_guest(recording.capture) is None:
            return None
        replay = replay_events(recording.capture, EventTable.concat(self._whole))
        return None if replay is None else replayed(replay, every_step=every_step)


def _in_recording(found: BringUp, row: NDArray[np.intp]) -> BringUp:
    """Return a construction whose events are numbered as in the recording."""
    vmm = found.vmm and replace(
        found.vmm, steps=tuple(replace(step, event_index=int(row[step.event_index])) for step in found.vmm.steps)
    )
    steps = tuple(replace(step, event_index=int(row[step.event_index])) for step in found.steps)
    return replace(found, steps=steps, vmm=vmm)
