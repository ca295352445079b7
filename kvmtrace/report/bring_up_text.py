"""A VM's construction and a bundled guest's replay as text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from kvmtrace.report.terminal import WIDTH, Column, Style, count, duration, escape, plural, table

if TYPE_CHECKING:
    from kvmtrace.report.document import Report

SHOWN_STEPS = 24


def bring_up_sections(report: Report, style: Style) -> list[str]:
    """Return the construction: objects as a tree, calls in order, and what went against KVM's contract."""
    bring_up = report.bring_up
    if bring_up is None:
        return []
    verdict = (style.bad(plural(bring_up.n_violations, "VIOLATION") + " of KVM's contract") if bring_up.n_violations
               else style.good("as KVM's contract says"))
    refused = f", {plural(bring_up.n_explained, 'refusal')} explained" if bring_up.n_explained else ""
    lines = [style.title("Bring-up of the VM") + f"  {plural(len(bring_up.steps), 'step')}, {verdict}{refused}"]
    lines += [_object_line(item) for item in bring_up.objects] + _threads(report) + [""]
    lines += _qmp(bring_up, style)
    lines += _vmm(bring_up, style)
    lines += _steps(bring_up, style)
    for step in bring_up.steps:
        if step.verdict in {"violation", "explained"}:
            lines += _verdict(step, style)
    for note in bring_up.notes:
        lines += textwrap.wrap(escape(note), WIDTH, initial_indent="  note: ", subsequent_indent="    ")
    return [*lines, ""]


def _object_line(item: Any) -> str:
    depth = item.id.count(".") + (item.kind != "system")
    fd = f" fd {item.fd}" if item.fd is not None else ""
    threads = ", ".join(map(str, item.run_tids[:8]))
    runs = f", run by thread {threads}" if threads else ""
    assumed = ", made before the recording began" if item.assumed else ""
    return f"  {'  ' * depth}{escape(item.id)}{fd}: {escape(item.kernel_object)}{runs}{assumed}"[:WIDTH]


def _threads(report: Report) -> list[str]:
    """Say plainly which thread is which vCPU, where it ran and how long it waited for a CPU."""
    lines = []
    for row in report.vcpus:
        where = ", ".join(map(str, row.cpus[:8])) + (" ..." if len(row.cpus) > 8 else "")
        waited = "" if row.budget.preempted_ns is None else f", waited {duration(row.budget.preempted_ns)} for a CPU"
        lines.append(f"  vCPU {'?' if row.vcpu_id is None else row.vcpu_id} is thread {row.tid} "
                     f"({escape(row.comm or 'unnamed')}): ran on CPU {where}, {plural(row.migrations, 'migration')}"
                     f"{waited}"[:WIDTH])
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
        lines += [style.bad(line) for line in textwrap.wrap(f"QMP differs: {escape(text)}", WIDTH,
                                                            initial_indent="  ", subsequent_indent="    ")]
    return [*(line[:WIDTH] for line in lines), ""]


def _vmm(bring_up: Any, style: Style) -> list[str]:
    """Return the VMM's own start, from its probed functions."""
    vmm = bring_up.vmm
    if vmm is None:
        return []
    lines = [style.title("Start of the VMM") + f"  {plural(vmm.n_types, 'type')} registered"]
    lines += ["  " + " → ".join(escape(name) for name in chain) for chain in vmm.inheritance]
    start_ns = vmm.steps[0].ts_ns if vmm.steps else 0
    lines += table([
        Column("at", [duration(step.ts_ns - start_ns) for step in vmm.steps]),
        Column("thread", [str(step.tid) for step in vmm.steps]),
        Column("step", [escape(step.role.removeprefix("vmm_")) for step in vmm.steps], left=True),
        Column("argument", [escape(step.argument) for step in vmm.steps], left=True),
        Column("what", [step.sentence for step in vmm.steps], left=True, flexible=True),
    ], style)
    for finding in vmm.findings:
        lines += [style.warn(line) for line in textwrap.wrap(f"differs: {escape(finding)}", WIDTH,
                                                             initial_indent="  ", subsequent_indent="    ")]
    return [*lines, ""]


def _steps(bring_up: Any, style: Style) -> list[str]:
    # QEMU asks for some 80 capabilities: they stay in the JSON
    telling = [step for step in bring_up.steps if step.name != "KVM_CHECK_EXTENSION"]
    shown = telling[:SHOWN_STEPS]
    if not shown:
        return []
    start_ns = shown[0].ts_ns
    columns = [
        Column("at", [duration(step.ts_ns - start_ns) for step in shown]),
        Column("thread", [str(step.tid) for step in shown]),
        Column("fd", [str(step.fd) for step in shown]),
        Column("call", [_call(step) for step in shown], left=True, flexible=True),
        Column("on", [escape(step.object) for step in shown], left=True),
        Column("makes", [escape(step.makes) for step in shown], left=True),
        Column("returned", [_returned(step.ret) for step in shown]),
        Column("took", [duration(step.dur_ns) for step in shown]),
    ]
    left_out = len(bring_up.steps) - len(shown)
    more = [style.faint(f"  ... {count(left_out)} more (--format json)")] if left_out else []
    return [*table(columns, style), *more]


def _call(step: Any) -> str:
    return escape(step.name if step.name == step.call else f"{step.call} {step.name}")


def _returned(ret: int | None) -> str:
    if ret is None:
        return "?"
    return hex(ret) if ret > 0xFFFFFF else str(ret)


def _verdict(step: Any, style: Style) -> list[str]:
    paint = style.bad if step.verdict == "violation" else style.warn
    words = (f"{step.verdict}: {step.name} on {step.object} returned {_returned(step.ret)}: {step.sentence} "
             f"({step.source})")
    lines = textwrap.wrap(escape(words), WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    return [paint(line) for line in lines]


def replay_line(report: Report, style: Style) -> list[str]:
    """Return the replay's verdict for the report's first lines."""
    if report.replay is None:
        return []
    from kvmtrace.compare.alignment_text import describe_replay

    words = textwrap.wrap(escape(describe_replay(report.replay)), WIDTH, initial_indent="  Replay:  ",
                          subsequent_indent=" " * 11, break_on_hyphens=False)
    return [style.bad(line) for line in words] if report.replay.differences else words


def replay_sections(report: Report, style: Style) -> list[str]:
    """Return where prediction and recording differ; nothing if they agree."""
    if report.replay is None or not report.replay.differences:
        return []
    from kvmtrace.compare.alignment_text import render_replay

    lines = [escape(line)[:WIDTH] for line in render_replay(report.replay).splitlines()]
    return [style.title("Replay of the guest: where prediction and recording differ"), *lines, ""]
