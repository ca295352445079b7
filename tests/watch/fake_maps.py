"""What SummaryPrograms would give, without KVM."""

from __future__ import annotations

import os
import subprocess
import threading
from typing import Any

from kvmtrace.capture.bpf.summary_maps import N_BUCKETS, PHASES

HLT, NPF = 0x78, 0x400  # of SVM


def cell(count: int, ns: int, **more: Any) -> dict[str, Any]:
    """Return a cell of `count` durations of `ns` each."""
    buckets = [0] * N_BUCKETS
    buckets[max(ns.bit_length() - 1, 0)] = count % (1 << 32)
    return {"count": count, "samples": count, "total_ns": count * ns, "max_ns": ns, "buckets": buckets, **more}


def vcpu(pid: int, tid: int, vcpu_id: int = 0, **exits: Any) -> dict[str, Any]:
    """Return a row; exits: name=cell."""
    return {
        "tid": tid, "pid": pid, "comm": "CPU 0/KVM", "vcpu_id": vcpu_id, "isa": "svm", "first_ns": 1,
        "wall_ns": 6_000_000_000, "time_ns": dict.fromkeys(PHASES, 1_000_000_000), "n_switches": 3,
        "guest": cell(5, 100), "exits": list(exits.values()),
        "userspace_exits": [cell(7, 5000, reason=2, error=None), cell(1, 9, reason=None, error="EINTR")],
    }  # fmt: skip


class FakePrograms:
    """Stands for SummaryPrograms."""

    max_threads = 16

    class attached:  # noqa: N801 (an attribute of the real one)
        """Stands for Attachments."""

        @staticmethod
        def misses() -> dict[str, int]:
            """Say that an event was missed twice."""
            return {"kvm_exit": 2}

    class Event:
        """Stands for TracedEvent."""

        name = "kvm_exit"

    events = (Event(),)

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        self.forgotten: list[int] = []

    def snapshot(self, now: int) -> list[dict[str, Any]]:
        """Return the rows."""
        assert now > 0
        return [{**row, "time_ns": dict(row["time_ns"])} for row in self.rows]

    def forget(self, tid: int) -> None:
        """Note who was forgotten, and have no row of it any more."""
        self.forgotten.append(tid)
        self.rows = [row for row in self.rows if row["tid"] != tid]


def own_vcpu(vcpu_id: int = 0, **exits: Any) -> dict[str, Any]:
    """Return the row of a thread that lives: this one."""
    return vcpu(os.getpid(), threading.get_native_id(), vcpu_id, **exits)


def ended_process() -> int:
    """Return the id of a process that has just ended."""
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    return process.pid
