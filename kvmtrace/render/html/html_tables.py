"""The tables of the HTML report: each row of the document becomes cells with a text and a value to sort by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvmtrace.render.accesses import describe_access
from kvmtrace.render.bring_up_rows import ASKED, outcomes, timeline
from kvmtrace.render.html.timeline_data import link
from kvmtrace.render.terminal import count, duration, percent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmtrace.report.document import Report


@dataclass(frozen=True)
class Cell:
    """A text and, for numbers, the value to sort by."""

    text: str
    value: float | int | None = None
    link: str = ""


@dataclass(frozen=True)
class HtmlTable:
    """`columns` are (title, is a number); filterable from ten rows on."""

    id: str
    title: str
    caption: str
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[Cell, ...], ...]


def _time(ns: int | None) -> Cell:
    return Cell("-", -1) if ns is None else Cell(duration(ns), ns)


def _count(number: int | None) -> Cell:
    return Cell("-", -1) if number is None else Cell(count(number), number)


def _share(part: int | None, whole: int | None) -> Cell:
    return Cell("-", -1) if part is None or not whole else Cell(percent(part, whole), part / whole)


def _hex(number: int, width: int = 0) -> Cell:
    return Cell(f"{number:#0{width + 2}x}" if width else f"{number:#x}", number)


def _table(  # noqa: PLR0917 (a table reads best as one line of arguments)
    name: str, title: str, caption: str, columns: Iterable[tuple[str, bool]], rows: Iterable[Any],
    cells: Callable[[Any], tuple[Cell, ...]],
) -> HtmlTable:  # fmt: skip
    return HtmlTable(name, title, caption, tuple(columns), tuple(cells(row) for row in rows))


def exit_table(report: Report) -> HtmlTable:
    """Tabulate VM-exits by reason."""
    total_ns = sum(row.total_ns or 0 for row in report.exits)
    columns = [
        ("reason", False),
        ("number", True),
        ("exits", True),
        ("time", True),
        ("share", True),
        ("mean", True),
        ("p50", True),
        ("p90", True),
        ("p99", True),
        ("p99.9", True),
        ("max", True),
        ("kernel", True),
        ("VMM", True),
        ("waiting", True),
        ("to userspace", True),
    ]
    return _table(
        "exits",
        "VM-exits by reason",
        "Time from kvm_exit to the thread's next kvm_entry.",
        columns,
        report.exits,
        lambda r: (
            Cell(r.name),
            _hex(r.exit_reason),
            _count(r.count),
            _time(r.total_ns),
            _share(r.total_ns, total_ns),
            _time(r.mean_ns),
            _time(r.p50_ns),
            _time(r.p90_ns),
            _time(r.p99_ns),
            _time(r.p999_ns),
            _time(r.max_ns),
            _share(r.kernel_ns, r.total_ns),
            _share(r.userspace_ns, r.total_ns),
            _share(r.waiting_ns, r.total_ns),
            _count(r.to_userspace),
        ),
    )


def slowest_table(report: Report) -> HtmlTable:
    """Tabulate the slowest VM-exits, each linked into the timeline."""
    start_ns = report.capture.start_ns or 0
    columns = [
        ("number", True),
        ("vCPU", True),
        ("thread", True),
        ("at", True),
        ("reason", False),
        ("took", True),
        ("waited", True),
        ("about", False),
        ("rip", True),
    ]
    return _table(
        "slowest",
        "Slowest VM-exits",
        "Waiting left out. The number is what kvmtrace report --explain takes, with --tid.",
        columns,
        report.slowest,
        lambda r: (
            Cell(str(r.number), r.number, link(report, r.tid, r.ts_ns, r.dur_ns)),
            _count(r.vcpu_id),
            Cell(str(r.tid), r.tid),
            _time(r.ts_ns - start_ns),
            Cell(r.name),
            _time(r.dur_ns),
            _time(r.waiting_ns),
            Cell(describe_access(r.access, r.access_key, r.access_write)),
            _hex(r.guest_rip),
        ),
    )


def userspace_table(report: Report) -> HtmlTable:
    """Tabulate returns of KVM_RUN by reason."""
    columns = [
        ("reason", False),
        ("number", True),
        ("errno", True),
        ("count", True),
        ("time", True),
        ("mean", True),
        ("p50", True),
        ("p99", True),
        ("max", True),
    ]
    return _table(
        "userspace",
        "Userspace exits",
        "Time from the return of KVM_RUN to the thread's next KVM_RUN.",
        columns,
        report.userspace_exits,
        lambda r: (
            Cell(r.name),
            _count(r.reason),
            _count(r.errno),
            _count(r.count),
            _time(r.total_ns),
            _time(r.mean_ns),
            _time(r.p50_ns),
            _time(r.p99_ns),
            _time(r.max_ns),
        ),
    )


def rule_table(model: Any, meaning: Callable[[str], str]) -> HtmlTable:
    """Tabulate the rules of the reference model."""
    columns = [
        ("rule", False),
        ("what must hold", False),
        ("checked", True),
        ("held", True),
        ("violated", True),
        ("unknown", True),
    ]
    return _table(
        "rules",
        "Rules of the reference model",
        "Unknown: the recording does not say enough.",
        columns,
        [item for item in model.rules.items() if item[1].checked or item[1].unknown],
        lambda item: (
            Cell(item[0]),
            Cell(meaning(item[0])),
            _count(item[1].checked),
            _count(item[1].held),
            _count(item[1].violated),
            _count(item[1].unknown),
        ),
    )


def transition_table(model: Any) -> HtmlTable:
    """Tabulate transitions taken, with the time since the step before."""
    columns = [("from", False), ("event", False), ("to", False), ("count", True), ("p50", True), ("p99", True)]
    return _table(
        "transitions",
        "Transitions taken",
        "p50 and p99: time since the vCPU's previous step.",
        columns,
        model.transitions,
        lambda t: (
            Cell(t.from_state),
            Cell(t.event),
            Cell(t.to_state),
            _count(t.count),
            _time(t.p50_ns),
            _time(t.p99_ns),
        ),
    )


def detail_tables(report: Report) -> list[HtmlTable]:
    """Tabulate what the exits were about."""
    detail = report.detail
    access = [("count", True), ("time", True)]
    made = [
        _table(
            "ports",
            "I/O ports",
            "",
            [("port", True), ("direction", False), ("device", False), *access],
            detail.ports,
            lambda r: (_hex(r.port), Cell(r.direction), Cell(r.name), _count(r.count), _time(r.total_ns)),
        ),
        _table(
            "gpas",
            "Guest-physical addresses",
            "",
            [("gpa", True), ("access", False), *access],
            detail.gpas,
            lambda r: (_hex(r.gpa), Cell(r.kind), _count(r.count), _time(r.total_ns)),
        ),
        _table(
            "msrs",
            "MSRs",
            "",
            [("msr", True), ("direction", False), ("name", False), ("#GP", True), *access],
            detail.msrs,
            lambda r: (
                _hex(r.msr),
                Cell(r.direction),
                Cell(r.name),
                _count(r.faults),
                _count(r.count),
                _time(r.total_ns),
            ),
        ),
        _table(
            "crs",
            "Control registers",
            "",
            [("cr", True), ("direction", False), *access],
            detail.crs,
            lambda r: (_count(r.cr), Cell(r.direction), _count(r.count), _time(r.total_ns)),
        ),
        _table(
            "hypercalls",
            "Hypercalls",
            "",
            [("interface", False), ("nr", True), ("name", False), *access],
            detail.hypercalls,
            lambda r: (Cell(r.interface), _count(r.nr), Cell(r.name), _count(r.count), _time(r.total_ns)),
        ),
        _table(
            "interrupts",
            "Injected interrupts and exceptions",
            "",
            [("vector", True), ("kind", False), ("name", False), ("count", True), ("re-injected", True)],
            detail.interrupts,
            lambda r: (_hex(r.vector), Cell(r.kind), Cell(r.name), _count(r.count), _count(r.reinjected)),
        ),
        _table(
            "rips",
            "Guest instructions that exit",
            "",
            [("rip", True), ("symbol", False), ("reason", False), *access],
            detail.rips,
            lambda r: (_hex(r.rip), Cell(r.symbol or ""), Cell(r.name), _count(r.count), _time(r.total_ns)),
        ),
        _table(
            "emulated",
            "Emulated instructions",
            "",
            [("instruction", False), ("bytes", False), ("bits", True), ("count", True), ("failed", True)],
            detail.emulated,
            lambda r: (Cell(r.text), Cell(r.insn), Cell(r.mode), _count(r.count), _count(r.failed)),
        ),
        _table(
            "cpus",
            "Host CPUs",
            "",
            [("cpu", True), ("exits", True)],
            detail.cpus,
            lambda r: (_count(r.cpu), _count(r.exits)),
        ),
    ]
    return [table for table in made if table.rows]


def bring_up_tables(bring_up: Any) -> list[HtmlTable]:
    """Tabulate the VM's construction: objects, the VMM's steps and calls as one, refusals, capabilities."""
    rows = timeline(bring_up)
    start = rows[0].ts_ns if rows else 0
    objects = _table(
        "objects",
        "Objects of the VM",
        "",
        [
            ("object", False),
            ("descriptor", True),
            ("made by thread", True),
            ("run by", False),
            ("in the kernel", False),
            ("file", False),
        ],
        bring_up.objects,
        lambda o: (
            Cell(o.id + (" (made before the recording)" if o.assumed else "")),
            _count(o.fd),
            Cell(str(o.tid), o.tid),
            Cell(", ".join(map(str, o.run_tids))),
            Cell(o.kernel_object),
            Cell(o.file),
        ),
    )
    steps = _table(
        "steps",
        "Construction, step by step",
        "What repeats itself is one row. A step without descriptor is one of the VMM's own functions.",
        [
            ("after", True),
            ("took", True),
            ("thread", True),
            ("step", False),
            ("times", True),
            ("descriptor", True),
            ("on", False),
            ("returned", True),
            ("verdict", False),
            ("", False),
        ],
        rows,
        lambda r: (
            _time(r.ts_ns - start),
            _time(r.dur_ns),
            Cell(str(r.tid), r.tid),
            Cell(r.step),
            _count(r.n),
            _count(r.fd),
            Cell(r.object + (f" → {r.makes}" if r.makes else "")),
            _returned(r.ret),
            Cell(r.verdict),
            Cell(r.sentence),
        ),
    )
    refused = _table(
        "outcomes",
        "What did not simply succeed",
        "",
        [
            ("times", True),
            ("call", False),
            ("on", False),
            ("returned", True),
            ("verdict", False),
            ("", False),
            ("source", False),
        ],
        outcomes(bring_up),
        lambda o: (
            _count(o.n),
            Cell(o.name),
            Cell(", ".join(o.objects)),
            _returned(o.ret),
            Cell(o.verdict),
            Cell(o.sentence),
            Cell(o.source),
        ),
    )
    asked = _table(
        "asked",
        "Capabilities asked for",
        "",
        [("after", True), ("thread", True), ("on", False), ("capability", True), ("returned", True)],
        [step for step in bring_up.steps if step.name == ASKED],
        lambda s: (
            _time(s.ts_ns - start),
            Cell(str(s.tid), s.tid),
            Cell(s.object),
            Cell(str(s.arg), s.arg),
            _returned(s.ret),
        ),
    )
    return [table for table in (objects, steps, refused, asked) if table.rows]


def _returned(ret: int | None) -> Cell:
    if ret is None:
        return Cell("-", -1)
    return Cell(f"{ret:#x}" if ret > 1 << 20 else str(ret), ret)
