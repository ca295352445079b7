"""Event formats of a capture -> the kinds of its event table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.table.credible import is_credible
from kvmtrace.table.event_table import LOST_EVENTS, EventKind
from kvmtrace.table.format_text import Field

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from kvmtrace.table.format_text import EventFormat

PROBE_SYSTEM = "kvmtrace"
UNKNOWN_EVENT = "unknown_event"  # its id is described nowhere in the capture
PREFERRED_SYSTEMS = ("kvm", PROBE_SYSTEM, "sched", "syscalls")  # their events keep the plain name

_COMMON_TYPE = Field("common_type", "unsigned short", 0, 2, np.dtype("<u2"))


@dataclass(frozen=True)
class KindTable:
    """The kinds of a capture whose events are known by a number.

    Parameters
    ----------
    kinds : tuple of EventKind
    described : per kind, field name -> Field; empty for lost events
    kind_of_id : uint16, shape (65536,), event id -> kind
    common : the fields every event has
    """

    kinds: tuple[EventKind, ...]
    described: tuple[dict[str, Field], ...]
    kind_of_id: NDArray[np.uint16]
    common: dict[str, Field]

    @property
    def lost(self) -> int:
        """Index of the kind of lost events."""
        return len(self.kinds) - 1


def lost_events_kind() -> EventKind:
    """Return the kind whose rows say that events were lost."""
    return EventKind(LOST_EVENTS, PROBE_SYSTEM, {"count": np.dtype(np.int64)})


def _rank(system: str) -> int:
    return PREFERRED_SYSTEMS.index(system) if system in PREFERRED_SYSTEMS else len(PREFERRED_SYSTEMS)


def _system_of(system: str) -> str:
    """Return the system of a format; our recorder's probe groups have names of their own."""
    return PROBE_SYSTEM if system.startswith(PROBE_SYSTEM) else system


def name_kinds(events: Sequence[tuple[str, str]]) -> list[str]:
    """Return a name for each (system, name); of equal names all but the most relevant get their system's.

    A tracepoint that several ids share (probes made twice) gets its position as well.
    """
    best: dict[str, int] = {}
    for i, (system, name) in enumerate(events):
        if name not in best or _rank(system) < _rank(events[best[name]][0]):
            best[name] = i
    names: list[str] = []
    taken = {LOST_EVENTS, UNKNOWN_EVENT}
    for i, (system, name) in enumerate(events):
        full = name if best[name] == i and name not in taken else f"{system}:{name}"
        names.append(full if full not in taken else f"{full}#{i}")
        taken.add(names[-1])
    return names


def make_kind_table(formats: Iterable[EventFormat], record_limit: int) -> KindTable:
    """Build the kinds of a capture.

    Parameters
    ----------
    formats : event formats; of several with one id the first counts
    record_limit : int, bytes of the largest possible record; fields beyond it, or of types that they
        cannot have, are nonsense and left out
    """
    unique: dict[int, EventFormat] = {}
    for fmt in formats:
        if fmt.event_id <= 0xFFFF:
            unique.setdefault(fmt.event_id, fmt)
    events = list(unique.values())[:65000]
    names = name_kinds([(_system_of(f.system), f.name) for f in events])
    kinds, described = [], []
    for name, fmt in zip(names, events, strict=True):
        system = _system_of(fmt.system)
        fields = {
            n: f for n, f in fmt.fields.items() if f.offset + f.size <= record_limit and is_credible(system, n, f.dtype)
        }
        dtypes = {n: f.dtype for n, f in fields.items()}
        kinds.append(EventKind(name, system, dtypes, fmt.print_fmt))
        described.append(fields)
    kinds += [EventKind(UNKNOWN_EVENT, "", {"common_type": np.dtype("<u2")}), lost_events_kind()]
    described += [{"common_type": _COMMON_TYPE}, {}]
    kind_of_id = np.full(65536, len(events), np.uint16)
    kind_of_id[[f.event_id for f in events]] = np.arange(len(events), dtype=np.uint16)
    common = next((f.common for f in events if f.common), {})
    return KindTable(tuple(kinds), tuple(described), kind_of_id, common)
