"""What the viewer answers: the report as a page, any stretch of its timeline, and where things are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.render.html import render_html
from kvmtrace.render.html.timeline_data import pack_stretch
from kvmtrace.view.finding import Finder
from kvmtrace.view.server import FIND, PAGE, STRETCH, ViewServer, as_json, number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmtrace.report.document import Report
    from kvmtrace.report.over_time import Timeline
    from kvmtrace.report.stretches import Stretches

MOST_BINS = 4096
MOST_WORDS = 200


def serve_report(report: Report, stretches: Stretches | None, port: int = 0) -> ViewServer:
    """Return a server, not yet running, of a report and what it was made of.

    Parameters
    ----------
    stretches : of the report's timeline; None if it has none
    port : 0 for any that is free
    """
    server = ViewServer(port)
    page = render_html(report, server.path if stretches else "").encode()
    server.answers[PAGE] = lambda _: page
    if report.timeline is not None and stretches is not None:
        timeline, finder = report.timeline, Finder(report.timeline, stretches)
        server.answers[STRETCH] = lambda given: _stretch(timeline, stretches, given)
        server.answers[FIND] = lambda given: _find(finder, given)
    return server


def _stretch(timeline: Timeline, stretches: Stretches, given: Mapping[str, str]) -> bytes:
    begin = number(given, "from", 0, timeline.length_ns)
    end = number(given, "to", begin + 1, max(timeline.length_ns, begin + 1))
    windows, bins = stretches.at_level(begin, end, number(given, "bins", 1, MOST_BINS))
    words = {"whole": stretches.is_whole(begin, end)}
    return pack_stretch(windows, bins, timeline.follow_ups, words, level=1)


def _find(finder: Finder, given: Mapping[str, str]) -> bytes:
    words = given.get("words", "").strip()[:MOST_WORDS]
    if not words:
        raise ValueError("words: what to look for is needed")
    return as_json(finder.next(words, number(given, "after", -2, 1 << 62)))
