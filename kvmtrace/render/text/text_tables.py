"""The tables of the text report. Each makes its lines from the document; none computes statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtrace.errors import UsageError
from kvmtrace.kvm.vm_names import vm_label
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.render.accesses import call_number
from kvmtrace.render.terminal import Column, Style, count, duration, escape, percent, titled
from kvmtrace.render.text.waits_text import waits_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from kvmtrace.report.document import Report
    from kvmtrace.stats.rows import ExitRow, SlowExit

    # report, style, sort key, number of rows (None: all) -> lines; none if there is nothing to show
    Table: TypeAlias = Callable[[Report, Style, str | None, int | None], list[str]]

# --sort KEY -> how a row is ranked; names ascend, numbers descend
SORT_KEYS: dict[str, Callable[[Any], Any]] = {
    "count": lambda row: -_number(row, "count", "exits"),
    "time": lambda row: -_number(row, "total_ns", "wall_ns"),
    "mean": lambda row: -_number(row, "mean_ns"),
    "p50": lambda row: -_number(row, "p50_ns"),
    "p99": lambda row: -_number(row, "p99_ns"),
    "max": lambda row: -_number(row, "max_ns"),
    "name": lambda row: str(getattr(row, "name", getattr(row, "comm", "")) or ""),
    "key": lambda row: _number(row, "exit_reason", "reason", "port", "msr", "gpa", "cr", "rip", "tid"),
}


def _number(row: Any, *names: str) -> int:
    return next((value for name in names if (value := getattr(row, name, None)) is not None), -1)


def arranged(rows: Sequence[Any], sort: str | None, limit: int | None) -> tuple[list[Any], int]:
    """Return rows in the order wanted and at most `limit` of them, and how many were left out."""
    if sort is not None and sort not in SORT_KEYS:
        raise UsageError(f"--sort {sort}: not one of {', '.join(SORT_KEYS)}")
    ordered = sorted(rows, key=SORT_KEYS[sort]) if sort else list(rows)
    shown = ordered if limit is None else ordered[:limit]
    return shown, len(ordered) - len(shown)


def _more(left_out: int, by: str) -> str:
    return f"... {count(left_out)} more (--by {by})" if left_out else ""


def preempted_column(all_rows: Sequence[ExitRow] | Sequence[SlowExit], texts: list[str]) -> list[Column]:
    """Return the column of how long VM-exits were preempted; none where none was."""
    return [Column("preempted", texts, rank=7)] if any(row.preempted_ns for row in all_rows) else []


def reason_table(report: Report, style: Style, sort: str | None, limit: int | None) -> list[str]:
    """VM-exits by reason."""
    if not report.exits:
        return []
    rows, left_out = arranged(report.exits, sort, limit)
    total_ns = sum(row.total_ns or 0 for row in report.exits)
    columns = [
        Column("reason", [row.name for row in rows], left=True, flexible=True, shortest=20),
        Column("exits", [count(row.count) for row in rows]),
        Column("time", [duration(row.total_ns) for row in rows]),
        Column("time%", [percent(row.total_ns, total_ns) for row in rows], rank=6),
        Column("mean", [duration(row.mean_ns) for row in rows], rank=3),
        Column("p50", [duration(row.p50_ns) for row in rows], rank=4),
        Column("p99", [duration(row.p99_ns) for row in rows], rank=2),
        Column("max", [duration(row.max_ns) for row in rows], rank=5),
        Column("kernel", [percent(row.kernel_ns, row.total_ns) for row in rows], rank=1),
        Column("VMM", [percent(row.userspace_ns, row.total_ns) for row in rows], rank=1),
        Column("wait", [percent(row.waiting_ns, row.total_ns) for row in rows], rank=1),
        *preempted_column(report.exits, [percent(row.preempted_ns, row.total_ns) for row in rows]),
    ]
    return titled(
        "VM-exits by reason", "(time: from kvm_exit to the next kvm_entry)", columns, style, _more(left_out, "reason")
    )


def userspace_table(report: Report, style: Style, sort: str | None, limit: int | None) -> list[str]:
    """Userspace exits by reason."""
    if not report.userspace_exits:
        return []
    rows, left_out = arranged(report.userspace_exits, sort, limit)
    columns = [
        Column("reason", [row.name for row in rows], left=True, flexible=True, shortest=20),
        Column("number", [str(row.reason) for row in rows], rank=7),
        Column("errno", ["-" if row.errno is None else str(row.errno) for row in rows], rank=6),
        Column("count", [count(row.count) for row in rows]),
        Column("time", [duration(row.total_ns) for row in rows]),
        Column("mean", [duration(row.mean_ns) for row in rows], rank=3),
        Column("p50", [duration(row.p50_ns) for row in rows], rank=4),
        Column("p99", [duration(row.p99_ns) for row in rows], rank=2),
        Column("max", [duration(row.max_ns) for row in rows], rank=5),
    ]
    return titled(
        "Userspace exits",
        "(time: from KVM_RUN's return to the next KVM_RUN)",
        columns,
        style,
        _more(left_out, "userspace"),
    )


BUDGET_PARTS = (
    ("guest", "guest_ns"),
    ("switch", "entry_exit_ns"),
    ("kernel", "handler_ns"),
    ("VMM", "userspace_ns"),
    ("blocked", "blocked_ns"),
    ("poll", "halt_poll_ns"),
    ("preempted", "preempted_ns"),
    ("unknown", "unknown_ns"),
)

# of the budget's columns: what is left out first in a narrow terminal
_RANKS = {"switch": 3, "poll": 2, "unknown": 4}


# of a VM's columns: as of a vCPU's, and those that are seldom looked at
_VM_PARTS = ("guest", "kernel", "VMM", "blocked", "preempted")


def has_names(report: Report) -> bool:
    """Say whether VMs are worth telling apart: one has a name, or there are several."""
    return len(report.vms) > 1 or any(row.name for row in report.vms)


def vm_table(report: Report, style: Style, sort: str | None, limit: int | None) -> list[str]:
    """VMs, each with what its vCPUs did together."""
    if not report.vms or (limit is not None and not has_names(report)):
        return []
    rows, left_out = arranged(report.vms, sort, limit)
    shares = {title: part for title, part in BUDGET_PARTS if title in _VM_PARTS}
    columns = [
        Column("VM", [escape(vm_label(row.name, row.kind, row.comm, row.pid)) for row in rows], left=True,
               flexible=True, shortest=16),
        Column("program", [escape(row.kind or row.comm) for row in rows], left=True, rank=2),
        Column("pid", ["?" if row.pid is None else str(row.pid) for row in rows], rank=3),
        Column("vCPUs", [count(len(row.tids)) for row in rows]),
        Column("exits", [count(row.exits) for row in rows]),
        Column("to VMM", [count(row.userspace_exits) for row in rows], rank=4),
        *(
            Column(title, [percent(getattr(row.budget, part, None), row.wall_ns) for row in rows], rank=1)
            for title, part in shares.items()
        ),
    ]  # fmt: skip
    more = _more(left_out, "vm")
    return titled("VMs", "(shares of their vCPUs' wall time)", columns, style, more)


def vm_column(report: Report, rows: Sequence[Any]) -> list[Column]:
    """Return the column that names each row's VM; none where there is but one, or none has a name."""
    if len(report.vms) < 2 or not any(row.vm for row in rows):
        return []
    return [Column("VM", [escape(row.vm) for row in rows], left=True, flexible=True, shortest=12)]


