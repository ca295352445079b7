"""A VM's construction and a bundled guest's replay as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.render.bring_up_rows import ASKED, chosen, outcomes, timeline
from kvmtrace.render.terminal import Column, Style, count, duration, escape, plural, table

if TYPE_CHECKING:
    from kvmtrace.bring_up.followed import BringUp, KvmObject
    from kvmtrace.render.bring_up_rows import Outcome
    from kvmtrace.report.document import Report

SHOWN_ROWS = 60
ONE_LINE = 80  # columns: a title and what follows it


def bring_up_sections(report: Report, style: Style) -> list[str]:
    """Return the construction: objects as a tree, calls in order, and what went against KVM's contract."""
    bring_up = report.bring_up
    if bring_up is None:
        return []
    verdict = (
        style.bad(plural(bring_up.n_violations, "VIOLATION") + " of KVM's contract")
        if bring_up.n_violations
        else style.good("as KVM's contract says")
        if bring_up.steps
        else "no call of KVM's"
    )
    refused = f", {plural(bring_up.n_explained, 'refusal')} explained" if bring_up.n_explained else ""
    title, steps = "Bring-up of the VM", plural(len(bring_up.steps), "step")
    told = f"{steps}, {verdict}{refused}"
    lines = [f"{style.title(title)}  {told}"] if style.width >= ONE_LINE else [style.title(title), f"  {told}"]
    for item in bring_up.objects:
        lines += _object_lines(item, style)
    lines += [*_threads(report, style), ""]
    lines += _qmp(bring_up, style)
    lines += _vmm(bring_up, style)
    lines += _timeline(bring_up, style)
    for outcome in outcomes(bring_up):
        if outcome.verdict != "unknown" or (outcome.ret or 0) < 0:  # JSON has those whose return was not recorded
            lines += _outcome(outcome, style)
    for note in bring_up.notes:
        lines += style.wrapped(escape(note), "  note: ", "    ")
    return [*lines, ""]


def bring_up_line(report: Report) -> str:
    """Say in a line how the construction went; "" if it was not recorded."""
    bring_up = report.bring_up
    if bring_up is None:
        return ""
    refused = f", {plural(bring_up.n_explained, 'refusal')} explained" if bring_up.n_explained else ""
    contract = (
        f"{plural(bring_up.n_violations, 'VIOLATION')} of KVM's contract"
        if bring_up.n_violations
        else "as KVM's contract says"
        if bring_up.steps
        else "no call of KVM's"
    )
    made = f"{plural(len(bring_up.steps), 'step')}, {plural(len(bring_up.objects), 'object')}"
    return f"Bring-up: {made}, {contract}{refused}"


def _object_lines(item: KvmObject, style: Style) -> list[str]:
    depth = item.id.count(".") + (item.kind != "system")
    fd = f" fd {item.fd}" if item.fd is not None else ""
    threads = ", ".join(map(str, item.run_tids[:8]))
    runs = f", run by thread {threads}" if threads else ""
    assumed = ", made before the recording began" if item.assumed else ""
    return style.wrapped(
        f"{escape(item.id)}{fd}: {escape(item.kernel_object)}{runs}{assumed}",
        "  " * (depth + 1),
        "  " * (depth + 3),
    )


def _threads(report: Report, style: Style) -> list[str]:
    """Say plainly which thread is which vCPU, where it ran and how long it waited for a CPU."""
    lines = []
    for row in report.vcpus:
        where = ", ".join(map(str, row.cpus[:8])) + (" ..." if len(row.cpus) > 8 else "")
        waited = "" if row.budget.preempted_ns is None else f", waited {duration(row.budget.preempted_ns)} for a CPU"
        lines.append(
            f"  vCPU {'?' if row.vcpu_id is None else row.vcpu_id} is thread {row.tid} "
            f"({escape(row.comm or 'unnamed')}): ran on CPU {where}, {plural(row.migrations, 'migration')}"
            f"{waited}"[: style.width]
        )
    return lines


