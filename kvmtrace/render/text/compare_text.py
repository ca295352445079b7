"""The comparison of two sets of recordings as text, and as JSON."""

from __future__ import annotations

import json
import math
import textwrap
from typing import TYPE_CHECKING, Any

from kvmtrace.isa.registry import describe_exit_reason
from kvmtrace.kvm.userspace_exits import describe_userspace_exit_reason
from kvmtrace.render.terminal import ABSENT, Column, Style, count, duration, escape, plural, table
from kvmtrace.render.text.text_tables import BUDGET_PARTS

if TYPE_CHECKING:
    from kvmtrace.ab.recordings import Change, Measured, RecordingComparison
    from kvmtrace.ab.run import Key

SCHEMA = "kvmtrace.compare/1"


def describe_key(key: Key) -> str:
    """Name a population: "CPUID", "IO_INSTRUCTION (userspace)", "VMM: KVM_EXIT_IO"."""
    if key.kind == "userspace":
        return f"VMM after {describe_userspace_exit_reason(key.reason)}"
    name = describe_exit_reason(key.isa, key.reason)
    return f"{name}, to the VMM" if key.path == "userspace" else name


def describe_quantity(change: Change, value: float) -> str:
    """Return a latency in us or a rate per second."""
    return f"{value:,.1f} /s" if change.metric == "rate" else f"{value / 1000:,.2f} us"


def describe_percent(ratio: float) -> str:
    """Return a ratio as a change in percent."""
    if math.isinf(ratio):
        return "new"
    return "gone" if ratio == 0 else f"{(ratio - 1) * 100:+.1f} %"


def headline(result: RecordingComparison) -> str:
    """Say in one line what changed, or that it cannot be told."""
    changes = result.significant
    if not changes:
        if not result.comparable:
            return f"not comparable: {result.obstacles[0].why}"
        tested = len({change.key for change in result.changes})
        return f"no significant change ({plural(len(result.changes), 'test')} on {plural(tested, 'kind')} of exit)"
    worst = max(changes, key=lambda c: abs(math.log(c.ratio)) if 0 < c.ratio < math.inf else math.inf)
    regressions = sum(change.regression for change in changes)
    return (
        f"{len(changes)} significant {'change' if len(changes) == 1 else 'changes'}, {regressions} of them "
        f"{'a regression' if regressions == 1 else 'regressions'}; the largest: "
        f"{describe_key(worst.key)} {worst.metric} {describe_percent(worst.ratio)}"
    )


def before_and_after(result: RecordingComparison) -> list[tuple[str, tuple[Measured | None, Measured | None], str]]:
    """Return (name, both sides, change of the median) of each key, those with the most time first.

    The change is "" where it was not tested, "~" where the test found none.
    """
    medians = {change.key: change for change in result.changes if change.metric == "p50"}
    rows = []
    for key, sides in result.measured.items():
        change = medians.get(key)
        word = "" if change is None else describe_percent(change.ratio) if change.significant else "~"
        spent = max((side.count * (side.p50_ns or 0) for side in sides if side is not None), default=0)
        rows.append((spent, describe_key(key), sides, word))
    return [row[1:] for row in sorted(rows, key=lambda row: (-row[0], row[1]))]


def _before_and_after_lines(result: RecordingComparison) -> list[str]:
    rows = before_and_after(result)
    if not rows:
        return []

    def cells(side: int, of: str) -> list[str]:
        values = [getattr(sides[side], of, None) for _, sides, _ in rows]
        return [count(value) if of == "count" else duration(value) for value in values]

    columns = [
        Column("exit", [name for name, _, _ in rows], left=True, flexible=True),
        *(Column(f"count {which}", cells(side, "count")) for side, which in enumerate(("base", "new"))),
        *(Column(f"p50 {which}", cells(side, "p50_ns")) for side, which in enumerate(("base", "new"))),
        Column("change", [word or ABSENT for _, _, word in rows]),
        *(Column(f"p99 {which}", cells(side, "p99_ns")) for side, which in enumerate(("base", "new"))),
    ]
    note = "" if result.comparable else ": side by side, not compared"
    return [f"Before and after{note}", *table(columns, Style())]


def _change_rows(changes: tuple[Change, ...]) -> list[str]:
    lines = [f"  {'exit':<26} {'metric':<6} {'base':>13} {'new':>13} {'change':>9}  95 % interval"]
    for change in changes:
        interval = (
            ""
            if math.isinf(change.ratio) or change.ratio == 0
            else (f"[{describe_percent(change.low)} .. {describe_percent(change.high)}]")
        )
        lines.append(
            f"  {describe_key(change.key)[:26]:<26} {change.metric:<6} {describe_quantity(change, change.base):>13} "
            f"{describe_quantity(change, change.new):>13} {describe_percent(change.ratio):>9}  {interval}".rstrip()
        )
    return lines


