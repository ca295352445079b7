"""The report's first sentence: not what kind of VM-exit took the time, but what of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmtrace.isa.registry import BY_NAME
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.render.accesses import call_number
from kvmtrace.render.terminal import count, duration, escape, percent
from kvmtrace.render.text.waits_text import waits_sentence

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvmtrace.report.document import Report
    from kvmtrace.stats.rows import ExitRow

# the event that a handler owes -> the list of Detail that says what the exits were about
LISTS = {
    "kvm_pio": "ports",
    "kvm_msr": "msrs",
    "kvm_cr": "crs",
    "kvm_hypercall": "hypercalls",
    "kvm_hvc_arm64": "hypercalls",
    "kvm_handle_sys_reg": "sysregs",
    "kvm_page_fault": "gpas",
    "kvm_guest_fault": "gpas",
}


@dataclass(frozen=True)
class Culprit:
    """What most of a reason's time went to: `words` name it, `count` VM-exits took `total_ns`."""

    words: str
    count: int
    total_ns: int


def headline(report: Report) -> str:
    """Say in a few sentences where the time went, beginning with what took most of it."""
    return _of_exits(report) + waits_sentence(report)


def _of_exits(report: Report) -> str:
    timed = [row for row in report.exits if row.total_ns]
    if timed:
        return _of_nesting(report) + _of_time(report, timed)
    if report.exits:
        return _of_counts(report)
    if report.userspace_exits:
        top = max(report.userspace_exits, key=lambda row: row.count)
        total = sum(row.count for row in report.userspace_exits)
        return (
            f"{top.name} is {count(top.count)} of {count(total)} userspace exits, {duration(top.mean_ns)} each in the "
            "VMM. No kvm_entry/kvm_exit here, so no VM-exit times."
        )
    return "No VM-exits and no userspace exits were recorded."


def _of_nesting(report: Report) -> str:
    """Say where the time of nested guests went, where their exits took most of it."""
    vcpus = report.nested or ()
    wall = sum(row.wall_ns for row in vcpus)
    rows = [row for vcpu in vcpus for row in vcpu.exits]
    spent = sum(row.total_ns or 0 for row in rows)
    if 2 * spent <= wall or not spent:
        return ""
    passed = [row for row in rows if row.reflected]
    reflected, own = sum(row.samples for row in passed), sum(row.l1_exits or 0 for row in passed)
    total, l2_ns = sum(row.count for row in rows), sum(row.budget.l2_guest_ns for row in vcpus)
    each = f", each with {own / reflected:.1f} VM-exits of L1's own" if reflected else ""
    return (
        f"Nested guest: exits of L2 took {percent(spent, wall)} of the time, and L2 itself ran {percent(l2_ns, wall)}; "
        f"L1 handled {count(sum(row.count for row in passed))} of {count(total)}{each}. "
    )


def _of_counts(report: Report) -> str:
    """Say what exits most where no VM-exit has a time."""
    top = max(report.exits, key=lambda row: row.count)
    total = sum(row.count for row in report.exits)
    recorded = {name.rpartition(":")[2] for name in report.capture.events}
    has_entries = not recorded or "kvm_entry" in recorded
    why = "no VM-exit is followed by its kvm_entry" if has_entries else "no kvm_entry"
    return f"{top.name}: {count(top.count)} of {count(total)} VM-exits; {why} here, so no times."


def _of_time(report: Report, timed: list[ExitRow]) -> str:
    top = max(timed, key=lambda row: (work_ns(row), row.total_ns or 0))
    found = culprit(report, top)
    total = sum(row.count for row in report.exits)
    if found is None:
        words = f"{top.name} took {duration(top.total_ns)}, in {count(top.count)} of {count(total)} VM-exits"
    else:
        words = (
            f"{found.words} took {duration(found.total_ns)} of {duration(top.total_ns)} of {top.name} exits, "
            f"in {count(found.count)} of {count(top.count)}"
        )
    work = sum(work_ns(row) for row in timed)
    share = f" {top.name} is {percent(work_ns(top), work)} of the host's work on VM-exits ({duration(work)})"
    where = _where(top)
    return f"{words}.{share}{where}.{_of_waiting(timed)}{_of_the_guest(report)}"


