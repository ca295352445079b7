"""A recorded event's fields in words: numbers by their names where they have one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.isa.registry import describe_exit_reason, describe_syndrome
from kvmtrace.kvm.ioctls import describe_ioctl
from kvmtrace.kvm.msrs import describe_msr
from kvmtrace.kvm.ports import describe_port
from kvmtrace.kvm.psci import describe_psci
from kvmtrace.kvm.userspace_exits import describe_userspace_exit
from kvmtrace.render.terminal import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# say nothing to a reader, or what another field of the event says in words
NOISE = frozenset({"__syscall_nr", "__probe_ip", "__probe_func", "__probe_ret_ip", "register", "is_read"})
DECIMAL = frozenset(
    {
        "vcpu_id", "tid", "fd", "len", "size", "count", "errno", "prev_pid", "next_pid", "prev_prio", "next_prio",
        "load", "ret", "ns", "prev_state", "waited", "vcpu", "apicid", "rw", "write", "coalesced", "hard", "soft",
    }
)  # fmt: skip


def describe_field(event: str, fields: Mapping[str, int | str], name: str) -> str:
    """Return one field's value in words.

    Parameters
    ----------
    event : the event's name
    fields : all its fields as recorded
    name : the field
    """
    value = fields[name]
    if isinstance(value, str):
        return escape(value)
    named = _named(event, fields, name, value)
    if named:
        return named
    decimal = abs(value) < (1 << 31 if name in DECIMAL else 10)
    return str(value) if decimal else f"{value & (1 << 64) - 1:#x}"


def _named(event: str, fields: Mapping[str, int | str], name: str, value: int) -> str:
    """Return the name of a number, "" if it has none."""
    describe = _NAMES.get((event, name))
    return "" if describe is None else describe(value, fields)


def _with_number(value: int, name: str) -> str:
    return f"{value:#x} ({name})" if name else ""


def _syndrome(value: int, _fields: Mapping[str, int | str]) -> str:
    return _with_number(value & 0xFFFFFFFF, describe_syndrome(value))


# (event, field) -> (value, all fields) -> its name, "" if it has none
_NAMES: dict[tuple[str, str], Callable[[int, Mapping[str, int | str]], str]] = {
    ("kvm_exit", "exit_reason"): lambda value, fields: describe_exit_reason(int(fields.get("isa", 1)), value),
    ("sys_enter_ioctl", "cmd"): lambda value, _: describe_ioctl(value),
    ("kvm_vcpu_ioctl", "cmd"): lambda value, _: describe_ioctl(value),
    ("kvm_userspace_exit", "reason"): lambda value, fields: describe_userspace_exit(value, int(fields.get("errno", 0))),
    ("kvm_msr", "ecx"): lambda value, _: _with_number(value, describe_msr(value)),
    ("kvm_pio", "port"): lambda value, _: _with_number(value, describe_port(value)),
    ("kvm_guest_fault", "hsr"): _syndrome,
    ("kvm_handle_sys_reg", "hsr"): _syndrome,
    ("kvm_hvc_arm64", "r0"): lambda value, _: _with_number(value, describe_psci(value) or ""),
}


def describe_fields(event: str, fields: Mapping[str, int | str], limit: int | None = None) -> list[str]:
    """Return "name value" of each field worth showing, at most `limit`."""
    shown = [name for name in fields if name not in NOISE][:limit]
    return [f"{name} {describe_field(event, fields, name)}" for name in shown]
