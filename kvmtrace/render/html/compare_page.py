"""The comparison of two sets of recordings as one self-contained HTML file."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from kvmtrace import __version__
from kvmtrace.render.html.charts import part_class
from kvmtrace.render.html.html_tables import Cell, HtmlTable
from kvmtrace.render.html.page import PARTS, html_environment
from kvmtrace.render.terminal import count, escape
from kvmtrace.render.text.compare_text import describe_key, describe_percent, describe_quantity, headline

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
    counts = HtmlTable(
        "counts",
        "VM-exits and userspace exits",
        "",
        (("exit", False), ("base", True), ("new", True)),
        tuple(
            (Cell(describe_key(key)), Cell(count(base), base), Cell(count(new), new))
            for key, (base, new) in sorted(result.counts.items(), key=lambda item: -sum(item[1]))
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
    return [table for table in (changes, counts, transitions) if table.rows]


def _bars(result: RecordingComparison) -> list[tuple[str, str, list[tuple[str, str, str]]]]:
    """Return (side, words, (class, width in percent, title) of each part)."""
    bars = []
    for side, index in (("base", 0), ("new", 1)):
        shares = [
            (name, result.budget_share[field][index])
            for field, name in PARTS.items()
            if field in result.budget_share and result.budget_share[field][index] > 0
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
        "unit": result.unit,
        "notes": result.notes,
        "verdict": "bad" if result.regressed else "warn" if result.significant else "good",
        "violations": result.violations,
        "tables": _tables(result),
        "bars": _bars(result),
        "version": __version__,
        "parts": [(name, part_class(name)) for name in PARTS.values()],
    }
    return template.render(page=page, style=own("style.css"), script=own("script.js"))
