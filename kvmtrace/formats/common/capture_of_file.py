"""What a file says about its recording -> Capture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtrace.table.recording import Capture

if TYPE_CHECKING:
    from collections.abc import Mapping


def _string(meta: Mapping[str, Any], key: str, other: str | None) -> str | None:
    value = meta.get(key)
    return value if isinstance(value, str) and value else other


def processes_of_meta(meta: Mapping[str, Any]) -> dict[int, int]:
    """Return tid -> pid of the recorder's `threads` (tid -> [pid, comm]; pid -1 where it had ended)."""
    threads = meta.get("threads")
    if not isinstance(threads, dict):
        return {}
    pids = {tid: known[0] for tid, known in threads.items() if isinstance(known, list) and known}
    return {int(tid): pid for tid, pid in pids.items() if str(tid).isdigit() and isinstance(pid, int) and pid > 0}


MAX_CPUS = 1 << 15  # more is not true, and some would count up to it


def capture_of(
    path: str,
    file_format: str,
    meta: Mapping[str, Any],
    *,
    host: str | None = None,
    kernel: str | None = None,
    cpu_model: str | None = None,
    clock: str | None = None,
    n_cpus: int | None = None,
    events: tuple[str, ...] = (),
) -> Capture:
    """Build the Capture of a file.

    Parameters
    ----------
    path, file_format : str, see Capture
    meta : our recorder's metadata, {} for others' files; untrusted: a value of another type counts as absent
    host, kernel, cpu_model, clock, n_cpus, events : what the file itself says, used where `meta` is silent
    """
    cost = meta.get("cost_ns_per_event")
    listed = meta.get("events")
    if isinstance(listed, list):
        events = tuple(e for e in listed if isinstance(e, str))
    return Capture(
        path,
        file_format,
        host=_string(meta, "host", host),
        kernel=_string(meta, "kernel", kernel),
        cpu_model=_string(meta, "cpu_model", cpu_model),
        clock=_string(meta, "clock", clock),
        backend=_string(meta, "backend", None),
        events=events,
        n_cpus=n_cpus if n_cpus is not None and 0 < n_cpus <= MAX_CPUS else None,
        tracer_cost_ns_per_event=float(cost) if isinstance(cost, int | float) else None,
        meta=dict(meta),
    )