def work_ns(row: ExitRow) -> int:
    """Return the time that a reason kept the host busy: in the kernel and in the VMM, not waiting, not preempted."""
    known = (row.kernel_ns, row.userspace_ns, row.unknown_ns)
    return sum(part or 0 for part in known) if any(part is not None for part in known) else row.total_ns or 0


def _where(row: ExitRow) -> str:
    parts = (("in the kernel", row.kernel_ns or 0), ("in the VMM", row.userspace_ns or 0))
    words, ns = max(parts, key=lambda part: part[1])
    return f", {percent(ns, work_ns(row))} of it {words}" if ns else ""


def _of_waiting(timed: list[ExitRow]) -> str:
    """Name what the vCPUs waited in, if they did for long."""
    waiting = sum(row.waiting_ns or 0 for row in timed)
    top = max(timed, key=lambda row: row.waiting_ns or 0)
    if not top.waiting_ns or waiting < sum(work_ns(row) for row in timed) // 10:
        return ""
    return f" Waiting, most of it in {top.name}: {duration(waiting)}."


def _of_the_guest(report: Report) -> str:
    wall_ns = sum(row.wall_ns for row in report.vcpus)
    known = [row.budget.guest_ns for row in report.vcpus if row.budget.guest_ns is not None]
    return f" The guest ran {percent(sum(known), wall_ns)} of the time." if known and wall_ns else ""


def culprit(report: Report, row: ExitRow) -> Culprit | None:
    """Return what most of an exit reason's time went to; None if the recording does not tell."""
    isa = BY_NAME.get(row.isa or "")
    known = isa.exits.get(isa.code(row.exit_reason)) if isa else None
    for must in known.must if known else ():
        for event in must.events:
            candidates = _GROUPED[LISTS[event]](report.detail, row) if event in LISTS else []
            if candidates:
                return _most(candidates, row)
    of_row = (row.isa, row.exit_reason)
    sites = [site for site in report.detail.rips if (site.isa, site.exit_reason) == of_row and site.rip is not None]
    return _most((Culprit(_site(site), site.count, site.total_ns or 0) for site in sites), row)


def _most(candidates: Iterable[Culprit], row: ExitRow) -> Culprit | None:
    """Return the candidate with the most time, if it explains a tenth of the reason's and no more than all of it."""
    top = max(candidates, key=lambda one: one.total_ns, default=None)
    total = row.total_ns or 0
    return top if top is not None and total // 10 <= top.total_ns <= total and top.count <= row.count else None


def _site(site: Any) -> str:
    return f"The instruction at {escape(site.symbol) if site.symbol else f'rip {site.rip:#x}'}"


def _ports(detail: Any, _row: ExitRow) -> list[Culprit]:
    """Group ports by device: its registers belong together."""
    devices: dict[str, list[Any]] = {}
    for port in detail.ports:
        devices.setdefault(port.name or f"port {port.port:#x}", []).append(port)
    made = []
    for name, ports in devices.items():
        numbers = sorted({port.port for port in ports})
        where = f"port {numbers[0]:#x}" + (f"-{numbers[-1]:#x}" if len(numbers) > 1 else "")
        words = f"{escape(name)} ({where})" if ports[0].name else where[0].upper() + where[1:]
        made.append(Culprit(words, sum(p.count for p in ports), sum(p.total_ns or 0 for p in ports)))
    return made


def _plain(member: str, words: Callable[[Any], str]) -> Callable[[Any, ExitRow], list[Culprit]]:
    return lambda detail, _row: [Culprit(words(one), one.count, one.total_ns or 0) for one in getattr(detail, member)]


_DOING = {"read": "Reading", "write": "Writing"}
_GROUPED: dict[str, Callable[[Any, ExitRow], list[Culprit]]] = {
    "ports": _ports,
    "msrs": _plain("msrs", lambda row: f"{_DOING[row.direction]} {row.name or f'MSR {row.msr:#x}'}"),
    "crs": _plain("crs", lambda row: f"{_DOING[row.direction]} cr{row.cr}"),
    "sysregs": _plain("sysregs", lambda row: f"{_DOING[row.direction]} {row.name}"),
    "hypercalls": _plain("hypercalls", lambda row: row.name or f"Hypercall {call_number(row)}"),
    "gpas": _plain("gpas", lambda row: f"{row.kind.capitalize()} at gpa {row.gpa:#x}"),
}
