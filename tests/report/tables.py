"""Event tables written down row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.table.event_table import EventKind, EventTable
from kvmtrace.table.payload import ColumnPayload
from kvmtrace.table.recording import Capture, Loss, Recording

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FIELDS: dict[str, dict[str, type[np.generic]]] = {
    "kvm_entry": {"vcpu_id": np.uint32, "rip": np.uint64},
    "kvm_exit": {"exit_reason": np.uint32, "isa": np.uint32, "guest_rip": np.uint64, "vcpu_id": np.uint32},
    "kvm_userspace_exit": {"reason": np.uint32, "errno": np.int32},
    "kvm_fpu": {"load": np.uint32},
    "kvm_pio": {"rw": np.uint32, "port": np.uint32, "size": np.uint32},
    "kvm_mmio": {"type": np.uint32, "len": np.uint32, "gpa": np.uint64},
    "kvm_msr": {"write": np.uint32, "ecx": np.uint32, "exception": np.uint8},
    "kvm_cr": {"rw": np.uint32, "cr": np.uint32},
    "kvm_hypercall": {"nr": np.uint64},
    "kvm_page_fault": {"fault_address": np.uint64},
    "kvm_inj_virq": {"vector": np.uint32, "soft": np.bool_, "reinjected": np.bool_},
    "kvm_inj_exception": {"exception": np.uint8, "reinjected": np.bool_},
    "kvm_vcpu_wakeup": {"ns": np.uint64, "waited": np.bool_},
    "sys_enter_ioctl": {"fd": np.uint64, "cmd": np.uint64},
    "sys_exit_ioctl": {"ret": np.int64},
    "vmx_vcpu_run": {"vcpu": np.uint64},
    "vmx_vcpu_run_return": {"ret": np.int32},
    "svm_vcpu_run": {"vcpu": np.uint64},
    "svm_vcpu_run_return": {"ret": np.int32},
    "sched_switch": {"prev_pid": np.int32, "prev_state": np.int64, "next_pid": np.int32},
    "lost_events": {"count": np.int64},
}
KVM_RUN = 0xAE80
Row = tuple[Any, ...]  # (ts_ns, cpu, tid, kind, {field: value})


def make_table(rows: Sequence[Row], kinds: Sequence[str] | None = None) -> EventTable:
    """Make a table of rows (ts_ns, cpu, tid, kind, fields); missing fields are 0."""
    names = list(kinds) if kinds is not None else sorted({row[3] for row in rows})
    kind_list = [EventKind(name, "kvm", {f: np.dtype(d) for f, d in FIELDS[name].items()}) for name in names]
    payloads = {}
    for index, name in enumerate(names):
        own = [row[4] if len(row) > 4 else {} for row in rows if row[3] == name]
        if own:
            payloads[index] = ColumnPayload(
                {
                    field: np.array([values.get(field, 0) for values in own]).astype(dtype)
                    for field, dtype in FIELDS[name].items()
                }
            )
    columns = {
        "ts_ns": np.array([row[0] for row in rows], np.int64),
        "cpu": np.array([row[1] for row in rows], np.int16),
        "tid": np.array([row[2] for row in rows], np.int32),
        "kind": np.array([names.index(row[3]) for row in rows], np.uint16),
        "irq_flags": np.zeros(len(rows), np.uint8),
        "preempt_count": np.zeros(len(rows), np.uint8),
    }
    return EventTable(columns, kind_list, payloads)


class TableRecording(Recording):
    """A recording of a given table, handed out in pieces."""

    def __init__(self, table: EventTable, cuts: Sequence[int] = (), loss: Loss | None = None, **capture: Any) -> None:
        self.capture = Capture(**{"path": "test.dat", "format": "trace.dat", **capture})
        self.loss = loss or Loss()
        self.kinds = table.kinds
        self.comms = {}
        self.processes = {}
        self._table = table
        self._cuts = [0, *cuts, len(table)]

    def events(self) -> EventTable:
        return self._table

    def iter_events(self, max_events: int = 4_000_000) -> Iterator[EventTable]:
        for start, stop in zip(self._cuts[:-1], self._cuts[1:], strict=True):
            yield self._table.slice(start, stop)


def recording(
    rows: Sequence[Row], cuts: Sequence[int] = (), kinds: Sequence[str] | None = None, **capture: Any
) -> TableRecording:
    """Make a recording of rows."""
    return TableRecording(make_table(rows, kinds), cuts, **capture)


class Script:
    """Writes rows with a running clock: `script(10, "kvm_exit", exit_reason=12)` is 10 ns after the last."""

    def __init__(self, tid: int = 100, cpu: int = 0, start: int = 1_000_000) -> None:
        self.rows: list[Row] = []
        self.tid, self.cpu, self.now = tid, cpu, start

    def __call__(self, after_ns: int, kind: str, **fields: Any) -> Script:
        self.now += after_ns
        self.rows.append((self.now, self.cpu, self.tid, kind, fields))
        return self
