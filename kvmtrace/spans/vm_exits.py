"""VM-exits as rows: each kvm_exit with the kvm_entry that ended it, what it was about and where its time went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.spans.keys import grown
from kvmtrace.spans.lane_keys import u64
from kvmtrace.spans.lanes import Step
from kvmtrace.spans.span_builder import SpanBuilder, iter_spans
from kvmtrace.spans.time_parts import EXIT_PARTS, N_PARTS, Part

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from kvmtrace.spans.span_builder import Spans
    from kvmtrace.table.event_table import EventTable

# fmt: off
EXIT_DTYPE = np.dtype([
    ("ts_ns", np.int64),  # of kvm_exit
    ("entry_ts_ns", np.int64),  # of the kvm_entry that followed; -1: none
    ("dur_ns", np.int64),  # entry_ts_ns - ts_ns; -1: unpaired, or the clock stepped back
    ("guest_before_ns", np.int64),  # from the kvm_entry before to kvm_exit; -1: unknown
    ("kernel_ns", np.int64),  # of dur_ns: in the kernel, entry and exit path included; -1: dur_ns is unknown or lost
    ("userspace_ns", np.int64),  # of dur_ns: in the VMM
    ("waiting_ns", np.int64),  # of dur_ns: blocked or halt-polling
    ("preempted_ns", np.int64),  # of dur_ns: switched out though runnable
    ("unknown_ns", np.int64),  # of dur_ns: not attributable
    ("tid", np.int32),
    ("vcpu_id", np.int64),  # -1: not recorded
    ("number", np.int64),  # of the thread's VM-exits, from 1: what `report --explain` takes
    ("level", np.uint8),  # of guest: 1, or 2 for a guest of the guest; 0: not known
    ("cpu", np.int16),  # of kvm_exit
    ("entry_cpu", np.int16),  # of kvm_entry; -1: none
    ("isa", np.uint8),  # Isa.number; 0: not recorded
    ("exit_reason", np.uint32),  # raw, flags included
    ("guest_rip", np.uint64),  # at the exit
    ("entry_rip", np.uint64),  # at the entry; has_entry_rip
    ("info1", np.uint64),
    ("info2", np.uint64),
    ("intr_info", np.uint32),
    ("error_code", np.uint32),
    # of the first such event before the next VM-entry; -1, or has_* false: there was none
    ("port", np.int64),  # kvm_pio
    ("msr", np.int64),  # kvm_msr
    ("cr", np.int64),  # kvm_cr
    ("vector", np.int64),  # kvm_inj_virq, kvm_inj_exception
    ("write", np.int8),  # the access to a port, MMIO, MSR or CR writes; -1: none of them
    ("size", np.int64),  # bytes of the port's or MMIO access
    ("data", np.uint64),  # value of the access; has_data
    ("gpa", np.uint64),  # kvm_mmio, else kvm_page_fault or kvm_guest_fault; has_gpa
    ("told", np.uint8),  # bit i: kvm_exit tells RECORDED_FIELDS[i]; of others the value means nothing
    ("has_entry_rip", np.bool_),
    ("has_data", np.bool_),
    ("has_gpa", np.bool_),
    ("syndrome", np.uint64),  # kvm_guest_fault, kvm_handle_sys_reg; has_syndrome
    ("has_syndrome", np.bool_),
    ("register", np.int64),  # kvm_handle_sys_reg
    ("hypercall", np.int64),  # kvm_hypercall; kvm_hvc_arm64: what W0 held
    ("userspace_reason", np.int64),  # of the first kvm_userspace_exit, KVM_EXIT_*
    ("errno", np.int64),  # of the same; 0 without one
    ("to_userspace", np.bool_),  # a kvm_userspace_exit of the thread lies between
    ("lost", np.bool_),  # events may have been lost between: the pair may be a wrong one
    ("row", np.int64),  # of kvm_exit in the recording
    ("entry_row", np.int64),  # of kvm_entry; -1: none
])
_ABSENT: tuple[str, ...] = (
    "entry_ts_ns", "dur_ns", "guest_before_ns", "kernel_ns", "userspace_ns", "waiting_ns", "preempted_ns",
    "unknown_ns", "vcpu_id", "entry_cpu", "port", "msr", "cr", "register", "hypercall", "vector", "write", "size",
    "userspace_reason", "entry_row",
)  # are -1 until something is known
RECORDED_FIELDS = ("isa", "exit_reason", "guest_rip", "info1", "info2", "intr_info", "error_code")
_FAULT_ADDRESS: dict[str, tuple[str, ...]] = {"gpa": ("fault_address", "address")}
# what an event says of the VM-exit that it belongs to: column -> its field
_ABOUT: tuple[tuple[Step, str, dict[str, tuple[str, ...]]], ...] = (
    (Step.PIO, "kvm_pio", {"port": ("port",), "write": ("rw",), "size": ("size",), "data": ("val",)}),
    (Step.MMIO_READ, "kvm_mmio", {"gpa": ("gpa",), "size": ("len",), "data": ("val",)}),
    (Step.MMIO_WRITE, "kvm_mmio", {"gpa": ("gpa",), "size": ("len",), "data": ("val",)}),
    (Step.MSR, "kvm_msr", {"msr": ("ecx",), "write": ("write",), "data": ("data",)}),
    (Step.CR, "kvm_cr", {"cr": ("cr",), "write": ("rw",), "data": ("val",)}),
    (Step.PAGE_FAULT, "kvm_page_fault", _FAULT_ADDRESS),
    (Step.GUEST_FAULT, "kvm_guest_fault", _FAULT_ADDRESS),
    (Step.GUEST_FAULT, "kvm_guest_fault", {"syndrome": ("hsr",)}),
    (Step.REGISTER, "kvm_handle_sys_reg", {"register": ("register",), "syndrome": ("hsr",)}),
    (Step.HYPERCALL, "kvm_hypercall", {"hypercall": ("nr",)}),
    (Step.CALL, "kvm_hvc_arm64", {"hypercall": ("r0",)}),
    (Step.USERSPACE_EXIT, "kvm_userspace_exit", {"userspace_reason": ("reason",), "errno": ("errno",)}),
)
# fmt: on


def told_fields(rows: NDArray[Any], name: str) -> NDArray[np.bool_]:
    """Say which rows tell a column that kvm_exit has as a field; other columns say so themselves: True."""
    if name not in RECORDED_FIELDS:
        return np.ones(len(rows), bool)
    told: NDArray[np.bool_] = rows["told"] >> np.uint8(RECORDED_FIELDS.index(name)) & np.uint8(1) != 0
    return told


class VmExitRows:
    """Makes the rows of consecutive pieces of spans, which must know their rows (SpanBuilder)."""

    def __init__(self) -> None:
        self._numbers = np.zeros(16, np.int64)  # per thread: VM-exits so far
        self._vcpu_ids = np.full(16, -1, np.int64)  # per thread: of its latest kvm_entry

    def feed(self, spans: Spans) -> NDArray[Any]:
        """Return the VM-exits of a piece, by row.

        Returns
        -------
        ndarray[EXIT_DTYPE]; of one thread consecutive, of several threads pieces may overlap in time
        """
        lanes, pairs = spans.lanes, spans.pairs
        exits = np.flatnonzero(pairs.is_exit & ~spans.told_later[pairs.edges])  # positions among the edges
        out = np.zeros(len(exits), EXIT_DTYPE)
        for name in _ABSENT:
            out[name] = -1
        at = pairs.edges[exits]  # lane rows
        assert lanes.row is not None
        out["row"], out["ts_ns"], out["cpu"] = lanes.row[at], lanes.ts_ns[at], lanes.cpu[at]
        out["tid"] = np.array(spans.tids, np.int32)[lanes.thread[at]]
        out["level"] = spans.levels[exits]
        self._fill_recorded(spans, out, at)
        _fill_pairs(spans, out, exits)
        self._fill_vcpu(spans, out, exits)
        self._fill_numbers(lanes.thread[at], out)
        number = np.full(len(lanes) + 1, -1, np.int64)  # of each lane row: its exit in `out`; the last: none
        number[at] = np.arange(len(exits))
        owner = number[pairs.owner]
        _fill_parts(spans, out, owner)
        _fill_accesses(spans, out, owner)
        return out[np.argsort(out["row"], kind="stable")]

    @staticmethod
    def _fill_recorded(spans: Spans, out: NDArray[Any], at: NDArray[np.intp]) -> None:
        """Fill in what kvm_exit itself says."""
        table = spans.table
        assert table is not None
        own = table.position_in_kind[spans.table_rows(at)]
        for i, name in enumerate(RECORDED_FIELDS):
            if table.has("kvm_exit", name):
                out[name] = table.field("kvm_exit", name)[own]
                told = table.told("kvm_exit", name)
                out["told"] |= np.uint8(1 << i) if told is None else told[own].astype(np.uint8) << np.uint8(i)
        if table.has("kvm_exit", "vcpu_id"):
            told = table.told("kvm_exit", "vcpu_id")
            ids = table.field("kvm_exit", "vcpu_id")[own].astype(np.int64)
            out["vcpu_id"] = ids if told is None else np.where(told[own], ids, -1)

    def _fill_vcpu(self, spans: Spans, out: NDArray[Any], exits: NDArray[np.intp]) -> None:
        """Fill in vcpu_id where kvm_exit lacks it: of the entry before, or else of the one behind."""
        table, pairs = spans.table, spans.pairs
        assert table is not None
        if table.has("kvm_exit", "vcpu_id") or not table.has("kvm_entry", "vcpu_id"):
            return
        ids = np.full(len(pairs.edges), -1, np.int64)
        entries = np.flatnonzero(~pairs.is_exit)
        own = table.position_in_kind[spans.table_rows(pairs.edges[entries])]
        ids[entries] = table.field("kvm_entry", "vcpu_id")[own]
        behind = np.append(pairs.handling, False)[exits]
        out["vcpu_id"][behind] = ids[exits[behind] + 1]
        before = np.append(False, pairs.guest)[exits]
        out["vcpu_id"][before] = ids[exits[before] - 1]

    def _fill_numbers(self, thread: NDArray[np.uint16], out: NDArray[Any]) -> None:
        """Fill in which VM-exit of its thread each is."""
        if not len(thread):
            return
        counts = np.bincount(thread)
        self._numbers = grown(self._numbers, len(counts))
        first = np.concatenate([[0], np.cumsum(counts)[:-1]])  # lanes are sorted by thread
        out["number"] = np.arange(len(thread)) - first[thread] + self._numbers[thread] + 1
        self._numbers[: len(counts)] += counts


def _fill_pairs(spans: Spans, out: NDArray[Any], exits: NDArray[np.intp]) -> None:
    """Fill in what the entries before and behind tell."""
    lanes, pairs, table = spans.lanes, spans.pairs, spans.table
    assert table is not None
    assert lanes.row is not None
    thread = lanes.thread[pairs.edges]
    handled = np.append(pairs.handling, False)[exits]
    entry = pairs.edges[exits[handled] + 1]
    out["entry_row"][handled], out["entry_cpu"][handled] = lanes.row[entry], lanes.cpu[entry]
    out["entry_ts_ns"][handled] = lanes.ts_ns[entry]
    out["dur_ns"][handled] = np.maximum(pairs.dur_ns[exits[handled]], -1)
    if table.has("kvm_entry", "rip"):
        own = table.position_in_kind[spans.table_rows(entry)]
        out["entry_rip"][handled] = table.field("kvm_entry", "rip")[own]
        told = table.told("kvm_entry", "rip")
        out["has_entry_rip"][handled] = True if told is None else told[own]
    n_suspect = np.concatenate([[0], np.cumsum(lanes.suspect)])
    # an exit's span ends with the thread's next entry or exit, or with the thread
    stops = np.append(lanes.starts()[1:], len(lanes))[np.searchsorted(lanes.starts(), pairs.edges, "right") - 1]
    inner = thread[:-1] == thread[1:]
    stops[:-1][inner] = pairs.edges[1:][inner]
    out["lost"] = n_suspect[stops[exits]] != n_suspect[pairs.edges[exits]]
    guest = np.append(False, pairs.guest & pairs.sound)[exits]
    out["guest_before_ns"][guest] = pairs.dur_ns[exits[guest] - 1]


def _fill_parts(spans: Spans, out: NDArray[Any], owner: NDArray[np.int64]) -> None:
    """Fill in where the time of the sound pairs went."""
    sound = (out["dur_ns"] >= 0) & ~out["lost"]
    mine = np.flatnonzero(owner >= 0)
    mine = mine[sound[owner[mine]]]
    cells = owner[mine] * N_PARTS + spans.swept.part[mine]
    sums = np.bincount(cells, spans.swept.dur_ns[mine], minlength=len(out) * N_PARTS).astype(np.int64)
    moves = spans.moves
    moved = owner[moves.rows] >= 0
    moved[moved] = sound[owner[moves.rows[moved]]]
    groups = owner[moves.rows[moved]] * N_PARTS
    np.add.at(sums, groups + moves.target[moved], moves.ns[moved])
    np.subtract.at(sums, groups + Part.HANDLER, moves.ns[moved])
    parts = sums.reshape(-1, N_PARTS)
    for name, of in EXIT_PARTS.items():
        if spans.recorded.tells(name):
            out[name][sound] = parts[sound][:, list(of)].sum(axis=1)


def _fill_accesses(spans: Spans, out: NDArray[Any], owner: NDArray[np.int64]) -> None:
    """Fill in what the events behind each exit say of it; the first of a kind counts."""
    table, step = spans.table, spans.lanes.step
    assert table is not None
    for which, event, columns in _ABOUT:
        rows = np.flatnonzero((step == which) & (owner >= 0))
        rows = rows[np.append(True, owner[rows][1:] != owner[rows][:-1])] if len(rows) else rows
        if columns is _FAULT_ADDRESS:  # the access itself tells more
            rows = rows[~out["has_gpa"][owner[rows]]]
        if not len(rows):
            continue
        exits, own = owner[rows], table.position_in_kind[spans.table_rows(rows)]
        for column, names in columns.items():
            name = next((name for name in names if table.has(event, name)), None)
            if name is not None:
                told = table.told(event, name)
                known = slice(None) if told is None else told[own]
                out[column][exits[known]] = table.field(event, name)[own[known]]
                if column in ("gpa", "data", "syndrome"):
                    out[f"has_{column}"][exits[known]] = True
        if event == "kvm_mmio":
            out["write"][exits] = which == Step.MMIO_WRITE
        if which == Step.REGISTER:
            out["write"][exits] = table.field(event, "is_read")[own] == 0
        if which == Step.CALL:
            out["hypercall"][exits] &= 0xFFFFFFFF
        if which == Step.USERSPACE_EXIT:
            out["to_userspace"][exits] = True
    _fill_vectors(spans, out, owner)


def _fill_vectors(spans: Spans, out: NDArray[Any], owner: NDArray[np.int64]) -> None:
    """Fill in the first vector that was injected before the next VM-entry."""
    table = spans.table
    assert table is not None
    rows = np.flatnonzero((spans.lanes.step == Step.INJECT) & (owner >= 0))
    rows = rows[np.append(True, owner[rows][1:] != owner[rows][:-1])] if len(rows) else rows
    at = spans.table_rows(rows)
    for event, names in (("kvm_inj_virq", ("vector", "irq")), ("kvm_inj_exception", ("exception",))):
        name = next((name for name in names if table.has(event, name)), None)
        if name is not None:
            own = table.kind[at] == table.kind_index[event]
            values = u64(table, event, name).astype(np.int64)
            out["vector"][owner[rows[own]]] = values[table.position_in_kind[at[own]]] & 0xFF


def collect_vm_exits(tables: Iterable[EventTable]) -> NDArray[Any]:
    """Return every VM-exit of a recording, in recorded order.

    An exit that another exit follows is unpaired, as is a thread's last one.

    Parameters
    ----------
    tables : consecutive event tables

    Returns
    -------
    ndarray[EXIT_DTYPE], shape (n_exits,); fields that were not recorded are 0, or -1 where the dtype says so
    """
    made = VmExitRows()
    parts = [made.feed(spans) for spans in iter_spans(tables, SpanBuilder(rows=True))]
    found = np.concatenate([np.empty(0, EXIT_DTYPE), *parts])
    return found if (np.diff(found["row"]) > 0).all() else found[np.argsort(found["row"], kind="stable")]
