"""What the summary maps hold, added up per VM, as counters that only grow: what the exporter exports.

Threads come and go while their VM lives, and the maps have room for so many: the counts of a thread that has ended are
kept here, and its entry is freed. A VM that has ended is kept for a while, so that its last counts are seen; then it is
dropped.
"""

from __future__ import annotations

import os
import time
from dataclasses import field
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.vm_identity import started_ticks
from kvmtrace.isa.registry import BY_NAME
from kvmtrace.kvm.userspace_exits import describe_userspace_exit_reason
from kvmtrace.kvm.vm_names import is_meant, vm_label
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.capture.running_vms import Vms
    from kvmtrace.capture.vm_identity import VmIdentity

    Key = tuple[str, str]  # (isa, reason) of a VM-exit, ("", reason) of a userspace exit

N_BUCKETS = 32
WRAPS_AT = 1 << 32  # buckets have 32 bits
WATCHED_FROM = 1 << 31  # a count from which on they are followed
OTHER = "other"
STATES = {
    "unknown": "unknown",
    "guest": "guest",
    "kernel": "kernel",
    "userspace": "vmm",
    "blocked": "blocked",
    "preempted": "preempted",
}


@dataclass
class Counts:
    """Of one kind of exit: how many, how long they took in all, and how many fell into each bucket of powers of two."""

    count: int = 0
    total_ns: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * N_BUCKETS)

    def add(self, other: Counts) -> None:
        """Add another's."""
        self.count += other.count
        self.total_ns += other.total_ns
        self.buckets = [a + b for a, b in zip(self.buckets, other.buckets, strict=True)]


@dataclass
class Totals:
    """What a VM (or one of its vCPUs) did: exits by key, time by state, time on a run queue."""

    exits: dict[Key, Counts] = field(default_factory=dict)
    userspace_exits: dict[Key, Counts] = field(default_factory=dict)
    time_ns: dict[str, int] = field(default_factory=dict)
    run_delay_ns: int = 0

    def add(self, other: Totals) -> None:
        """Add another's."""
        for own, its in ((self.exits, other.exits), (self.userspace_exits, other.userspace_exits)):
            for key, counts in its.items():
                own.setdefault(key, Counts()).add(counts)
        for state, ns in other.time_ns.items():
            self.time_ns[state] = self.time_ns.get(state, 0) + ns
        self.run_delay_ns += other.run_delay_ns


@dataclass
class CountedVm:
    """A process with vCPUs.

    Parameters
    ----------
    pid, started : process, and when it began (ticks), None if it was gone before that was read
    comm : name of its first vCPU thread
    live : tid -> (vCPU id, what it did)
    ended : vCPU id -> what threads did that have ended
    gone_at : time.monotonic() at which it was found gone
    """

    pid: int
    started: int | None
    comm: str
    identity: VmIdentity | None = None
    live: dict[int, tuple[int | None, Totals]] = field(default_factory=dict)
    ended: dict[int | None, Totals] = field(default_factory=dict)
    gone_at: float | None = None

    def by_vcpu(self) -> dict[int | None, Totals]:
        """Return vCPU id -> what it did."""
        found: dict[int | None, Totals] = {}
        for vcpu_id, totals in (*self.ended.items(), *self.live.values()):
            found.setdefault(vcpu_id, Totals()).add(totals)
        return found

    def all(self) -> Totals:
        """Return what all of its vCPUs did."""
        found = Totals()
        for totals in self.by_vcpu().values():
            found.add(totals)
        return found