def vcpu_table(report: Report, style: Style, sort: str | None, limit: int | None) -> list[str]:
    """Time budget per vCPU."""
    if not report.vcpus:
        return []
    rows, left_out = arranged(report.vcpus, sort, limit)
    columns = [
        *vm_column(report, rows),
        Column("vCPU", ["?" if row.vcpu_id is None else str(row.vcpu_id) for row in rows]),
        Column("tid", [str(row.tid) for row in rows], rank=6),
        Column("comm", [escape(row.comm) for row in rows], left=True, flexible=True, rank=5),
        Column("wall", [duration(row.wall_ns) for row in rows]),
        *(
            Column(title, [percent(getattr(row.budget, part), row.wall_ns) for row in rows], rank=_RANKS.get(title, 0))
            for title, part in BUDGET_PARTS
        ),
    ]
    return titled(
        "Time budget of each vCPU", "(sums to its wall time; -: not recorded)", columns, style, _more(left_out, "vcpu")
    )


@dataclass(frozen=True)
class _Access:
    """How a table of accesses looks: its key columns, and which --by shows all of it ("" for none)."""

    title: str
    member: str  # of Detail
    by: str
    headings: tuple[str, ...]
    key: Callable[[Any], list[str]]


def _access_table(report: Report, look: _Access, style: Style, sort: str | None, limit: int | None) -> list[str]:
    rows = getattr(report.detail, look.member)
    if not rows:
        return []
    shown, left_out = arranged(rows, sort, limit)
    rest = report.detail.left_out.get(look.member)
    left_out += rest.rows if rest else 0
    keys = [look.key(row) for row in shown]
    columns = [
        Column(heading, cells, left=True, flexible=i == len(look.headings) - 1)
        for i, heading in enumerate(look.headings)
        if any(cells := [parts[i] for parts in keys])
    ]
    columns.append(Column("count", [count(row.count) for row in shown]))
    if any(getattr(row, "total_ns", None) for row in rows):
        each = [row.total_ns / row.count if row.total_ns is not None else None for row in shown]
        columns.append(Column("time", [duration(row.total_ns) for row in shown]))
        columns.append(Column("each", [duration(ns) for ns in each]))
    note = _more(left_out, look.by) if look.by else f"... {count(left_out)} more (--format json)"
    return titled(look.title, "", columns, style, note if left_out else "")


