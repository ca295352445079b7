"""The capture metadata that every recorder writes, as far as it is known when the recording begins."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from kvmtrace import __version__
from kvmtrace.capture.host import host_facts
from kvmtrace.capture.settings import META_SCHEMA

if TYPE_CHECKING:
    from kvmtrace.capture.settings import RecordSettings
    from kvmtrace.capture.target import Target


def first_metadata(settings: RecordSettings, target: Target, **known: Any) -> dict[str, Any]:
    """Return a metadata object "kvmtrace.capture/1" with every key.

    Parameters
    ----------
    settings, target
    known : what the back end knows already, in place of the defaults: backend, clock, events, notes, ...
    """
    spec = settings.target
    return {
        "schema": META_SCHEMA,
        "kvmtrace": __version__,
        "command": list(settings.argv),
        **host_facts(),
        "backend": None,
        "clock": None,
        "event_set": settings.event_set,
        "events": [],
        "missing_events": [],
        "probes": [],
        "target": {
            "kind": spec.kind,
            "pids": [] if target.pid is None else [target.pid],
            "guest": spec.guest,
            "guest_arguments": list(spec.guest_arguments),
            "command": list(spec.command),
        },
        "guest_run": None,
        "vms": [],
        "loss": {"by_cpu": {}, "events": None},
        "notes": [],
        "started": datetime.now(UTC).isoformat(),
        "duration_ns": None,
        "filters": {},
        "cost_ns_per_event": None,
    } | known
