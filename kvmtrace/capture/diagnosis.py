"""What this host can record: the checks, and which back end follows from them."""

from __future__ import annotations

import os
from dataclasses import asdict, field
from typing import Any

from kvmtrace.capture import host_checks
from kvmtrace.capture.host import host_facts
from kvmtrace.capture.host_checks import MISSING, OK, OPTIONAL, Check
from kvmtrace.capture.tracefs import mounted
from kvmtrace.lazy_dataclass import dataclass

SCHEMA = "kvmtrace.doctor/1"


@dataclass(frozen=True)
class Diagnosis:
    """All checks, and what follows from them.

    Parameters
    ----------
    host : host name, kernel, CPU model
    checks : tuple of Check
    backends : name -> {"usable": bool, "records": [...], "why": str}
    """

    host: dict[str, str | None]
    checks: tuple[Check, ...]
    backends: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def can_record(self) -> bool:
        """Say whether at least one back end works here."""
        return any(backend["usable"] for backend in self.backends.values())

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-serialisable dict."""
        return {
            "schema": SCHEMA,
            "host": self.host,
            "can_record": self.can_record,
            "backends": self.backends,
            "checks": [asdict(check) for check in self.checks],
        }


def diagnose() -> Diagnosis:
    """Look at this host and say what it can record."""
    tracefs = mounted()
    checks = (
        host_checks.check_kvm_device(),
        host_checks.check_hardware(),
        host_checks.check_privileges(),
        host_checks.check_lockdown(),
        host_checks.check_tracefs(tracefs),
        host_checks.check_tracepoints(tracefs),
        host_checks.check_entry_exit(tracefs),
        host_checks.check_kprobes(tracefs),
        host_checks.check_uprobes(tracefs),
        host_checks.check_bcc(),
        host_checks.check_headers(),
        host_checks.check_btf(),
        host_checks.check_mechanisms(),
    )
    states = {check.name: check for check in checks}
    return Diagnosis(host_facts(), checks, {"ftrace": _ftrace(states), "bpf": _bpf(states)})


def _ftrace(checks: dict[str, Check]) -> dict[str, Any]:
    """Say whether the ftrace back end works, and what it records."""
    blocked = [checks[name] for name in ("tracefs", "tracepoints") if checks[name].state == MISSING]
    if checks["lockdown"].found == "confidentiality":
        blocked.append(checks["lockdown"])
    if os.geteuid() != 0 and checks["tracefs"].state != OK:
        blocked.append(checks["privileges"])
    return _backend(blocked, ["tracepoints", *(["kprobes"] if checks["kprobes"].state == OK else [])])


def _bpf(checks: dict[str, Check]) -> dict[str, Any]:
    """Say whether the bpf back end works, and what it records."""
    blocked = [checks[name] for name in ("privileges", "tracepoints") if checks[name].state == MISSING]
    will_be_mounted = checks["tracefs"].state == OPTIONAL  # by `record` itself
    if not blocked and checks["tracepoints"].state != OK and not will_be_mounted:
        blocked.append(checks["tracepoints"])  # unknown: they cannot be read
    if checks["bcc"].state != OK:
        blocked.append(checks["bcc"])
    if checks["lockdown"].found == "confidentiality":
        blocked.append(checks["lockdown"])
    return _backend(blocked, ["tracepoints", "summary", *(["kprobes"] if checks["kprobes"].state == OK else [])])


def _backend(blocked: list[Check], records: list[str]) -> dict[str, Any]:
    why = "; ".join(f"{check.name}: {check.found}" for check in blocked)
    return {"usable": not blocked, "records": [] if blocked else records, "why": why}
