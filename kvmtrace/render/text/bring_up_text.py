"""A VM's construction and a bundled guest's replay as text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from kvmtrace.render.bring_up_rows import ASKED, chosen, outcomes, timeline
from kvmtrace.render.terminal import WIDTH, Column, Style, count, duration, escape, plural, table
from kvmtrace.render.text.replay_text import describe_replay, render_replay

if TYPE_CHECKING:
    from kvmtrace.render.bring_up_rows import Outcome
    from kvmtrace.report.document import Report

SHOWN_ROWS = 60


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
    lines = [style.title("Bring-up of the VM") + f"  {plural(len(bring_up.steps), 'step')}, {verdict}{refused}"]
    for item in bring_up.objects:
        lines += _object_lines(item)
    lines += [*_threads(report), ""]
    lines += _qmp(bring_up, style)
    lines += _vmm(bring_up, style)
    lines += _timeline(bring_up, style)
    for outcome in outcomes(bring_up):
        if outcome.verdict != "unknown" or (outcome.ret or 0) < 0:  # JSON has those whose return was not recorded
            lines += _outcome(outcome, style)
    for note in bring_up.notes:
        lines += textwrap.wrap(escape(note), WIDTH, initial_indent="  note: ", subsequent_indent="    ")
    return [*lines, ""]


def _object_lines(item: Any) -> list[str]:
    depth = item.id.count(".") + (item.kind != "system")
    fd = f" fd {item.fd}" if item.fd is not None else ""
    threads = ", ".join(map(str, item.run_tids[:8]))
    runs = f", run by thread {threads}" if threads else ""
    assumed = ", made before the recording began" if item.assumed else ""
    return textwrap.wrap(
        f"{escape(item.id)}{fd}: {escape(item.kernel_object)}{runs}{assumed}",
        WIDTH,
        initial_indent="  " * (depth + 1),
        subsequent_indent="  " * (depth + 3),
    )


def _threads(report: Report) -> list[str]:
    """Say plainly which thread is which vCPU, where it ran and how long it waited for a CPU."""
    lines = []
    for row in report.vcpus:
        where = ", ".join(map(str, row.cpus[:8])) + (" ..." if len(row.cpus) > 8 else "")
        waited = "" if row.budget.preempted_ns is None else f", waited {duration(row.budget.preempted_ns)} for a CPU"
        lines.append(
            f"  vCPU {'?' if row.vcpu_id is None else row.vcpu_id} is thread {row.tid} "
            f"({escape(row.comm or 'unnamed')}): ran on CPU {where}, {plural(row.migrations, 'migration')}"
            f"{waited}"[:WIDTH]
        )
    return lines


def _qmp(bring_up: Any, style: Style) -> list[str]:
    """Return whether QEMU's own word agrees."""
    qmp = bring_up.qmp
    if qmp is None:
        return []
    if qmp.error:
        return [style.warn(f"  QMP: {escape(qmp.error)}"[:WIDTH]), ""]
    words = f"QMP: QEMU {escape(qmp.version)} agrees in {plural(len(qmp.agreed), 'point')}"
    lines = [f"  {words}" + (": " + escape(qmp.agreed[0]) if qmp.agreed else "")]
    for text in qmp.differed:
        lines += [
            style.bad(line)
            for line in textwrap.wrap(
                f"QMP differs: {escape(text)}", WIDTH, initial_indent="  ", subsequent_indent="    "
            )
        ]
    return [*(line[:WIDTH] for line in lines), ""]


def _vmm(bring_up: Any, style: Style) -> list[str]:
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
        lines += [*textwrap.wrap(words, WIDTH, initial_indent="  ", subsequent_indent="    "), ""]
    for finding in vmm.findings:
        lines += [
            style.warn(line)
            for line in textwrap.wrap(
                f"differs: {escape(finding)}", WIDTH, initial_indent="  ", subsequent_indent="    "
            )
        ]
    return lines


def _timeline(bring_up: Any, style: Style) -> list[str]:
    """Return the VMM's steps and its calls as one table."""
    rows = timeline(bring_up)
    shown = chosen(rows, SHOWN_ROWS)
    if not shown:
        return []
    start_ns = rows[0].ts_ns
    columns = [
        Column("at", [duration(row.ts_ns - start_ns) for row in shown]),
        Column("took", [duration(row.dur_ns) for row in shown]),
        Column("thread", [str(row.tid) for row in shown]),
        Column("fd", ["" if row.fd is None else str(row.fd) for row in shown]),
        Column(
            "step", [(f"{row.n}x " if row.n > 1 else "") + escape(row.step) for row in shown], left=True, flexible=True
        ),
        Column("on", [escape(row.object) for row in shown], left=True),
        Column("makes", [escape(row.makes) for row in shown], left=True),
        Column("returned", ["" if row.fd is None else _returned(row.ret) for row in shown]),
    ]
    asked = sum(step.name == ASKED for step in bring_up.steps)
    left_out = [f"{count(len(rows) - len(shown))} rows of other calls"] if len(rows) > len(shown) else []
    left_out += [f"{count(asked)} {ASKED}"] if asked else []
    more = [style.faint(f"  ... not shown: {' and '.join(left_out)} (--format json)")] if left_out else []
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
    lines = textwrap.wrap(escape(words), WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return [paint(line) for line in lines]


def replay_line(report: Report, style: Style) -> list[str]:
    """Return the replay's verdict for the report's first lines."""
    if report.replay is None:
        return []
    words = textwrap.wrap(
        escape(describe_replay(report.replay)),
        WIDTH,
        initial_indent="  Replay:  ",
        subsequent_indent=" " * 11,
        break_on_hyphens=False,
    )
    return [style.bad(line) for line in words] if report.replay.differences else words


def replay_sections(report: Report, style: Style) -> list[str]:
    """Return where prediction and recording differ; nothing if they agree."""
    if report.replay is None or not report.replay.differences:
        return []
    lines = [escape(line)[:WIDTH] for line in render_replay(report.replay).splitlines()]
    return [style.title("Replay of the guest: where prediction and recording differ"), *lines, ""]