def _qmp(bring_up: BringUp, style: Style) -> list[str]:
    """Return whether QEMU's own word agrees."""
    qmp = bring_up.qmp
    if qmp is None:
        return []
    if qmp.error:
        return [style.warn(f"  QMP: {escape(qmp.error)}"[: style.width]), ""]
    words = f"QMP: QEMU {escape(qmp.version)} agrees in {plural(len(qmp.agreed), 'point')}"
    lines = [f"  {words}" + (": " + escape(qmp.agreed[0]) if qmp.agreed else "")]
    for text in qmp.differed:
        lines += [style.bad(line) for line in style.wrapped(f"QMP differs: {escape(text)}", "  ", "    ")]
    return [*(line[: style.width] for line in lines), ""]


def _vmm(bring_up: BringUp, style: Style) -> list[str]:
    """Return what the VMM registered, and where its start differs from the model's order."""
    vmm = bring_up.vmm
    if vmm is None:
        return []
    lines = []
    if vmm.n_types:
        lines += [f"  {plural(vmm.n_types, 'type')} registered by the VMM, among them:"]
        lines += ["    " + " → ".join(escape(name) for name in chain) for chain in vmm.inheritance] + [""]
    if vmm.accelerators:
        words = escape("Accelerator: " + ", ".join(tried.sentence for tried in vmm.accelerators))
        lines += [*style.wrapped(words, "  ", "    "), ""]
    for finding in vmm.findings:
        lines += [style.warn(line) for line in style.wrapped(f"differs: {escape(finding)}", "  ", "    ")]
    return lines


def _timeline(bring_up: BringUp, style: Style) -> list[str]:
    """Return the VMM's steps and its calls as one table."""
    rows = timeline(bring_up)
    shown = chosen(rows, SHOWN_ROWS)
    if not shown:
        return []
    start_ns = rows[0].ts_ns
    columns = [
        Column("at", [duration(row.ts_ns - start_ns) for row in shown]),
        Column("took", [duration(row.dur_ns) for row in shown]),
        Column("thread", [str(row.tid) for row in shown], rank=2),
        Column("fd", ["" if row.fd is None else str(row.fd) for row in shown], rank=3),
        Column(
            "step", [(f"{row.n}x " if row.n > 1 else "") + escape(row.step) for row in shown], left=True, flexible=True
        ),
        Column("on", [escape(row.object) for row in shown], left=True),
        Column("makes", [escape(row.makes) for row in shown], left=True, rank=1),
        Column("returned", ["" if row.fd is None else _returned(row.ret) for row in shown]),
    ]
    asked = sum(step.name == ASKED for step in bring_up.steps)
    left_out = [f"{count(len(rows) - len(shown))} rows of other calls"] if len(rows) > len(shown) else []
    left_out += [f"{count(asked)} {ASKED}"] if asked else []
    words = f"... not shown: {' and '.join(left_out)} (--format json)"
    more = [style.faint(line) for line in style.wrapped(words, "  ", "    ")] if left_out else []
    return [*table(columns, style), *more]


def _returned(ret: int | None) -> str:
    if ret is None:
        return "?"
    return hex(ret) if ret > 0xFFFFFF else str(ret)


def _outcome(outcome: Outcome, style: Style) -> list[str]:
    paint = style.bad if outcome.verdict == "violation" else style.warn
    times = f" ({count(outcome.n)} times)" if outcome.n > 1 else ""
    on = f" on {', '.join(outcome.objects)}" if outcome.objects else ""
    source = f" ({outcome.source})" if outcome.source else ""
    verdict = "not explained" if outcome.verdict == "unknown" else outcome.verdict
    words = f"{verdict}{times}: {outcome.name}{on} returned {_returned(outcome.ret)}: {outcome.sentence}{source}"
    lines = style.wrapped(escape(words), "  ", "    ")
    return [paint(line) for line in lines]


def replay_line(report: Report, style: Style) -> list[str]:
    """Return the replay's verdict for the report's first lines."""
    if report.replay is None:
        return []
    from kvmtrace.render.text.replay_text import describe_replay

    words = style.wrapped(escape(describe_replay(report.replay)), "  Replay:  ", " " * 11)
    return [style.bad(line) for line in words] if report.replay.differences else words


def replay_sections(report: Report, style: Style) -> list[str]:
    """Return where prediction and recording differ; nothing if they agree."""
    if report.replay is None or not report.replay.differences:
        return []
    from kvmtrace.render.text.replay_text import render_replay

    lines = [escape(line)[: style.width] for line in render_replay(report.replay).splitlines()]
    return [style.title("Replay of the guest: where prediction and recording differ"), *lines, ""]
