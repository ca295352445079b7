"""The tables of the HTML report: exits, userspace exits, what they were about, and the model's rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtrace.kvm.vm_names import vm_label
from kvmtrace.render.accesses import describe_access
from kvmtrace.render.html.html_cells import (
    Cell,
    Column,
    HtmlTable,
    count_cell,
    hexadecimal,
    made,
    number,
    plain,
    share_cell,
    table,
    text,
    time,
    time_cell,
)
from kvmtrace.render.html.timeline_data import link
from kvmtrace.render.terminal import escape
from kvmtrace.render.text.text_tables import BUDGET_PARTS, has_names
from kvmtrace.render.text.waits_text import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.report.document import Report

ACCESSES = (number("count"), time("time", "total_ns"))

# field of the document's detail, title, columns
# fmt: off
DETAILS: tuple[tuple[str, str, tuple[Column, ...]], ...] = (
    ("ports", "I/O ports", (hexadecimal("port"), text("direction"), text("device", "name"), *ACCESSES)),
    ("gpas", "Guest-physical addresses", (hexadecimal("gpa"), text("access", "kind"), *ACCESSES)),
    ("msrs", "MSRs", (hexadecimal("msr"), text("direction"), text("name"), number("#GP", "faults"), *ACCESSES)),
    ("crs", "Control registers", (number("cr"), text("direction"), *ACCESSES)),
    ("sysregs", "System registers",
     (text("register", "name"), text("direction"), hexadecimal("number", "register"), *ACCESSES)),
    ("hypercalls", "Hypercalls", (text("interface"), number("nr"), text("name"), *ACCESSES)),
    ("interrupts", "Injected interrupts and exceptions",
     (hexadecimal("vector"), text("kind"), text("name"), number("count"), number("re-injected", "reinjected"))),
    ("rips", "Guest instructions that exit", (hexadecimal("rip"), text("symbol"), text("reason", "name"), *ACCESSES)),
    ("emulated", "Emulated instructions",
     (text("instruction", "text"), text("bytes", "insn"), Column("bits", True, lambda r: Cell(r.mode)),
      number("count"), number("failed"))),
    ("cpus", "Host CPUs", (number("cpu"), number("exits"))),
)
# fmt: on


def _part(title: str, field: str) -> Column:
    return Column(title, True, lambda row: share_cell(getattr(row, field), row.total_ns))


def exit_table(report: Report) -> HtmlTable:
    """Tabulate VM-exits by reason."""
    all_ns = sum(row.total_ns or 0 for row in report.exits)
    columns = (
        text("reason", "name"),
        hexadecimal("number", "exit_reason"),
        number("exits", "count"),
        time("time", "total_ns"),
        Column("share", True, lambda row: share_cell(row.total_ns, all_ns)),
        time("mean", "mean_ns"),
        time("p50", "p50_ns"),
        time("p90", "p90_ns"),
        time("p99", "p99_ns"),
        time("p99.9", "p999_ns"),
        time("max", "max_ns"),
        _part("kernel", "kernel_ns"),
        _part("VMM", "userspace_ns"),
        _part("wait", "waiting_ns"),
        _part("preempted", "preempted_ns"),
        number("to VMM", "to_userspace"),
    )
    caption = "Time from kvm_exit to the thread's next kvm_entry."
    return table("exits", "VM-exits by reason", columns, report.exits, caption)


def vm_table(report: Report) -> HtmlTable:
    """Tabulate the VMs, where they are worth telling apart."""
    parts = {title: part for title, part in BUDGET_PARTS if title not in {"switch", "poll", "unknown"}}
    columns = (
        made("VM", lambda r: escape(vm_label(r.name, r.kind, r.comm, r.pid))),
        made("program", lambda r: escape(r.kind or r.comm)),
        made("uuid", lambda r: escape(r.uuid)),
        made("unit or pod", lambda r: escape(r.unit or r.pod)),
        Column("process", True, lambda r: Cell("?", -1) if r.pid is None else Cell(str(r.pid), r.pid)),
        Column("vCPUs", True, lambda r: count_cell(len(r.tids))),
        number("exits"),
        number("to VMM", "userspace_exits"),
        *(_vm_part(title, part) for title, part in parts.items()),
    )
    rows = report.vms if has_names(report) else ()
    return table("vms", "VMs", columns, rows, "What the vCPUs of each VM did together; shares of their wall time.")


def _vm_part(title: str, field: str) -> Column:
    return Column(title, True, lambda row: share_cell(getattr(row.budget, field, None), row.wall_ns))


def waits_table(report: Report) -> HtmlTable:
    """Tabulate who had the CPU while vCPUs waited for one."""
    all_ns = sum(row.total_ns for row in report.stolen)
    columns = (
        made("VM that waited", lambda r: escape(r.vm) if r.vm else "?" if r.pid is None else str(r.pid)),
        made("who ran", lambda r: escape(r.who)),
        made("kind", lambda r: KINDS.get(r.kind, r.kind)),
        time("time", "total_ns"),
        Column("share", True, lambda r: share_cell(r.total_ns, all_ns)),
        number("times", "count"),
        time("longest", "longest_ns"),
    )
    caption = "From a preemption, or from the interrupt that wakes a vCPU, to the CPU."
    return table("waits", "Who had the CPU while vCPUs waited for one", columns, report.stolen, caption)


def slowest_table(report: Report) -> HtmlTable:
    """Tabulate the slowest VM-exits, each linked into the timeline."""
    start_ns = report.capture.start_ns or 0
    named = len(report.vms) > 1 and any(row.vm for row in report.slowest)
    columns = (
        Column("number", True, lambda r: Cell(str(r.number), r.number, link(report, r.tid, r.ts_ns, r.dur_ns))),
        *([made("VM", lambda r: escape(r.vm))] if named else []),
        number("vCPU", "vcpu_id"),
        plain("thread", "tid"),
        Column("at", True, lambda r: time_cell(r.ts_ns - start_ns)),
        text("reason", "name"),
        time("took", "dur_ns"),
        time("wait", "waiting_ns"),
        time("preempted", "preempted_ns"),
        made("about", lambda r: describe_access(r.access, r.access_key, r.access_write)),
        hexadecimal("rip", "guest_rip"),
    )
    caption = "Waiting and being preempted left out. The number is what kvmtrace report --explain takes, with --tid."
    return table("slowest", "Slowest VM-exits", columns, report.slowest, caption)


def userspace_table(report: Report) -> HtmlTable:
    """Tabulate returns of KVM_RUN by reason."""
    columns = (
        text("reason", "name"),
        number("number", "reason"),
        number("errno"),
        number("count"),
        time("time", "total_ns"),
        time("mean", "mean_ns"),
        time("p50", "p50_ns"),
        time("p99", "p99_ns"),
        time("max", "max_ns"),
    )
    caption = "Time from the return of KVM_RUN to the thread's next KVM_RUN."
    return table("userspace", "Userspace exits", columns, report.userspace_exits, caption)


def rule_table(model: Any, meaning: Callable[[str], str]) -> HtmlTable:
    """Tabulate the rules of the reference model."""

    def counted(name: str) -> Column:
        of_rule = number(name)
        return Column(name, True, lambda item: of_rule.cell(item[1]))

    columns = (
        made("rule", lambda item: item[0]),
        made("what must hold", lambda item: meaning(item[0])),
        *map(counted, ("checked", "held", "violated", "unknown")),
    )
    rows = [item for item in model.rules.items() if item[1].checked or item[1].unknown]
    return table("rules", "Rules of the reference model", columns, rows, "Unknown: the recording does not say enough.")


def transition_table(model: Any) -> HtmlTable:
    """Tabulate transitions taken, with the time since the step before."""
    columns = (
        text("from", "from_state"),
        text("event"),
        text("to", "to_state"),
        number("count"),
        time("p50", "p50_ns"),
        time("p99", "p99_ns"),
    )
    caption = "p50 and p99: time since the vCPU's previous step."
    return table("transitions", "Transitions taken", columns, model.transitions, caption)


def detail_tables(report: Report) -> list[HtmlTable]:
    """Tabulate what the exits were about; of what no exit was, there is no table."""
    made_of = [table(field, title, columns, getattr(report.detail, field)) for field, title, columns in DETAILS]
    return [made for made in made_of if made.rows]
