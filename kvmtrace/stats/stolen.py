"""Who had the CPU while vCPUs waited for one, per VM: other VMs, vhost, kernel threads, the host's processes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.kvm.vm_names import vm_label
from kvmtrace.spans.cpu_waits import IDLE, NOBODY_KNOWS, CpuWaits, Stolen, Waited, quantile_of
from kvmtrace.stats.rows import StolenRow, WakeUpRow
from kvmtrace.table.vm_threads import names_of_processes, processes_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Recording

MOST_ROWS = 256
_VHOST = re.compile(r"vhost-(\d+)")
# what the kernel calls threads of its own; kworker/0:1-events and the like are one
_KERNEL = re.compile(
    r"(kworker|ksoftirqd|migration|rcu_\w+|rcuo\w|rcuop|rcuos|kcompactd\d*|kswapd\d*|khugepaged|irq|cpuhp|watchdog\w*|jbd2|"
    r"kthreadd|idle_inject|ktimers|kvm-nx-lpage-re|kvm-pit)(/|-|:|\b)"
)


class StolenAccumulator:
    """Collects over consecutive tables; needs to know which threads are vCPUs, and their ids."""

    def __init__(self) -> None:
        self._waits = CpuWaits()

    def feed(self, table: EventTable, tids: list[int], vcpu_ids: Mapping[int, int]) -> None:
        """Take in the next table."""
        ids = list(vcpu_ids.values())
        apics = {number: tid for tid, number in vcpu_ids.items() if ids.count(number) == 1}
        self._waits.feed(table, tids, apics)

    def finish(
        self, recording: Recording, vcpu_pids: Mapping[int, int | None]
    ) -> tuple[tuple[StolenRow, ...], tuple[WakeUpRow, ...]]:
        """Return who ran instead, longest first, and how long wake-ups took.

        Parameters
        ----------
        vcpu_pids : tid of each vCPU thread -> its process
        """
        names = _Names(recording, vcpu_pids, self._waits.comms)
        groups: dict[tuple[int | None, str, str, int | None], Stolen] = {}
        for (tid, thief), one in self._waits.stolen.items():
            pid = vcpu_pids.get(tid)
            group = groups.setdefault((pid, *names.of(thief, pid)), Stolen())
            group.ns += one.ns
            group.count += one.count
            group.longest_ns = max(group.longest_ns, one.longest_ns)
        rows = [
            StolenRow(pid, names.vm(pid), kind, who, by_pid, one.ns, one.count, one.longest_ns)
            for (pid, kind, who, by_pid), one in groups.items()
        ]
        rows.sort(key=lambda row: (-row.total_ns, row.pid or 0, row.kind, row.who))
        return tuple(rows[:MOST_ROWS]), self._wake_ups(names, vcpu_pids)

    def _wake_ups(self, names: _Names, vcpu_pids: Mapping[int, int | None]) -> tuple[WakeUpRow, ...]:
        by_pid: dict[int | None, list[Waited]] = {}
        for tid, own in self._waits.waited.items():
            if own.to_entry.any():
                by_pid.setdefault(vcpu_pids.get(tid), []).append(own)
        rows = []
        for pid, waited in by_pid.items():
            buckets = sum((own.to_entry for own in waited), np.zeros(1, np.int64))
            rows.append(
                WakeUpRow(
                    pid, names.vm(pid), int(buckets.sum()), sum(own.to_entry_ns for own in waited),
                    quantile_of(buckets, 0.5), quantile_of(buckets, 0.99),
                    max(own.to_entry_max_ns for own in waited), sum(own.to_cpu_ns for own in waited),
                )
            )  # fmt: skip
        return tuple(sorted(rows, key=lambda row: (-row.total_ns, row.pid or 0)))


class _Names:
    """Says what a thread is, seen from a VM that waits."""

    def __init__(self, recording: Recording, vcpu_pids: Mapping[int, int | None], comms: dict[int, str]) -> None:
        self._vcpu_pids = vcpu_pids
        self._pids = processes_of(recording)
        self._vm_names = names_of_processes(recording)
        self._comms = {**recording.comms, **comms}

    def vm(self, pid: int | None) -> str | None:
        """Return the name of a process's VM."""
        return self._vm_names.get(pid) if pid is not None else None

    def of(self, tid: int, victim: int | None) -> tuple[str, str, int | None]:
        """Return (kind, what it is called, its VM's process) of a thread that ran while a VM waited."""
        if tid == NOBODY_KNOWS:
            return "unknown", "not recorded", None
        if tid == IDLE:
            return "idle", "nobody: the CPU was idle", None
        if tid in self._vcpu_pids:
            pid = self._vcpu_pids[tid]
            own = pid is not None and pid == victim
            return "own vcpu" if own else "vcpu", vm_label(self.vm(pid), None, None, pid), pid
        return self._of_host(tid, self._comms.get(tid) or f"thread {tid}", victim)

    def _of_host(self, tid: int, comm: str, victim: int | None) -> tuple[str, str, int | None]:
        """Return the same of a thread that is no vCPU."""
        if match := _VHOST.match(comm):
            owner = int(match[1])
            return "vhost", f"vhost of {vm_label(self.vm(owner), None, None, owner)}", owner
        if match := _KERNEL.match(comm):
            return "kernel", match[1], None
        pid = self._pids.get(tid)
        if pid is not None and (pid == victim or pid in self._vm_names):
            return "vmm", f"{vm_label(self.vm(pid), None, None, pid)}: {comm}", pid
        return "process", comm, None
