"""The recorded side of an alignment: one vCPU thread's events, and which of them are asynchronous.

Asynchronous is what the host or another vCPU causes at a moment that no listing tells: interrupts of the host,
timers, preemption, signals, interrupt windows, injections that were cancelled and repeated. They are marked
with the reason before the prediction is looked at, so that they are never mistaken for differences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.isa.registry import BY_NUMBER, run_functions
from kvmtrace.isa.words import INTR_TYPE_NMI, decode_intr_info
from kvmtrace.kvm.ioctls import KVM_RUN
from kvmtrace.table.event_table import TRACE_FLAG_HARDIRQ

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable

EINTR = 4
_IOCTL_EVENTS = {"sys_enter_ioctl": "sys_exit_ioctl", "kvm_vcpu_ioctl": "kvm_vcpu_ioctl_return"}
_AROUND_RUN = frozenset(_IOCTL_EVENTS) | frozenset(_IOCTL_EVENTS.values())
_RUN_ENTRY = frozenset(run_functions())
_RUN_RETURN = frozenset(run_functions("_return"))
# fields shown of an event that was not predicted
_SHOWN: dict[str, tuple[str, ...]] = {
    "kvm_exit": ("exit_reason", "guest_rip", "info1", "info2"),
    "kvm_entry": ("rip",),
    "kvm_pio": ("rw", "port", "size", "count", "val"),
    "kvm_mmio": ("type", "len", "gpa", "val"),
    "kvm_msr": ("write", "ecx", "data", "exception"),
    "kvm_page_fault": ("guest_rip", "fault_address", "error_code"),
    "kvm_userspace_exit": ("reason", "errno"),
    "kvm_fpu": ("load",),
    "kvm_emulate_insn": ("rip", "len"),
    "kvm_inj_virq": ("vector", "reinjected"),
    "kvm_inj_exception": ("exception", "reinjected"),
    "kvm_apic_accept_irq": ("apicid", "vec"),
    "kvm_eoi": ("apicid", "vector"),
    "kvm_cpuid": ("function", "index"),
    "kvm_vcpu_wakeup": ("ns", "waited"),
    "sys_exit_ioctl": ("ret",),
    "kvm_apic": ("rw", "reg", "val"),
    "kvm_guest_fault": ("vcpu_pc", "hsr", "hxfar", "ipa"),
    "kvm_handle_sys_reg": ("hsr",),
    "kvm_sys_access": ("vcpu_pc", "is_write", "Op0", "Op1", "CRn", "CRm", "Op2"),
    "kvm_wfx_arm64": ("vcpu_pc", "is_wfe"),
    "kvm_hvc_arm64": ("vcpu_pc", "r0", "imm"),
    "kvm_nested_vmenter": ("rip", "nested_rip", "event_inj"),
    "kvm_nested_vmexit": ("exit_reason", "guest_rip"),
    "kvm_nested_vmexit_inject": ("exit_code",),
}


class Observed:
    """One recorded event of the thread.

    Attributes
    ----------
    row : int, of the event table
    event : str
    asynchronous : str, why it is no step of the guest's own; "" if it may be
    """

    __slots__ = ("_columns", "_position", "asynchronous", "event", "row", "ts_ns")

    def __init__(self, columns: _Columns, position: int, row: int, ts_ns: int, event: str) -> None:
        self._columns = columns
        self._position = position
        self.row = row
        self.ts_ns = ts_ns
        self.event = event
        self.asynchronous = ""

    def get(self, name: str) -> Any:
        """Return a field; None if the recording does not have it."""
        column = self._columns[name]
        return None if column is None else column[self._position]

    def number(self, name: str) -> int:
        """Return an integer field, -1 if the recording does not have it."""
        value = self.get(name)
        return -1 if value is None else int(value)

    def describe(self, names: tuple[str, ...] = ()) -> str:
        """Return the event with these fields, or with those worth showing."""
        shown = [(name, self.get(name)) for name in names or _SHOWN.get(self.event, ())]
        return " ".join([self.event, *(f"{name}={show_value(value)}" for name, value in shown if value is not None)])


def show_value(value: Any) -> str:
    """Return a field's value: bytes in hexadecimal, numbers above 9 too."""
    if isinstance(value, bytes):
        return value.hex(" ")
    number = int(value)
    return str(number) if -10 < number < 10 else f"{number:#x}"


class _Columns(dict[str, "list[Any] | None"]):
    """The fields of a kind's events as Python values, each made when somebody asks for it; None for what is none."""

    def __init__(self, table: EventTable, event: str) -> None:
        self._table, self._event = table, event

    def __missing__(self, name: str) -> list[Any] | None:
        there = self._table.has(self._event, name)
        self[name] = _as_list(self._table.field(self._event, name)) if there else None
        return self[name]


def _as_list(column: NDArray[Any]) -> list[Any]:
    """Return a column as Python values: quicker to look at one by one."""
    return [bytes(row) for row in column] if column.ndim > 1 else list(column.tolist())


