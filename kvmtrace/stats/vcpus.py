"""The vCPU threads: who they are, and where their wall time went."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.spans.keys import Counter
from kvmtrace.spans.lanes import Step
from kvmtrace.spans.time_parts import PartSums
from kvmtrace.stats.rows import Budget, VcpuRow
from kvmtrace.table.distinct import distinct
from kvmtrace.table.vm_threads import processes_of, recorded_vms

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from kvmtrace.spans.lanes import Lanes
    from kvmtrace.spans.time_parts import Moves, Sweep
    from kvmtrace.table.event_table import EventTable
    from kvmtrace.table.recording import Recording

MAX_CPUS = 8192  # NR_CPUS of any distribution


class VcpuAccumulator:
    """Collects budgets, migrations and counts per vCPU thread over consecutive pieces of lanes."""

    def __init__(self) -> None:
        self._parts = PartSums()
        self._migrations = Counter()
        self._exits = Counter()
        self._userspace_exits = Counter()
        self._cpus: dict[int, set[int]] = {}

    def feed(self, lanes: Lanes, swept: Sweep, moves: Moves) -> None:
        """Take in the next piece."""
        thread = lanes.thread.astype(np.int32)
        self._parts.add(thread, swept.part, swept.dur_ns)
        self._parts.move(thread[moves.rows], moves.ns, moves.target)
        self._exits.add(thread[lanes.step == Step.EXIT])
        self._userspace_exits.add(thread[(lanes.step == Step.USERSPACE_EXIT) & ~lanes.opening])
        moved = lanes.same_thread() & (lanes.cpu[:-1] != lanes.cpu[1:]) & (lanes.cpu[1:] >= 0)
        self._migrations.add(thread[1:][moved & (lanes.cpu[:-1] >= 0)])
        changes = np.append(lanes.starts(), np.flatnonzero(moved) + 1)
        pairs = distinct(thread[changes] * MAX_CPUS + np.clip(lanes.cpu[changes], -1, MAX_CPUS - 1) + 1)
        for pair in pairs.tolist():
            number, cpu = divmod(pair, MAX_CPUS)
            if cpu:
                self._cpus.setdefault(number, set()).add(cpu - 1)

    def finish(self, tids: list[int], identities: Identities, can_tell: Mapping[str, bool]) -> tuple[VcpuRow, ...]:
        """Return the rows by (pid, vCPU id, tid).

        Parameters
        ----------
        tids : thread number -> tid
        can_tell : budget part -> whether this capture shows it
        """
        rows = []
        for number, tid in enumerate(tids):
            parts = self._parts.of(number)
            values = {f"{part.name.lower()}_ns": ns for part, ns in parts.items()}
            shown: dict[str, Any] = {
                name: ns if ns or can_tell.get(name, True) else None for name, ns in values.items()
            }
            rows.append(
                VcpuRow(
                    tid=tid,
                    pid=identities.pids.get(tid),
                    comm=identities.comms.get(tid),
                    vcpu_id=identities.vcpu_ids.get(tid),
                    wall_ns=sum(parts.values()),
                    budget=Budget(**shown),
                    migrations=self._migrations[number],
                    exits=self._exits[number],
                    userspace_exits=self._userspace_exits[number],
                    cpus=tuple(sorted(self._cpus.get(number, ()))),
                )
            )
        return tuple(sorted(rows, key=_order))


class Identities:
    """Which thread is which: vCPU id, process and name, from the events themselves."""

    def __init__(self) -> None:
        self.vcpu_ids: dict[int, int] = {}
        self.pids: dict[int, int] = {}
        self.comms: dict[int, str] = {}

    def feed(self, table: EventTable, tids: list[int]) -> None:
        """Take in a table; `tids` are the vCPU threads known so far."""
        unknown = [tid for tid in tids if tid not in self.vcpu_ids]
        for event in ("kvm_entry", "kvm_exit"):
            if unknown and table.count(event) and table.has(event, "vcpu_id"):
                event_tids = table.tid[table.rows(event)]
                ids = table.field(event, "vcpu_id")
                self.vcpu_ids |= _first_of_each(event_tids, ids, [t for t in unknown if t not in self.vcpu_ids])
        self._feed_comms(table, set(tids))

    def add_recorded(self, recording: Recording) -> None:
        """Add the names and processes that the recorder saved; names seen in events are newer."""
        threads = recording.capture.meta.get("threads") or {}
        self.pids = {**processes_of(recording), **self.pids}
        guest_run = recording.capture.meta.get("guest_run") or {}
        told = {int(tid): int(vcpu_id) for vcpu_id, tid in (guest_run.get("vcpu_tids") or {}).items()}
        noted = {int(tid): number for vm in recorded_vms(recording) for tid, number in (vm.get("vcpus") or {}).items()}
        self.vcpu_ids = {**noted, **told, **self.vcpu_ids}
        saved = {int(tid): str(comm) for tid, (_, comm) in threads.items()}
        self.comms = {**saved, **recording.comms, **self.comms}

    def _feed_comms(self, table: EventTable, tids: set[int]) -> None:
        """Keep each thread's latest name."""
        sources = (
            ("sched_switch", "prev_pid", "prev_comm"),
            ("sched_switch", "next_pid", "next_comm"),
            ("sched_process_fork", "child_pid", "child_comm"),
            ("task_rename", "pid", "newcomm"),
        )
        for event, pid_field, comm_field in sources:
            if table.count(event) and table.has(event, pid_field) and table.has(event, comm_field):
                pids = table.field(event, pid_field)
                wanted = np.array(sorted(tids if event == "task_rename" else tids - set(self.comms)), np.int64)
                self._names(table, event, comm_field, pids, wanted)

    def _names(
        self, table: EventTable, event: str, field: str, pids: NDArray[np.int64], wanted: NDArray[np.int64]
    ) -> None:
        rows = np.flatnonzero(np.isin(pids, wanted))
        if not len(rows):
            return
        _, last = np.unique(pids[rows][::-1], return_index=True)
        chosen = rows[len(rows) - 1 - last]
        names = table.field(event, field)[chosen]
        for tid, name in zip(pids[chosen].tolist(), names, strict=True):
            self.comms[int(tid)] = _text(name)


def with_ids(rows: tuple[VcpuRow, ...], bring_up: Any) -> tuple[VcpuRow, ...]:
    """Return the rows with the vCPU ids that only the VM's construction tells (KVM without kvm_entry)."""
    if bring_up is None:
        return rows
    ids = {tid: item.number for item in bring_up.objects if item.kind == "vcpu" for tid in item.run_tids}
    known = (replace(row, vcpu_id=row.vcpu_id if row.vcpu_id is not None else ids.get(row.tid)) for row in rows)
    return tuple(sorted(known, key=_order))


def _order(row: VcpuRow) -> tuple[int, int, int]:
    return row.pid or 0, row.vcpu_id if row.vcpu_id is not None else -1, row.tid


def _first_of_each(tids: NDArray[np.int32], values: NDArray[np.int64], wanted: list[int]) -> dict[int, int]:
    """Return tid -> its first value."""
    found = {}
    for tid in wanted:
        rows = np.flatnonzero(tids == tid)
        if len(rows):
            found[tid] = int(values[rows[0]])
    return found


def _text(value: object) -> str:
    """Return a comm field as text: bytes, a character array or str, up to its first NUL."""
    if isinstance(value, str):
        return value
    raw = value if isinstance(value, bytes) else np.asarray(value).tobytes()
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")
