"""The keys that lane arguments stand for: how each is packed from an event's fields."""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING

import numpy as np

from kvmtrace.isa.registry import UNTOLD
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.spans.keys import KeyIndex

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable

PAGE_SHIFT = 12
MMIO_WRITE = 2  # KVM_TRACE_MMIO_WRITE, include/trace/events/kvm.h


@dataclass
class LaneKeys:
    """Numbers of the keys met so far; a key's layout is in the comment."""

    reasons: KeyIndex = field(default_factory=KeyIndex)  # isa << 32 | exit_reason
    rips: KeyIndex = field(default_factory=KeyIndex)  # guest_rip
    userspace: KeyIndex = field(default_factory=KeyIndex)  # errno (u32) << 32 | reason
    ports: KeyIndex = field(default_factory=KeyIndex)  # write << 32 | port
    mmio: KeyIndex = field(default_factory=KeyIndex)  # gpa << 1 | write
    msrs: KeyIndex = field(default_factory=KeyIndex)  # write << 32 | msr
    crs: KeyIndex = field(default_factory=KeyIndex)  # write << 32 | cr
    hypercalls: KeyIndex = field(default_factory=KeyIndex)  # nr
    registers: KeyIndex = field(default_factory=KeyIndex)  # write << 32 | system register
    calls: KeyIndex = field(default_factory=KeyIndex)  # function of the secure monitor calling convention
    pages: KeyIndex = field(default_factory=KeyIndex)  # faulting address >> 12
    vectors: KeyIndex = field(default_factory=KeyIndex)  # is exception << 32 | vector


def u64(table: EventTable, event: str, name: str) -> NDArray[np.uint64]:
    """Return a field as uint64 (negative numbers modulo 2**64); zeros if it was not recorded."""
    if not table.has(event, name):
        return np.zeros(table.count(event), np.uint64)
    values: NDArray[np.uint64] = table.field(event, name).astype(np.uint64)
    return values


NOT_TOLD = np.uint64(0xFFFFFFFFFFFFFFFF)  # in place of a value that an event does not tell
ERRNO_NOT_TOLD = np.uint64(0x80000000)  # as a 32-bit number no errno


def told(table: EventTable, event: str, name: str, untold: np.uint64 = NOT_TOLD) -> NDArray[np.uint64]:
    """Return a field as u64() does, `untold` for the events that do not tell it."""
    if not table.has(event, name):
        return np.full(table.count(event), untold)
    values, mask = u64(table, event, name), table.told(event, name)
    if mask is not None:
        values = values.copy()
        values[~mask] = untold
    return values


def rip_or_none(key: int) -> int | None:
    """Return a RIP of LaneKeys, None for one that was not told."""
    return None if key == int(NOT_TOLD) else key


def u32(table: EventTable, event: str, name: str) -> NDArray[np.uint64]:
    """Return the low 32 bits of a field, as uint64."""
    low: NDArray[np.uint64] = np.bitwise_and(u64(table, event, name), np.uint64(0xFFFFFFFF))
    return low


def _userspace(table: EventTable) -> NDArray[np.uint64]:
    """Return errno and reason of userspace exits; trace-cmd's text does not tell the errno."""
    errno = np.bitwise_and(told(table, "kvm_userspace_exit", "errno", ERRNO_NOT_TOLD), np.uint64(0xFFFFFFFF))
    both: NDArray[np.uint64] = np.bitwise_or(
        np.left_shift(errno, np.uint64(32)), u32(table, "kvm_userspace_exit", "reason")
    )
    return both


def _pair(table: EventTable, event: str, high: str, low: str) -> NDArray[np.uint64]:
    return np.bitwise_or(np.left_shift(u32(table, event, high), np.uint64(32)), u32(table, event, low))


def _exit_reason(table: EventTable) -> NDArray[np.uint64]:
    if table.has("kvm_exit", "exit_reason"):
        return _pair(table, "kvm_exit", "isa", "exit_reason")
    return np.full(table.count("kvm_exit"), np.uint64(UNTOLD))


def _mmio(table: EventTable) -> NDArray[np.uint64]:
    write = (u64(table, "kvm_mmio", "type") == MMIO_WRITE).astype(np.uint64)
    keys: NDArray[np.uint64] = u64(table, "kvm_mmio", "gpa") << np.uint64(1) | write
    return keys


def _register(table: EventTable) -> NDArray[np.uint64]:
    write = u32(table, "kvm_handle_sys_reg", "is_read") ^ np.uint64(1)
    return write << np.uint64(32) | u32(table, "kvm_handle_sys_reg", "register")


def _page(table: EventTable, event: str) -> NDArray[np.uint64]:
    # the field was renamed when kvm_page_fault gained vcpu_id
    name = "fault_address" if table.has(event, "fault_address") else "address"
    return u64(table, event, name) >> np.uint64(PAGE_SHIFT)


def _vector(table: EventTable, event: str) -> NDArray[np.uint64]:
    # the field was renamed in 6.0
    name = next((name for name in ("exception", "vector", "irq") if table.has(event, name)), "vector")
    is_exception = np.uint64((event == "kvm_inj_exception") << 32)
    vectors: NDArray[np.uint64] = np.bitwise_or(u32(table, event, name), is_exception)
    return vectors


# event -> (member of LaneKeys, its keys)
KEYED: dict[str, tuple[str, Callable[[EventTable], NDArray[np.uint64]]]] = {
    "kvm_exit": ("reasons", _exit_reason),
    "kvm_userspace_exit": ("userspace", _userspace),
    "kvm_pio": ("ports", lambda table: _pair(table, "kvm_pio", "rw", "port")),
    "kvm_mmio": ("mmio", _mmio),
    "kvm_msr": ("msrs", lambda table: _pair(table, "kvm_msr", "write", "ecx")),
    "kvm_cr": ("crs", lambda table: _pair(table, "kvm_cr", "rw", "cr")),
    "kvm_hypercall": ("hypercalls", lambda table: u64(table, "kvm_hypercall", "nr")),
    "kvm_handle_sys_reg": ("registers", _register),
    "kvm_hvc_arm64": ("calls", lambda table: u32(table, "kvm_hvc_arm64", "r0")),
    "kvm_page_fault": ("pages", lambda table: _page(table, "kvm_page_fault")),
    "kvm_guest_fault": ("pages", lambda table: _page(table, "kvm_guest_fault")),
    "kvm_inj_virq": ("vectors", lambda table: _vector(table, "kvm_inj_virq")),
    "kvm_inj_exception": ("vectors", lambda table: _vector(table, "kvm_inj_exception")),
}


def split_pair(key: int) -> tuple[int, int]:
    """Return (high, low) 32 bits of a key."""
    return key >> 32, key & 0xFFFFFFFF


def signed32(value: int) -> int:
    """Return a u32 as the int that it was."""
    return value - (1 << 32) if value & 0x80000000 else value
