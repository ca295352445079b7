"""The diagram says what the table says, and is a sane SVG."""

from __future__ import annotations

import re
import shutil
import subprocess
from xml.etree import ElementTree as ET

import pytest

from kvmtrace.model.states import STATES
from kvmtrace.model.transitions import TRANSITIONS
from kvmtrace.render.model.diagram import HUB, group_edges, loop_states, render_dot
from kvmtrace.render.model.diagram_layout import (
    EDGE_PATHS,
    HEIGHT,
    NODE_HEIGHT,
    NODE_WIDTH,
    POSITIONS,
    WIDTH,
)
from kvmtrace.render.model.diagram_svg import render_svg, rounded_path

SVG = "{http://www.w3.org/2000/svg}"
COUNTS = {
    ("user", "call KVM_RUN", "run_called"): 7,
    ("handling", "VM-entry", "guest"): 1000,
    ("loaded", "VM-entry", "guest"): 7,
    ("guest", "VM-exit", "exited"): 1007,
}


def test_every_transition_is_on_exactly_one_edge() -> None:
    drawn = [row for edge in group_edges() for row in edge.transitions]
    assert sorted(drawn) == sorted(TRANSITIONS)


def test_states_and_edges_are_laid_out() -> None:
    assert set(STATES) | {HUB} == set(POSITIONS)
    pairs = {(edge.source, edge.target) for edge in group_edges()}
    assert pairs <= set(EDGE_PATHS), pairs - set(EDGE_PATHS)
    assert not set(EDGE_PATHS) - pairs, "a path for an edge that the model does not have"


def test_boxes_do_not_overlap_and_everything_is_inside() -> None:
    centres = list(POSITIONS.values())
    for i, (x, y) in enumerate(centres):
        for other_x, other_y in centres[i + 1 :]:
            assert abs(x - other_x) >= NODE_WIDTH or abs(y - other_y) >= NODE_HEIGHT
    for path in EDGE_PATHS.values():
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in (*path.points, path.label))


def test_edges_begin_and_end_at_their_boxes() -> None:
    for (source, target), path in EDGE_PATHS.items():
        for name, (x, y) in ((source, path.points[0]), (target, path.points[-1])):
            centre_x, centre_y = POSITIONS[name]
            if name != HUB:
                assert abs(x - centre_x) <= NODE_WIDTH / 2 + 0.5, (source, target)
                assert abs(y - centre_y) <= NODE_HEIGHT / 2 + 0.5, (source, target)


def test_the_run_loop_is_found_in_the_table() -> None:
    assert loop_states() == {"loaded", "woken", "injecting", "exited", "handling"}


def test_counts_are_summed_over_the_loop() -> None:
    edges = {(edge.source, edge.target): edge for edge in group_edges(COUNTS)}
    assert edges[HUB, "guest"].count == 1007
    assert edges[HUB, "guest"].details == (("loaded", "VM-entry", 7), ("handling", "VM-entry", 1000))
    assert edges["left", "returned"].count == 0
    assert all(edge.count is None for edge in group_edges())


def test_a_transition_from_an_unknown_state_is_drawn() -> None:
    edges = group_edges({("unknown", "VM-exit", "exited"): 2})
    assert [edge.count for edge in edges if edge.source == "unknown"] == [2]
    ET.fromstring(render_svg({("unknown", "VM-exit", "exited"): 2}))


@pytest.mark.parametrize("isa", ["vmx", "svm"])
def test_an_isa_leaves_out_the_other(isa: str) -> None:
    events = {event for edge in group_edges(isa=isa) for event in edge.events}
    assert ("run VMX" in events) == (isa == "vmx")
    assert ("run SVM returns" in events) == (isa == "svm")
    states = {name for edge in group_edges(isa=isa) for name in (edge.source, edge.target)}
    assert ("switched_out" in states) == (isa == "svm")


@pytest.mark.parametrize("counts", [None, COUNTS, {}], ids=["bare", "counts", "empty"])
def test_svg_is_well_formed_and_self_contained(counts: dict[tuple[str, str, str], int] | None) -> None:
    text = render_svg(counts)
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert root.find(f"{SVG}title") is not None
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert not re.search(r"(?:href|src|@import|url\((?!#))", text)
    referenced = set(re.findall(r"url\(#([^)]+)\)", text))
    assert referenced <= set(ids)
    words = "".join(element.text or "" for element in root.iter(f"{SVG}tspan"))
    assert ("1,007" in words) == (counts == COUNTS)


def test_two_pictures_fit_into_one_page() -> None:
    first, second = (set(re.findall(r' id="([^"]+)"', render_svg(id_prefix=name))) for name in ("a", "b"))
    assert first
    assert not first & second


def test_rounded_path() -> None:
    assert rounded_path(((0, 0), (40, 0), (40, 40))) == "M0 0L30 0Q40 0 40 10L40 40"


@pytest.mark.skipif(not shutil.which("dot"), reason="Graphviz is not needed, only compared with, where present")
def test_graphviz_accepts_the_dot_text() -> None:
    done = subprocess.run(["dot", "-Tplain"], input=render_dot(COUNTS), capture_output=True, text=True, check=True)
    assert not done.stderr
    nodes = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("node ")}
    assert nodes == (set(STATES) - {"unknown"}) | {HUB}
