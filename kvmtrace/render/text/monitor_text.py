"""What `kvmtrace record --monitor` wrote, as text: what was forbidden, then the transitions with their counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.render.terminal import Column, count, escape, plural, table

if TYPE_CHECKING:
    from kvmtrace.formats.summary.monitor_file import ForbiddenTransition, Monitored
    from kvmtrace.render.terminal import Style

SHOWN = 20


def render_monitored(found: Monitored, path: str, style: Style) -> str:
    """Return the file as text."""
    seconds = (found.meta.get("duration_ns") or 0) / 1e9
    verdict = f"{plural(found.n_forbidden, 'step')} that the model forbids" if found.n_forbidden else "conforms"
    steps = sum(row.count for row in found.transitions)
    lines = [
        style.title(f"kvmtrace monitor: {escape(path)}"),
        f"  {(style.bad if found.n_forbidden else style.good)(verdict)}; {count(steps)} steps in {seconds:,.1f} s",
        *(f"  note: {escape(str(note))}" for note in found.meta.get("notes", [])),
        "",
    ]
    for one in found.forbidden[:SHOWN]:
        lines += [*_forbidden(one, style), ""]
    if len(found.forbidden) > SHOWN:
        lines += [style.faint(f"... {len(found.forbidden) - SHOWN:,} more in the file"), ""]
    columns = [
        Column("state", [escape(row.from_state) for row in found.transitions], left=True),
        Column("step", [escape(row.event) for row in found.transitions], left=True),
        Column("next state", [escape(row.to_state) for row in found.transitions], left=True),
        Column("count", [count(row.count) for row in found.transitions]),
        Column("", ["" if row.allowed else "FORBIDDEN" for row in found.transitions], left=True),
    ]
    if found.transitions:
        lines += [style.title("Transitions"), *table(columns, style)]
    return "\n".join(lines).rstrip("\n") + "\n"


def _forbidden(one: ForbiddenTransition, style: Style) -> list[str]:
    """Return a forbidden step, and those before it."""
    words = f"{escape(one.step)} in state {escape(one.state)}: thread {one.tid} of process {one.pid}"
    lines = [style.bad(f"Forbidden: {words}")]
    for state, step, ts_ns in one.last:
        mark = ">" if ts_ns == one.ts_ns and step == one.step else " "
        lines.append(f"  {mark} {(ts_ns - one.ts_ns) / 1000:+12.3f} us  {escape(state):<14} {escape(step)}")
    return lines
