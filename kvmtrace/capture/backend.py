"""Which recorder is used on this host, and why."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvmtrace.capture.tracefs import find_tracefs
from kvmtrace.errors import CapabilityError, UsageError

if TYPE_CHECKING:
    from kvmtrace.capture.settings import RecordSettings


def choose_backend(settings: RecordSettings) -> tuple[str, str]:
    """Return (name, reason) of the back end to use.

    ftrace is preferred: it records everything bpf can, probes included, at less cost per event. bpf is taken
    for what only it can do, and where tracefs cannot be used.

    Raises
    ------
    UsageError
        The request contradicts itself.
    CapabilityError
        No back end works here.
    """
    aggregated = "--monitor" if settings.monitor else "--summary" if settings.summary else ""
    needs_bpf = aggregated or next(iter(settings.filters), "")
    if settings.backend == "ftrace":
        if needs_bpf:
            raise UsageError(f"{needs_bpf} needs --backend bpf")
        return "ftrace", ""
    if settings.backend == "bpf":
        return "bpf", ""
    if needs_bpf:
        return "bpf", f"{needs_bpf} aggregates or filters in the kernel"
    try:
        find_tracefs()
    except CapabilityError as error:
        if settings.clock or settings.max_bytes:
            raise
        return _bpf_instead(error)
    return "ftrace", "it records every event and probe of this kernel at the least cost"


def _bpf_instead(error: CapabilityError) -> tuple[str, str]:
    """Fall back to bpf if it is there; else say what is wrong with tracefs."""
    if find_spec("bcc") is None or find_spec("kvmtrace.capture.bpf.bpf_recorder") is None:
        raise error
    return "bpf", f"{error.problem}"
