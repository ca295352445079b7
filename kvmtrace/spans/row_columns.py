"""The rows of VM-exits and userspace exits as columns for frames and files: named, absent where nothing is known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.isa.registry import BY_NUMBER, describe_exit_reason, describe_register, describe_syndrome
from kvmtrace.kvm.nested_events import UNKNOWN_LEVEL
from kvmtrace.kvm.userspace_exits import describe_userspace_exit
from kvmtrace.spans.lane_keys import NOT_TOLD
from kvmtrace.spans.vm_exits import RECORDED_FIELDS, told_fields
from kvmtrace.table.columns import RowColumn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from kvmtrace.spans.lane_keys import LaneKeys

ACCESS = ("read", "write")
# columns in this order; "?": absent where negative; else the column that says that it is there
# fmt: off
_VM_EXIT_COLUMNS: dict[str, str] = {
    "ts_ns": "", "name": "", "dur_ns": "?", "guest_before_ns": "?", "tid": "", "vm": "", "vcpu_id": "?", "number": "",
    "cpu": "", "level": "", "isa": "", "exit_reason": "", "guest_rip": "", "entry_rip": "has_entry_rip", "info1": "",
    "info2": "",
    "intr_info": "", "error_code": "", "port": "?", "gpa": "has_gpa", "msr": "?", "cr": "?",
    "register": "", "hypercall": "?", "syndrome": "has_syndrome", "cause": "", "access": "", "size": "?",
    "data": "has_data", "vector": "?", "userspace_reason": "?", "userspace_exit": "",
    "errno": "to_userspace", "kernel_ns": "?", "userspace_ns": "?", "waiting_ns": "?", "preempted_ns": "?",
    "unknown_ns": "?", "to_userspace": "", "lost": "",
    "entry_ts_ns": "?", "entry_cpu": "?", "row": "", "entry_row": "?",
}
_NESTED_COLUMNS = (
    "tid", "number", "reflected", "complete", "l1_exits", "dur_ns", "l0_ns", "l1_guest_ns", "userspace_ns",
    "waiting_ns", "preempted_ns", "unknown_ns",
)
_USERSPACE_COLUMNS: dict[str, str] = {
    "ts_ns": "", "name": "", "reason": "", "errno": "", "tid": "", "vm": "", "cpu": "", "dur_ns": "?", "lost": "",
    "row": "",
}
# fmt: on


def _described(codes: NDArray[np.int64], describe: Callable[[int], str], absent: Any = None) -> RowColumn:
    """Return a column of texts, each made once; several codes may have one text."""
    if absent is not None and absent.any():
        codes = np.where(absent, codes[np.argmin(absent)], codes)  # what is absent needs no text
        if absent.all():
            return RowColumn(np.zeros(len(codes), np.int32), absent, ())
    values, inverse = np.unique(codes, return_inverse=True)
    texts: dict[str, int] = {}
    numbers = [texts.setdefault(describe(int(value)), len(texts)) for value in values.tolist()]
    return RowColumn(np.array(numbers, np.int32)[inverse.reshape(-1)], absent, tuple(texts))


def _signed(low: int) -> int:
    return (low & 0xFFFFFFFF ^ 1 << 31) - (1 << 31)


def _column(rows: NDArray[Any], name: str, rule: str) -> RowColumn:
    values = np.ascontiguousarray(rows[name])
    if not rule:
        return RowColumn(values)
    absent = values < 0 if rule == "?" else ~rows[rule]
    return RowColumn(np.where(absent, 0, values).astype(values.dtype), absent)


def _vm_column(rows: NDArray[Any], names: Mapping[int, str]) -> RowColumn:
    """Return the names of the rows' VMs, absent where none is known."""
    tids = rows["tid"].astype(np.int64)
    named = np.isin(tids, np.array(sorted(names), np.int64))
    return _described(tids, lambda tid: names.get(tid, ""), ~named)


def vm_exit_columns(rows: NDArray[Any], names: Mapping[int, str]) -> dict[str, RowColumn]:
    """Return the columns of VM-exits.

    Parameters
    ----------
    rows : ndarray[EXIT_DTYPE]
    names : tid -> name of its VM
    """
    code = rows["isa"].astype(np.int64) << 32 | rows["exit_reason"].astype(np.int64)
    left = rows["userspace_reason"] << 32 | (rows["errno"] & 0xFFFFFFFF)
    isas = {number: isa.name for number, isa in BY_NUMBER.items()}
    made = {
        "name": _described(code, lambda value: describe_exit_reason(value >> 32, value & 0xFFFFFFFF)),
        "isa": _described(rows["isa"].astype(np.int64), lambda number: isas.get(number, "unknown")),
        "vm": _vm_column(rows, names),
        "level": RowColumn(np.ascontiguousarray(rows["level"]), rows["level"] == UNKNOWN_LEVEL),
        "register": _described(rows["register"], describe_register, rows["register"] < 0),
        "cause": _described(rows["syndrome"].astype(np.int64), describe_syndrome, ~rows["has_syndrome"]),
        "access": RowColumn(np.maximum(rows["write"], 0).astype(np.int32), rows["write"] < 0, ACCESS),
        "userspace_exit": _described(
            left, lambda value: describe_userspace_exit(value >> 32, _signed(value)), ~rows["to_userspace"]
        ),
    }
    for name in RECORDED_FIELDS:
        if name != "isa":  # it has a name of its own where it is not known
            made[name] = RowColumn(np.ascontiguousarray(rows[name]), ~told_fields(rows, name))
    return {name: made.get(name) or _column(rows, name, rule) for name, rule in _VM_EXIT_COLUMNS.items()}


def userspace_columns(rows: NDArray[Any], names: Mapping[int, str]) -> dict[str, RowColumn]:
    """Return the columns of userspace exits.

    Parameters
    ----------
    rows : ndarray[USERSPACE_DTYPE]
    names : tid -> name of its VM
    """
    code = rows["reason"] << 32 | (rows["errno"] & 0xFFFFFFFF)
    made = {
        "name": _described(code, lambda value: describe_userspace_exit(value >> 32, _signed(value))),
        "vm": _vm_column(rows, names),
    }
    return {name: made.get(name) or _column(rows, name, rule) for name, rule in _USERSPACE_COLUMNS.items()}


def nested_columns(rows: NDArray[Any], keys: LaneKeys) -> dict[str, RowColumn]:
    """Return the columns of VM-exits of nested guests.

    Parameters
    ----------
    rows : ndarray[CHAIN_DTYPE]
    keys : what their numbers stand for
    """
    code = np.array([*keys.reasons.keys(), 0], np.uint64)[rows["reason"]]
    rip = np.array([*keys.rips.keys(), 0], np.uint64)[rows["rip"]]
    isas = {number: isa.name for number, isa in BY_NUMBER.items()}
    plain = {name: RowColumn(np.ascontiguousarray(rows[name])) for name in _NESTED_COLUMNS}
    return {
        "ts_ns": RowColumn(np.ascontiguousarray(rows["ts_ns"])),
        "name": _described(
            code.astype(np.int64), lambda value: describe_exit_reason(value >> 32 & 0xFF, value & 0xFFFFFFFF)
        ),
        "isa": _described((code >> np.uint64(32)).astype(np.int64), lambda number: isas.get(number, "unknown")),
        "exit_reason": RowColumn((code & np.uint64(0xFFFFFFFF)).astype(np.uint32)),
        "guest_rip": RowColumn(rip, rip == NOT_TOLD),
        **plain,
    }
