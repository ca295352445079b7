"""The lifecycle diagram as SVG text: boxes, arrows, labels; no renderer, font or script from outside.

Colours are CSS variables with defaults for light and dark, so that a page can override them with
`.kvmtrace-lifecycle { --kt-accent: ... }`.
"""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from kvmtrace.model.states import STATES
from kvmtrace.render.model.diagram import HUB, Edge, group_edges, loop_states
from kvmtrace.render.model.diagram_layout import (
    EDGE_PATHS,
    HEIGHT,
    HUB_RADIUS,
    LANES,
    LOOP_BOX,
    NODE_HEIGHT,
    NODE_WIDTH,
    POSITIONS,
    WIDTH,
    Path,
    Point,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_CORNER = 10.0  # radius of rounded corners
_LINE = 13.0  # line height of labels

_STYLE = """
.kvmtrace-lifecycle{--kt-back:#ffffff;--kt-ink:#1f2328;--kt-soft:#59636e;--kt-line:#6e7781;--kt-idle:#c4cad1;
--kt-node:#f6f8fa;--kt-border:#8c959f;--kt-guest:#dafbe1;--kt-guest-border:#1a7f37;--kt-user:#ddf4ff;
--kt-user-border:#0969da;--kt-accent:#0550ae;--kt-lane-a:#f6f8fa;--kt-lane-b:#ffffff;--kt-lane-c:#fff8ec;
--kt-loop:#d4a72c;font-family:system-ui,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
@media (prefers-color-scheme:dark){.kvmtrace-lifecycle{--kt-back:#0d1117;--kt-ink:#f0f6fc;--kt-soft:#9198a1;
--kt-line:#9198a1;--kt-idle:#3d444d;--kt-node:#151b23;--kt-border:#656c76;--kt-guest:#12261e;
--kt-guest-border:#3fb950;--kt-user:#121d2f;--kt-user-border:#4493f8;--kt-accent:#79c0ff;--kt-lane-a:#12171e;
--kt-lane-b:#0d1117;--kt-lane-c:#1a1710;--kt-loop:#9e6a03}}
.kvmtrace-lifecycle .page{fill:var(--kt-back)}
.kvmtrace-lifecycle .lane-a{fill:var(--kt-lane-a)}.kvmtrace-lifecycle .lane-b{fill:var(--kt-lane-b)}
.kvmtrace-lifecycle .lane-c{fill:var(--kt-lane-c)}
.kvmtrace-lifecycle .lane{fill:var(--kt-ink);font-size:13px;font-weight:600}
.kvmtrace-lifecycle .where{fill:var(--kt-soft);font-size:11px;font-weight:400}
.kvmtrace-lifecycle .box{fill:none;stroke:var(--kt-loop);stroke-dasharray:2 4;stroke-width:1.5}
.kvmtrace-lifecycle .node rect,.kvmtrace-lifecycle .node circle{fill:var(--kt-node);stroke:var(--kt-border);
stroke-width:1.5}
.kvmtrace-lifecycle .guest rect{fill:var(--kt-guest);stroke:var(--kt-guest-border)}
.kvmtrace-lifecycle .user rect{fill:var(--kt-user);stroke:var(--kt-user-border)}
.kvmtrace-lifecycle .node text{fill:var(--kt-ink);font-size:14px;font-weight:600}
.kvmtrace-lifecycle .hub text{font-size:11px;font-weight:400}
.kvmtrace-lifecycle .edge path{fill:none;stroke:var(--kt-line)}
.kvmtrace-lifecycle .edge.rare path{stroke-dasharray:5 4}
.kvmtrace-lifecycle .edge.idle path{stroke:var(--kt-idle)}
.kvmtrace-lifecycle .edge.taken path{stroke:var(--kt-accent)}
.kvmtrace-lifecycle .edge text{fill:var(--kt-soft);font-size:11.5px;stroke:var(--kt-back);stroke-width:3.5px;
stroke-linejoin:round;paint-order:stroke}
.kvmtrace-lifecycle .edge.idle text{fill:var(--kt-soft);opacity:.65}
.kvmtrace-lifecycle .edge .count{fill:var(--kt-accent);font-weight:600;font-variant-numeric:tabular-nums}
.kvmtrace-lifecycle .spoke{stroke:var(--kt-loop);stroke-dasharray:2 4;fill:none}
.kvmtrace-lifecycle .head{fill:var(--kt-line)}.kvmtrace-lifecycle .head-idle{fill:var(--kt-idle)}
.kvmtrace-lifecycle .head-taken{fill:var(--kt-accent)}
"""


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def _toward(start: Point, end: Point, distance: float) -> Point:
    """Return the point `distance` units from start on the way to end."""
    length = math.dist(start, end) or 1.0
    share = min(distance / length, 0.5)
    return start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share


def rounded_path(points: Sequence[Point]) -> str:
    """Return SVG path data of a polyline with rounded corners."""
    parts = [f"M{_number(points[0][0])} {_number(points[0][1])}"]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        (x0, y0), (x1, y1) = _toward(corner, before, _CORNER), _toward(corner, after, _CORNER)
        parts.append(
            f"L{_number(x0)} {_number(y0)}Q{_number(corner[0])} {_number(corner[1])} {_number(x1)} {_number(y1)}"
        )
    parts.append(f"L{_number(points[-1][0])} {_number(points[-1][1])}")
    return "".join(parts)


def _straight(source: str, target: str) -> Path:
    """Return a plain line for an edge that nobody has laid out."""
    start, end = POSITIONS[source], POSITIONS[target]
    gap = NODE_HEIGHT / 2 + 8
    begin, finish = _toward(start, end, gap), _toward(end, start, gap)
    return Path((begin, finish), ((begin[0] + finish[0]) / 2, (begin[1] + finish[1]) / 2))


def _stroke_width(count: int | None) -> float:
    """Return a width that grows with the logarithm of the count, 1.4 to 4.4 units."""
    return 1.6 if count is None else 1.2 if count == 0 else min(1.4 + 0.5 * math.log10(count), 4.4)


def _title(edge: Edge) -> str:
    words = [f"{row.state} → {row.next}: {row.event}. {row.sentence} [{row.source}]" for row in edge.transitions]
    words += [f"{state}, {event}: {count:,}" for state, event, count in edge.details]
    return escape("\n".join(words))


def _label(edge: Edge, path: Path) -> str:
    """Return the events' names and the count, one below the other, ending at the path's label point."""
    x, y = path.label
    lines = [(escape(event), "") for event in edge.events]
    if edge.count:
        lines.append((f"{edge.count:,}", ' class="count"'))
    top = y - _LINE * (len(lines) - 1)
    spans = "".join(
        f'<tspan x="{_number(x)}" y="{_number(top + _LINE * i)}"{attribute}>{words}</tspan>'
        for i, (words, attribute) in enumerate(lines)
    )
    return f'<text text-anchor="{path.anchor}">{spans}</text>'


def _path(edge: Edge) -> Path:
    return EDGE_PATHS.get((edge.source, edge.target)) or _straight(edge.source, edge.target)


def _use(edge: Edge) -> str:
    """Return how the recording used an edge: "" (no recording), "idle" or "taken"."""
    return "" if edge.count is None else "taken" if edge.count else "idle"


def _group(edge: Edge, inside: str) -> str:
    classes = " ".join(filter(None, ["edge", "rare" if edge.rare else "", _use(edge)]))
    return f'<g class="{classes}"><title>{_title(edge)}</title>{inside}</g>'


def _arrow(edge: Edge, prefix: str) -> str:
    marker = "-".join(filter(None, [prefix, "head", _use(edge)]))
    return _group(
        edge,
        f'<path d="{rounded_path(_path(edge).points)}" '
        f'stroke-width="{_number(_stroke_width(edge.count))}" marker-end="url(#{marker})"/>',
    )


def _node(name: str) -> str:
    x, y = POSITIONS[name]
    state = STATES[name]
    kind = "guest" if name == "guest" else "user" if name in {"user", "ioctl"} else ""
    return (
        f'<g class="node {kind}"><title>{escape(f"{state.where}: {state.sentence}")}</title>'
        f'<rect x="{_number(x - NODE_WIDTH / 2)}" y="{_number(y - NODE_HEIGHT / 2)}" width="{NODE_WIDTH}" '
        f'height="{NODE_HEIGHT}" rx="9"/><text x="{_number(x)}" y="{_number(y + 5)}" text-anchor="middle">'
        f"{escape(name.replace('_', ' '))}</text></g>"
    )


def _hub() -> str:
    x, y = POSITIONS[HUB]
    lines = "".join(f'<tspan x="{_number(x)}" dy="{dy}">{word}</tspan>' for word, dy in (("next", -3), ("pass", 13)))
    return (
        f'<g class="node hub"><title>vcpu_run: requests are served, then block, inject, enter or leave</title>'
        f'<circle cx="{_number(x)}" cy="{_number(y)}" r="{HUB_RADIUS}"/>'
        f'<text x="{_number(x)}" y="{_number(y)}" text-anchor="middle">{lines}</text></g>'
    )


def _spokes() -> Iterable[str]:
    """Yield the thin lines from the states of the run loop to the hub."""
    hub_x, hub_y = POSITIONS[HUB]
    for name in sorted(loop_states() & set(POSITIONS)):
        x, y = POSITIONS[name]
        side = 0.0 if x == hub_x else math.copysign(NODE_WIDTH / 2, hub_x - x)
        start = (x + side, y + (0 if side else math.copysign(NODE_HEIGHT / 2, hub_y - y)))
        end = _toward((hub_x, hub_y), start, HUB_RADIUS)
        shift = 10 if not side else 0
        yield (
            f'<path class="spoke" d="M{_number(start[0] + shift)} {_number(start[1])}'
            f'L{_number(end[0] + shift)} {_number(end[1])}"/>'
        )


def _background() -> Iterable[str]:
    yield f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>'
    for y, height, words, lane in LANES:
        yield f'<rect class="lane-{lane}" x="0" y="{y}" width="{WIDTH}" height="{height}"/>'
        for i, line in enumerate(words):
            kind = "lane" if i == 0 else "lane where"
            yield f'<text class="{kind}" x="14" y="{_number(y + 22 + 16 * i)}">{escape(line)}</text>'
    x, y, width, height = LOOP_BOX
    yield f'<rect class="box" x="{x}" y="{y}" width="{width}" height="{height}" rx="14"/>'


def _markers(prefix: str) -> str:
    head = (
        '<marker id="{}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" markerHeight="9" '
        'markerUnits="userSpaceOnUse" orient="auto-start-reverse"><path class="{}" d="M0 0L10 5L0 10z"/></marker>'
    )
    return "".join(head.format(f"{prefix}-head{kind}", f"head{kind}") for kind in ("", "-idle", "-taken"))


def _description(edges: Sequence[Edge], *, with_counts: bool) -> str:
    words = "States of a vCPU thread and the events between them, from KVM_RUN through guest mode and back."
    if with_counts:
        taken = [edge for edge in edges if edge.count]
        words += f" {len(taken)} of {len(edges)} kinds of transition were taken."
        top = sorted(taken, key=lambda edge: -(edge.count or 0))[:12]
        words += "".join(f" {edge.source} to {edge.target}: {edge.count:,}." for edge in top)
    return escape(words)


def draw(edges: Sequence[Edge], prefix: str, *, with_counts: bool) -> str:
    """Return the SVG element.

    With counts, edges of past kernels and of failures that the recording did not take are left out, and
    the arrows' width grows with the logarithm of their count.
    """
    shown = [edge for edge in edges if not (with_counts and edge.rare and not edge.count)]
    shown.sort(key=lambda edge: (edge.count or 0, not edge.rare))  # what matters is drawn on top
    names = {name for edge in edges for name in (edge.source, edge.target)} - {HUB}
    body = [
        *_background(),
        *_spokes(),
        *(_arrow(edge, prefix) for edge in shown),
        _hub(),
        *(_node(name) for name in STATES if name in names and name in POSITIONS),
        *(_group(edge, _label(edge, _path(edge))) for edge in shown),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="kvmtrace-lifecycle" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-labelledby="{prefix}-title {prefix}-desc"><title id="{prefix}-title">'
        f'Lifecycle of a vCPU in KVM_RUN</title><desc id="{prefix}-desc">'
        f"{_description(edges, with_counts=with_counts)}</desc><style>{_STYLE}</style>"
        f"<defs>{_markers(prefix)}</defs>{''.join(body)}</svg>\n"
    )


def render_svg(
    counts: Mapping[tuple[str, str, str], int] | None = None, isa: str | None = None, id_prefix: str = "kvmtrace"
) -> str:
    """Return the lifecycle as one self-contained SVG element, readable in light and dark.

    Parameters
    ----------
    counts : (state, event, next state) -> how often a recording took it; None draws the bare model
    isa : name of an ISA, to leave out the others' events; None for all
    id_prefix : str, put before the ids inside, so that several pictures fit into one page
    """
    return draw(group_edges(counts, isa), id_prefix, with_counts=counts is not None)