def _noted(text: str, number: int | None, note: str) -> str:
    return escape(text) + (f" ({count(number)} {note})" if number else "")


_ACCESSES = (
    _Access(
        "I/O ports",
        "ports",
        "port",
        ("port", "dir", "device"),
        lambda row: [f"{row.port:#x}", row.direction, escape(row.name)],
    ),
    _Access("Guest-physical addresses", "gpas", "gpa", ("gpa", "access"), lambda row: [f"{row.gpa:#x}", row.kind]),
    _Access(
        "MSRs",
        "msrs",
        "msr",
        ("msr", "dir", "name"),
        lambda row: [f"{row.msr:#x}", row.direction, _noted(row.name, row.faults, "#GP")],
    ),
    _Access("Control registers", "crs", "cr", ("cr", "dir"), lambda row: [f"cr{row.cr}", row.direction]),
    _Access(
        "System registers",
        "sysregs",
        "sysreg",
        ("register", "dir"),
        lambda row: [row.name, row.direction],
    ),
    _Access(
        "Hypercalls",
        "hypercalls",
        "",
        ("interface", "number", "name"),
        lambda row: [row.interface, call_number(row), row.name],
    ),
    _Access(
        "Injected interrupts and exceptions",
        "interrupts",
        "",
        ("vector", "kind", "name"),
        lambda row: [f"{row.vector:#x}", row.kind, _noted(row.name, row.reinjected, "re-injected")],
    ),
    _Access(
        "Guest instructions that exit",
        "rips",
        "rip",
        ("rip", "reason", "symbol"),
        lambda row: ["-" if row.rip is None else f"{row.rip:#x}", row.name, escape(row.symbol) if row.symbol else ""],
    ),
    _Access(
        "Emulated instructions",
        "emulated",
        "",
        ("instruction", "bits", "bytes"),
        lambda row: [_noted(row.text, row.failed, "failed"), row.mode, row.insn],
    ),
)


def _table_of(look: _Access) -> Table:
    return lambda report, style, sort, limit: _access_table(report, look, style, sort, limit)


# --by KEY -> its table; the report prints them in this order
TABLES: dict[str, Table] = {
    "vm": vm_table,
    "reason": reason_table,
    "vcpu": vcpu_table,
    "userspace": userspace_table,
    "waits": waits_table,
    **{look.by or look.member: _table_of(look) for look in _ACCESSES},
}

_MEMORY = ("kvm_mmio", "kvm_page_fault", "kvm_guest_fault", "kvm_fast_mmio")
# --by KEY -> what its rows are, and the events that they come from
EVENTS_OF: dict[str, tuple[str, tuple[str, ...]]] = {
    "reason": ("VM-exit", ("kvm_exit",)),
    "userspace": ("userspace exit", ("kvm_userspace_exit",)),
    "vm": ("VM", ("kvm_entry", "kvm_exit", "kvm_userspace_exit")),
    "vcpu": ("vCPU", ("kvm_entry", "kvm_exit", "kvm_userspace_exit")),
    "waits": ("wait of a vCPU for a CPU", ("sched_switch",)),
    "port": ("access to an I/O port", ("kvm_pio",)),
    "gpa": ("access to MMIO and no fault on a guest page", _MEMORY),
    "msr": ("access to an MSR", ("kvm_msr",)),
    "cr": ("access to a control register", ("kvm_cr",)),
    "rip": ("VM-exit", ("kvm_exit",)),
    "sysreg": ("access to a system register", ("kvm_handle_sys_reg",)),
    "hypercalls": ("hypercall", ("kvm_hypercall", "kvm_hv_hypercall", "kvm_xen_hypercall", "kvm_hvc_arm64")),
    "interrupts": ("injection", ("kvm_inj_virq", "kvm_inj_exception")),
    "emulated": ("emulated instruction", ("kvm_emulate_insn",)),
}