class VmCounters:
    """Counters per VM.

    Parameters
    ----------
    snapshot, forget : of SummaryPrograms
    vms : who the VMs are
    wanted : only the VMs that this means (`--vm`), None for all
    linger_s : how long a VM that has ended is kept
    """

    def __init__(
        self,
        snapshot: Callable[[int], list[dict[str, Any]]],
        forget: Callable[[int], None],
        vms: Vms,
        *,
        wanted: str | None = None,
        linger_s: float = 60.0,
    ) -> None:
        self._snapshot, self._forget, self._vms = snapshot, forget, vms
        self._wanted, self._linger_s = wanted, linger_s
        self._known: dict[tuple[int, int | None], CountedVm] = {}
        self._wide: dict[tuple[int, Key, str], list[int]] = {}
        self.n_threads = 0

    def tick(self, *, force: bool = False) -> None:
        """Look at the VMs' names; read the maps where a thread has ended, or with `force`."""
        self._vms.look(force=force)
        ended = any(not _lives(vm.pid, tid) for vm in self._known.values() for tid in vm.live)
        if force or ended or any(vm.gone_at is not None for vm in self._known.values()):
            self.update()

    def update(self) -> None:
        """Read the maps, keep what ended threads counted, and drop VMs that are long gone."""
        rows = self._snapshot(time.monotonic_ns())
        self._name()
        for row in rows:
            self._take(row)
        self.n_threads = sum(len(vm.live) for vm in self._known.values())
        self._drop_gone()

    def vms(self) -> list[CountedVm]:
        """Return the VMs, those that have just ended included."""
        self._name()
        found = sorted(self._known.values(), key=lambda vm: (vm.pid, vm.started or 0))
        wanted = self._wanted
        return [
            vm
            for vm in found
            if wanted is None or (vm.identity and is_meant(wanted, vm.identity.name, vm.identity.uuid))
        ]

    def _name(self) -> None:
        """Give VMs their identity."""
        for identity in self._vms.rows():
            vm = self._known.get((identity.pid, identity.started_ticks)) or self._known.get((identity.pid, None))
            if vm is not None:
                vm.identity = identity

    def _take(self, row: dict[str, Any]) -> None:
        pid, tid = row["pid"], row["tid"]
        vm = self._vm_of(pid, row["comm"] or "")
        now = self._totals(row)
        before = vm.live.pop(tid, None)
        if before is not None:  # the entry was read while it changed: no counter goes back
            now.time_ns = {state: max(ns, before[1].time_ns.get(state, 0)) for state, ns in now.time_ns.items()}
            now.run_delay_ns = max(now.run_delay_ns, before[1].run_delay_ns)
        if _lives(pid, tid) and started_ticks(pid) == vm.started:
            vm.live[tid] = row["vcpu_id"], now
            return
        vm.ended.setdefault(row["vcpu_id"], Totals()).add(now)
        self._forget(tid)
        self._wide = {key: wide for key, wide in self._wide.items() if key[0] != tid}

    def _vm_of(self, pid: int, comm: str) -> CountedVm:
        """Return the VM of a process; of one that is gone the last that had this id."""
        started = started_ticks(pid)
        if (pid, started) in self._known:
            return self._known[pid, started]
        same = [vm for key, vm in self._known.items() if key[0] == pid]
        if started is None and same:
            return same[-1]
        vm = self._known[pid, started] = CountedVm(pid, started, comm)
        self._name()
        return vm

    def _totals(self, row: dict[str, Any]) -> Totals:
        isa = BY_NAME.get(row["isa"] or "")
        made = Totals(time_ns={STATES[phase]: ns for phase, ns in row["time_ns"].items()})
        for cell in row["exits"]:
            code = cell["exit_reason"]
            key = (row["isa"] or "unknown", isa.describe(code) if isa else f"{code:#x}")
            made.exits.setdefault(key, Counts()).add(self._counts(row["tid"], key, "exit", cell))
        for cell in row["userspace_exits"]:
            reason = cell["reason"]
            name = describe_userspace_exit_reason(reason) if reason is not None else cell["error"] or OTHER
            made.userspace_exits.setdefault(("", name), Counts()).add(
                self._counts(row["tid"], ("", name), "userspace", cell)
            )
        made.run_delay_ns = _run_delay_ns(row["pid"], row["tid"])
        return made

    def _counts(self, tid: int, key: Key, table: str, cell: dict[str, Any]) -> Counts:
        """Return a cell's counts, its buckets widened: the kernel's have 32 bits."""
        buckets = cell["buckets"]
        if cell["samples"] >= WATCHED_FROM:
            before = self._wide.get((tid, key, table), buckets)
            buckets = [old + (new - old) % WRAPS_AT for old, new in zip(before, buckets, strict=True)]
            self._wide[tid, key, table] = buckets
        return Counts(cell["count"], cell["total_ns"], list(buckets))

    def _drop_gone(self) -> None:
        now = time.monotonic()
        for key, vm in list(self._known.items()):
            if started_ticks(vm.pid) == vm.started and vm.started is not None:
                vm.gone_at = None
            elif vm.gone_at is None:
                vm.gone_at = now
            elif now - vm.gone_at > self._linger_s and not vm.live:
                del self._known[key]
                self._vms.forget(vm.pid, vm.started)


def labels_of(vms: list[CountedVm], most: int) -> dict[int, str]:
    """Return the place of each VM in the list -> what it is called; names differ, but for those beyond `most`.

    A VM whose name another one has, too, is told by its process as well.
    """
    names = []
    for vm in vms:
        identity = vm.identity
        name, kind = (identity.name, identity.kind) if identity else (None, None)
        label = vm_label(name, kind, (identity.comm if identity else None) or vm.comm, vm.pid)
        names.append("".join(char if char.isprintable() else "?" for char in label))
    labels = {}
    for place, (vm, name) in enumerate(zip(vms, names, strict=True)):
        label = name if names.count(name) == 1 else f"{name} ({vm.pid})"
        labels[place] = label if place < most else OTHER
    return labels


def _lives(pid: int, tid: int) -> bool:
    return os.path.exists(f"/proc/{pid}/task/{tid}")  # noqa: PTH110 (of every vCPU, every second)


def _run_delay_ns(pid: int, tid: int) -> int:
    """Return how long a thread has waited on run queues; 0 if it is gone.

    Source: Documentation/scheduler/sched-stats.rst, /proc/PID/schedstat
    """
    try:
        with open(f"/proc/{pid}/task/{tid}/schedstat", "rb") as file:  # noqa: PTH123
            words = file.read(100).split()
    except OSError:
        return 0
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
