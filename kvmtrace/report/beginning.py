"""What is told from a recording's beginning alone: the VM's construction, and the replay of a bundled guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtrace.errors import MissingEventError
from kvmtrace.events.table import EventTable

if TYPE_CHECKING:
    from kvmtrace.events.recording import Recording

MAX_EVENTS = 1_000_000  # a VM is built within far fewer events; bounds the memory that long recordings take


class Beginning:
    """Keeps the first tables of a recording, up to MAX_EVENTS."""

    def __init__(self) -> None:
        self._tables: list[EventTable] = []
        self._n_kept = 0
        self._n_events = 0

    def feed(self, table: EventTable) -> None:
        """Take in the next table."""
        if self._n_kept == self._n_events and self._n_kept + len(table) <= MAX_EVENTS:
            self._tables.append(table)
            self._n_kept += len(table)
        self._n_events += len(table)

    def _events(self) -> EventTable | None:
        if len(self._tables) > 1:
            self._tables = [EventTable.concat(self._tables)]
        return self._tables[0] if self._tables else None

    def bring_up(self, recording: Recording, isa: str | None) -> Any:
        """Return the VM's construction (BringUp), None if its ioctls were not recorded."""
        from kvmtrace.compare.bring_up import follow_bring_up

        events = self._events()
        if events is None:
            return None
        try:
            return follow_bring_up(events, processes=recording.processes, isa=isa,
                                    qmp=recording.capture.meta.get("qmp"))
        except MissingEventError:  # a recorder that kept only some fields of the ioctls
            return None

    def replay(self, recording: Recording) -> Any:
        """Return a bundled guest's prediction beside its recording (Replay), None if it is none, or too long."""
        if self._n_kept < self._n_events:
            return None
        from kvmtrace.compare.alignment_recording import find_guest, replay_events

        if find_guest(recording.capture) is None:
            return None
        events = self._events()
        return replay_events(recording.capture, events) if events is not None else None