def observe(table: EventTable, tid: int, events: frozenset[str]) -> list[Observed]:
    """Return the thread's events of these kinds, in order, asynchronous ones marked.

    Events traced in interrupt context are left out: they belong to whatever interrupted the thread. Of the
    ioctls only KVM_RUN is kept.
    """
    mine = (table.tid == tid) & (table.irq_flags & TRACE_FLAG_HARDIRQ == 0)
    found: list[Observed] = []
    for name in sorted(events):
        own = table.rows(name)
        if not len(own):
            continue
        columns, positions = _Columns(table, name), np.flatnonzero(mine[own])
        rows = own[positions]
        places = zip(positions.tolist(), rows.tolist(), table.ts_ns[rows].tolist(), strict=True)
        found += [Observed(columns, position, row, ts_ns, name) for position, row, ts_ns in places]
    found.sort(key=lambda item: item.row)
    found = list(_only_kvm_run(found))
    _mark_signals(found)
    _mark_world_switches(found)
    _mark_injections(found)
    return found


def _only_kvm_run(items: list[Observed]) -> Iterator[Observed]:
    """Drop other ioctls, and everything of the thread before its first KVM_RUN."""
    running: dict[str, bool] = {}
    for item in items:
        if item.event in _IOCTL_EVENTS:
            running[_IOCTL_EVENTS[item.event]] = item.number("cmd") == KVM_RUN
            if item.number("cmd") != KVM_RUN:
                continue
        elif item.event in _IOCTL_EVENTS.values() and not running.get(item.event, False):
            continue
        yield item


def is_asynchronous_exit(item: Observed) -> bool:
    """Say whether a kvm_exit has nothing to do with the guest's instructions."""
    isa = BY_NUMBER.get(item.number("isa"))
    if isa is None:
        return False
    code = isa.code(item.number("exit_reason"))
    if isa.exit_intr_info and code in isa.codes("exception"):
        return bool(decode_intr_info(item.number("intr_info")).type == INTR_TYPE_NMI)
    return code in isa.codes("host")


def _mark_signals(items: list[Observed]) -> None:
    """Mark returns with -EINTR and the call that follows: from unloading the FPU to loading it again."""
    for index, item in enumerate(items):
        if item.event != "kvm_userspace_exit" or item.number("errno") & 0xFFFFFFFF != -EINTR & 0xFFFFFFFF:
            continue
        start, end = _call_around(items, index)
        for inside in items[start : end + 1]:
            inside.asynchronous = "a signal: KVM_RUN was left and called again"


def _call_around(items: list[Observed], index: int) -> tuple[int, int]:
    """Return the first and last event between one KVM_RUN's end and the next one's begin."""
    last = len(items) - 1
    if any(item.event == "kvm_fpu" for item in items):
        start = next((n for n in range(index, -1, -1) if items[n].event == "kvm_fpu"), 0)
        end = next((n for n in range(index + 1, last + 1) if items[n].event == "kvm_fpu"), last)
        return start, end
    end = index
    while end < last and items[end + 1].event in _AROUND_RUN:
        end += 1
    return index, end


def _mark_world_switches(items: list[Observed]) -> None:
    """Mark asynchronous VM-exits, each with one of its neighbouring VM-entries.

    Usually that is the entry behind it: the guest goes on where it was. If an interrupt was injected between,
    that entry is the guest's own next step, and the entry before the exit led nowhere.
    """
    for index, item in enumerate(items):
        if item.event != "kvm_exit" or not is_asynchronous_exit(item):
            continue
        item.asynchronous = "a VM-exit that the host caused"
        injected = False
        for follower in items[index + 1 :]:
            if follower.event == "kvm_entry":
                break
            injected |= follower.event == "kvm_inj_virq" and not follower.number("reinjected") > 0
        step = -1 if injected else 1
        _mark_nested(items, index)
        _mark_entry(items, index, step)
        _mark_probes(items, index, _RUN_RETURN)


def _mark_nested(items: list[Observed], exit_index: int) -> None:
    """Mark what says that it was a guest's guest that left, if it stands behind the exit."""
    for item in items[exit_index + 1 : exit_index + 3]:
        if item.event == "kvm_nested_vmexit":
            item.asynchronous = items[exit_index].asynchronous
            return
        if item.event not in _RUN_RETURN:
            return


def _mark_entry(items: list[Observed], exit_index: int, step: int) -> None:
    index = exit_index + step
    while 0 <= index < len(items):
        if items[index].event == "kvm_entry" and not items[index].asynchronous:
            items[index].asynchronous = "goes with the asynchronous VM-exit"
            _mark_probes(items, index, _RUN_ENTRY)
            return
        index += step


def _mark_probes(items: list[Observed], index: int, names: frozenset[str]) -> None:
    """Mark the run function's probe beside an asynchronous entry or exit."""
    for beside in (index - 1, index + 1):
        if 0 <= beside < len(items) and items[beside].event in names and not items[beside].asynchronous:
            items[beside].asynchronous = items[index].asynchronous
            return


def _mark_injections(items: list[Observed]) -> None:
    """Mark one of an injection and its repetition: the one that is not beside the guest's own VM-entry."""
    earlier: Observed | None = None
    entered = False
    for item in items:
        if item.asynchronous:
            continue
        if item.event in {"kvm_inj_virq", "kvm_inj_exception"}:
            if earlier is not None and earlier.event == item.event and item.number("reinjected") > 0:
                if entered:
                    item.asynchronous = "the host interrupted the delivery; injected again"
                    continue
                earlier.asynchronous = "an injection that was cancelled and repeated"
            earlier, entered = item, False
        elif item.event == "kvm_entry":
            entered = True
        elif item.event == "kvm_exit":
            earlier = None
