"""A recorded event's fields in words: numbers by their names where they have one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.isa.registry import describe_exit_reason
from kvmtrace.kvm.ioctls import describe_ioctl
from kvmtrace.kvm.msrs import describe_msr
from kvmtrace.kvm.ports import describe_port
from kvmtrace.kvm.userspace_exits import describe_userspace_exit
from kvmtrace.render.terminal import escape

if TYPE_CHECKING:
    from collections.abc import Mapping

# say nothing to a reader
NOISE = frozenset({"__syscall_nr", "__probe_ip", "__probe_func", "__probe_ret_ip"})
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
    if (event, name) == ("kvm_exit", "exit_reason"):
        return describe_exit_reason(int(fields.get("isa", 1)), value)
    if event in {"sys_enter_ioctl", "kvm_vcpu_ioctl"} and name == "cmd":
        return describe_ioctl(value)
    if (event, name) == ("kvm_userspace_exit", "reason"):
        return describe_userspace_exit(value, int(fields.get("errno", 0)))
    if (event, name) == ("kvm_msr", "ecx"):
        return _with_number(value, describe_msr(value))
    if (event, name) == ("kvm_pio", "port"):
        return _with_number(value, describe_port(value))
    return ""


def _with_number(value: int, name: str) -> str:
    return f"{value:#x} ({name})" if name else ""


def describe_fields(event: str, fields: Mapping[str, int | str], limit: int | None = None) -> list[str]:
    """Return "name value" of each field worth showing, at most `limit`."""
    shown = [name for name in fields if name not in NOISE][:limit]
    return [f"{name} {describe_field(event, fields, name)}" for name in shown]
