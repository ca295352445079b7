"""The comparison of two sets of recordings as one self-contained HTML file."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from kvmtrace import __version__
from kvmtrace.render.html.charts import part_class
from kvmtrace.render.html.html_cells import Cell, HtmlTable
from kvmtrace.render.html.page import PARTS, html_environment
from kvmtrace.render.terminal import count, duration, escape
from kvmtrace.render.text.compare_text import (
    before_and_after,
    describe_key,
    describe_percent,
    describe_quantity,
    headline,
)

if TYPE_CHECKING:
    from kvmtrace.ab.recordings import Change, RecordingComparison


def _ratio(ratio: float) -> Cell:
    # "new" sorts above everything, "gone" below
    value = 1e9 if math.isinf(ratio) else ratio
    return Cell(describe_percent(ratio), value)


def _change_cells(change: Change) -> tuple[Cell, ...]:
    bounded = 0 < change.ratio < math.inf
    interval = f"{describe_percent(change.low)} .. {describe_percent(change.high)}" if bounded else ""
    verdict = "regression" if change.regression else "improvement" if change.significant else "no change"
    return (
        Cell(describe_key(change.key)),
        Cell(change.metric),
        Cell(describe_quantity(change, change.base), change.base),
        Cell(describe_quantity(change, change.new), change.new),
        _ratio(change.ratio),
        Cell(interval),
        Cell(f"{change.p_value:.2g}", change.p_value),
        Cell(verdict),
    )


def _tables(result: RecordingComparison) -> list[HtmlTable]:
    columns = (
        ("exit", False),
        ("metric", False),
        ("base", True),
        ("new", True),
        ("change", True),
        ("95 % interval", False),
        ("p (corrected)", True),
        ("verdict", False),
    )
    ordered = sorted(result.changes, key=lambda c: (not c.significant, c.p_value))
    changes = HtmlTable(
        "changes",
        "Tests",
        "Significant ones first; a change below the smallest effect is none.",
        columns,
        tuple(_change_cells(change) for change in ordered),
    )
    measured = HtmlTable(
        "measured",
        "Before and after",
        "Side by side, tested or not; the change is told where it is significant, ~ says that it is not."
        if result.comparable
        else "Side by side, not compared.",
        (
            ("exit", False),
            *((f"{what} {side}", True) for what in ("count", "p50", "p99") for side in ("base", "new")),
            ("change of p50", True),
        ),
        tuple(
            (
                Cell(name),
                *(Cell(count(getattr(side, "count", None)), getattr(side, "count", None) or 0) for side in sides),
                *(
                    Cell(duration(getattr(side, of, None)), getattr(side, of, None) or 0)
                    for of in ("p50_ns", "p99_ns")
                    for side in sides
                ),
                Cell(change or "-"),
            )
            for name, sides, change in before_and_after(result)
        ),
    )
    edges = [(*edge, n, "appears") for edge, n in result.transitions_appeared.items()]
    edges += [(*edge, n, "vanishes") for edge, n in result.transitions_vanished.items()]
    transitions = HtmlTable(
        "edges",
        "Transitions of the model that only one side took",
        "",
        (("from", False), ("event", False), ("to", False), ("count", True), ("in the new side it", False)),
        tuple((Cell(a), Cell(b), Cell(c), Cell(count(n), n), Cell(word)) for a, b, c, n, word in edges),
    )
    return [table for table in (changes, measured, transitions) if table.rows]


def _verdict(result: RecordingComparison) -> str:
    """Return the class of the colour that the result has."""
    if result.regressed:
        return "bad"
    return "warn" if result.significant or not result.comparable else "good"


def _bars(result: RecordingComparison) -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """Return (side, words, (class, width in percent, title) of each part)."""
    bars = []
    for side, index in (("base", 0), ("new", 1)):
        shares = [
            (name, share)
            for field, name in PARTS.items()
            if (share := result.budget_share.get(field, (None, None))[index])
        ]
        words = ", ".join(f"{name} {share:.1%}" for name, share in shares)
        bars.append(
            (side, words, [(part_class(name), f"{100 * share:.3f}", f"{name}: {share:.1%}") for name, share in shares])
        )
    return bars if result.budget_share else []


def render_comparison_html(result: RecordingComparison) -> str:
    """Render a comparison; everything from the recordings is escaped."""
    from markupsafe import Markup

    here = files("kvmtrace.render.html")

    def own(name: str) -> Any:
        return Markup((here / name).read_text(encoding="utf-8"))  # noqa: S704 (files of this package)

    template = html_environment().get_template("recordings.html.j2")
    page = {
        "headline": headline(result),
        "base": [escape(name) for name in result.base_runs],
        "new": [escape(name) for name in result.new_runs],
        "unit": result.unit if result.changes else "",
        "notes": [*(obstacle.describe() for obstacle in result.obstacles), *result.notes],
        "verdict": "warn"
        if not result.comparable
        else "bad"
        if result.regressed
        else "warn"
        if result.significant
        else "good",
        "violations": result.violations,
        "tables": _tables(result),
        "bars": _bars(result),
        "version": __version__,
        "parts": [(name, part_class(name)) for name in PARTS.values()],
    }
    return template.render(page=page, style=own("style.css"), script=own("script.js"))
