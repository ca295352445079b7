"""A recording: what was captured, what was lost, and its event table.

`open_recording` recognises a file by its content. Everything above this layer is given a Recording and
does not know which recorder wrote it.
"""

from __future__ import annotations

from dataclasses import field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvmtrace.table.event_table import EventKind, EventTable


@dataclass(frozen=True)
class Capture:
    """What was recorded, how, and where (the report document's `capture`).

    `meta` is the recorder's own metadata ("kvmtrace.capture/1", see docs/capture-metadata.md), {} for files of
    other tools.
    """

    path: str
    format: str  # "trace.dat" "perf.data" "ftrace-text" "kvmtrace-bpf" "kvmtrace-summary" "parquet" "arrow"
    host: str | None = None
    kernel: str | None = None
    cpu_model: str | None = None
    clock: str | None = None
    backend: str | None = None
    events: tuple[str, ...] = ()  # enabled tracepoints and probes, "system:name"; () if unknown
    n_cpus: int | None = None
    tracer_cost_ns_per_event: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Damage:
    """A place that could not be read; what stands before and after it was."""

    offset: int
    cpu: int | None
    expected: str
    found: str


@dataclass(frozen=True)
class Loss:
    """Events that are not in the recording although they happened (the document's `loss`).

    Parameters
    ----------
    repeated : int, events that the recorder wrote twice; they are in the table once
    not_understood : event -> events of a text whose own text is none that a kernel prints; also lines between
        events that are no events
    """

    events: int | None = 0  # None: some were lost, nobody knows how many
    by_cpu: dict[int, int] = field(default_factory=dict)
    truncated: bool = False
    damage: tuple[Damage, ...] = ()
    repeated: int = 0
    not_understood: dict[str, int] = field(default_factory=dict)


class Recording:
    """A decoded recording.

    Attributes
    ----------
    capture : Capture
    loss : Loss; complete once all events have been read
    kinds : tuple of EventKind, the kinds the capture describes
    comms : tid -> name of the thread, as far as the recorder saved them
    processes : tid -> pid of its process, as far as known
    partly_told : event -> fields that some of its events do not tell (EventTable.told says which)
    samples : event -> a text of it that was not understood, of formats that are text
    read_share : how much of the recording the latest pass has read, 0 to 1; None if that is not known
    vm : names of the VMs whose events these are alone; None for all of a recording
    """

    capture: Capture
    loss: Loss
    kinds: tuple[EventKind, ...]
    comms: dict[int, str]
    processes: dict[int, int]
    partly_told: Mapping[str, frozenset[str]] = MappingProxyType({})
    samples: Mapping[str, str] = MappingProxyType({})
    vm: str | None = None
    read_share: float | None = None

    def events(self) -> EventTable:
        """Return all events (cached)."""
        raise NotImplementedError

    def iter_events(self, max_events: int = 4_000_000) -> Iterator[EventTable]:
        """Yield consecutive tables of about `max_events` rows each; together they are events()."""
        raise NotImplementedError