def render_comparison_text(result: RecordingComparison, *, everything: bool = False) -> str:
    """Render a comparison within 100 columns; with `everything`, the insignificant tests too."""
    lines = [headline(result), ""]
    for obstacle in result.obstacles:
        lines += textwrap.wrap(obstacle.describe(), 98, subsequent_indent="  ")
    lines += [
        *([""] if result.obstacles else []),
        f"base: {', '.join(map(escape, result.base_runs))}",
        f"new:  {', '.join(map(escape, result.new_runs))}",
    ]
    if result.changes:
        lines.append(f"unit of comparison: {result.unit}; Welch's t on log values, Holm-corrected")
    lines.append("")
    shown = result.changes if everything else result.significant
    if shown:
        lines += ["All tests" if everything else "Significant changes", *_change_rows(shown), ""]
    lines += _before_and_after_lines(result)
    if result.budget_share:
        words = {field: word for word, field in BUDGET_PARTS}
        lines += ["", "Time budget of all vCPUs (share of wall time)", f"  {'part':<38} {'base':>14} {'new':>14}"]
        lines += [
            f"  {words.get(part, part):<38} {describe_share(base):>14} {describe_share(new):>14}"
            for part, (base, new) in result.budget_share.items()
            if base or new
        ]
    lines += _model_lines(result)
    for note in result.notes:
        lines += textwrap.wrap(f"note: {note}", 98, subsequent_indent="      ")
    return "\n".join(lines).rstrip() + "\n"


def describe_share(share: float | None) -> str:
    """Return a share in percent, "-" where it is not known."""
    return ABSENT if share is None else f"{share:.1%}"


def _model_lines(result: RecordingComparison) -> list[str]:
    lines: list[str] = []
    for title, edges in (("appear", result.transitions_appeared), ("vanish", result.transitions_vanished)):
        if edges:
            lines += ["", f"Model transitions that {title}"]
            lines += [
                f"  {source} --{event}--> {target}: {count:,}"
                for (source, event, target), count in sorted(edges.items(), key=lambda item: -item[1])
            ]
    if any(result.violations):
        lines += ["", f"Violations of the model: base {result.violations[0]}, new {result.violations[1]}"]
    return [*lines, ""]


def comparison_document(result: RecordingComparison) -> dict[str, Any]:
    """Return the comparison as a JSON-ready object, schema kvmtrace.compare/1; infinite ratios are null."""

    def number(value: float) -> float | None:
        return value if math.isfinite(value) else None

    def name(key: Key) -> dict[str, Any]:
        return {
            "kind": key.kind,
            "isa": key.isa or None,
            "reason": key.reason,
            "path": key.path,
            "name": describe_key(key),
        }

    def dump_side(side: Measured | None) -> dict[str, Any] | None:
        return None if side is None else dict(vars(side))

    return {
        "schema": SCHEMA,
        "base": list(result.base_runs),
        "new": list(result.new_runs),
        "unit": result.unit,
        "comparable": result.comparable,
        "not_compared": [{"what": sorted(obstacle.quantities), "why": obstacle.why} for obstacle in result.obstacles],
        "significant": bool(result.significant),
        "regressed": result.regressed,
        "counts": [{**name(key), "base": base, "new": new} for key, (base, new) in result.counts.items()],
        "measured": [
            {**name(key), "base": dump_side(base), "new": dump_side(new)}
            for key, (base, new) in result.measured.items()
        ],
        "changes": [
            {
                **name(c.key),
                "metric": c.metric,
                "base": c.base,
                "new": c.new,
                "ratio": number(c.ratio),
                "low": number(c.low),
                "high": number(c.high),
                "p_value": c.p_value,
                "significant": c.significant,
                "regression": c.regression,
            }
            for c in result.changes
        ],
        "untested": [name(key) for key in result.untested],
        "budget_share": {part: {"base": base, "new": new} for part, (base, new) in result.budget_share.items()},
        "transitions_appeared": [[*edge, n] for edge, n in result.transitions_appeared.items()],
        "transitions_vanished": [[*edge, n] for edge, n in result.transitions_vanished.items()],
        "violations": {"base": result.violations[0], "new": result.violations[1]},
        "notes": list(result.notes),
    }


def render_comparison_json(result: RecordingComparison) -> str:
    """Render a comparison as JSON."""
    return json.dumps(comparison_document(result), indent=1) + "\n"
