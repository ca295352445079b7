"""Turn a report document into what the HTML template shows: texts, bars and tables, nothing left to compute."""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from kvmtrace import __version__
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.render.headline import headline
from kvmtrace.render.html import charts, html_tables, timeline_data
from kvmtrace.render.html.bring_up_tables import bring_up_tables
from kvmtrace.render.html.nested_tables import nested_tables
from kvmtrace.render.saved_because import saved_because
from kvmtrace.render.terminal import Style, count, duration, escape, percent, plural
from kvmtrace.render.text.event_fields import describe_fields
from kvmtrace.render.text.header_text import capture_line, filter_line, is_lossy, loss_line
from kvmtrace.render.text.model_text import (
    cannot_show,
    explain_command,
    meaning_of,
    unchecked_rules,
    unseen_parts,
    verdict_line,
)
from kvmtrace.render.text.text_tables import BUDGET_PARTS
from kvmtrace.spans.slices import PART_NAMES

if TYPE_CHECKING:
    from jinja2 import Environment

    from kvmtrace.check.verdict import Comparison
    from kvmtrace.report.document import Report
    from kvmtrace.report.over_time import Timeline
    from kvmtrace.stats.rows import VcpuRow

MAX_HISTOGRAMS = 12
MAX_VIOLATIONS = 50
CONTEXT_BEFORE, CONTEXT_AFTER = 8, 4
# budget field -> name of the part, in the order of the bars
PARTS = {field: word for word, field in BUDGET_PARTS}
assert list(PARTS.values()) == list(PART_NAMES.values())


@dataclass(frozen=True)
class BudgetBar:
    """One vCPU's row of the budget table."""

    label: str
    wall: str
    words: str
    bars: tuple[tuple[str, str, str], ...]  # class, width in percent, title
    cells: tuple[str, ...]
    migrations: str


def _budget(vcpu: VcpuRow) -> BudgetBar:
    values = {name: getattr(vcpu.budget, field) for field, name in PARTS.items()}
    wall = max(vcpu.wall_ns, 1)
    shown = [(name, value) for name, value in values.items() if value]
    label = f"{'?' if vcpu.vcpu_id is None else vcpu.vcpu_id} ({escape(vcpu.comm or 'thread')} {vcpu.tid})"
    label += f" of {escape(vcpu.vm)}" if vcpu.vm else ""
    return BudgetBar(
        label,
        duration(vcpu.wall_ns),
        f"vCPU {label}: " + ", ".join(f"{name} {percent(value, wall)}" for name, value in shown),
        tuple(
            (charts.part_class(name), f"{100 * value / wall:.3f}", f"{name}: {duration(value)}")
            for name, value in shown
        ),
        tuple("-" if value is None else percent(value, wall) for value in values.values()),
        count(vcpu.migrations),
    )


def _violations(report: Report, model: Comparison) -> list[dict[str, Any]]:
    found = []
    for v in model.violations[:MAX_VIOLATIONS]:
        at = next((i for i, event in enumerate(v.context) if event.event_index == v.event_index), 0)
        around = v.context[max(0, at - CONTEXT_BEFORE) : at + CONTEXT_AFTER + 1]
        lines = [
            (
                f"{(event.ts_ns - v.ts_ns) / 1000:+12.3f} us  cpu {event.cpu}  {escape(event.event)}  "
                + ", ".join(describe_fields(event.event, event.fields)),
                event.event_index == v.event_index,
            )
            for event in around
        ]
        vcpu = "?" if v.vcpu_id is None else v.vcpu_id
        number = f", VM-exit {v.vm_exit}" if v.vm_exit else ""
        vcpu = f"{vcpu} of {escape(v.vm)}" if v.vm else vcpu
        where = f"vCPU {vcpu}{number}, thread {v.tid}, CPU {v.cpu}, event {v.event_index:,}"
        found.append(
            {
                "severity": v.severity,
                "title": f"{v.severity} of {v.rule} at {v.ts_ns / 1e9:.9f} s: {where}",
                "expected": escape(v.expected),
                "observed": escape(v.observed),
                "why": v.why,
                "source": v.source,
                "context": lines,
                "command": escape(explain_command(v, report.capture.path)),
                "link": timeline_data.link(report, v.tid, v.ts_ns),
            }
        )
    return found


def _model_part(report: Report) -> dict[str, Any]:
    model = report.model
    if model is None:
        return {"violations": [], "rules": None, "verdict_class": "warn"}
    from kvmtrace.render.model.diagram_svg import render_svg

    edges = {(t.from_state, t.event, t.to_state): t.count for t in model.transitions}
    coverage = model.coverage
    shown = _violations(report, model)
    total = model.n_violations + model.n_suspicions
    return {
        "violations": shown,
        "more_violations": f"{len(shown)} of {total:,} are shown, in recorded order." if total > len(shown) else "",
        "rules": html_tables.rule_table(model, meaning_of),
        "transitions": html_tables.transition_table(model),
        "diagram": _safe(render_svg(edges)) if edges else "",
        "cannot_see": cannot_show(model, whole=False),
        "not_checked": unchecked_rules(model) + list(model.rule_errors),
        "unseen_parts": unseen_parts(model),
        "coverage": (
            f"Coverage: {coverage.states_seen} of {coverage.states_in_model} states, "
            f"{coverage.transitions_seen} of {coverage.transitions_in_model} transitions, "
            f"{coverage.exit_reasons_seen} of {coverage.exit_reasons_in_model} exit reasons."
        ),
        "verdict_class": "bad"
        if model.n_violations
        else "warn"
        if model.n_suspicions or model.verdict != "conforms"
        else "good",
    }


def _safe(svg: str) -> Any:
    from markupsafe import Markup

    return Markup(svg)  # noqa: S704 (made by our own code from numbers and escaped text)


def _time_part(report: Report, *, live: str) -> dict[str, Any]:
    timeline: Timeline | None = report.timeline
    page: dict[str, Any] = {"timeline": "", "live": live, "charts": [], "histograms": []}
    drawn: list[charts.Chart] = []
    if timeline is not None:
        packed = timeline_data.timeline_bytes(report, timeline)
        page |= {
            "timeline": base64.b64encode(packed).decode(),
            "timeline_note": timeline_data.note(timeline, live=bool(live)),
            "levels": any(one.levels for one in timeline.windows) or any(one.level for one in timeline.bins),
            "chosen": timeline_data.chosen_words(timeline),
        }
    if report.rate is not None:
        start, length = report.capture.start_ns or 0, report.capture.duration_ns or 1
        origin = (timeline.start_ns, timeline.length_ns) if timeline else (start, length)
        drawn.append(charts.rate_chart(report.rate, *origin))
    if timeline is not None and (latency := charts.latency_chart(timeline)):
        drawn.append(latency)
    page["charts"] = [(i, chart["title"]) for i, chart in enumerate(drawn) if chart["series"]]
    histograms = _histograms(report)
    page["histograms"] = [(len(drawn) + i, chart["title"]) for i, chart in enumerate(histograms)]
    page["chart_data"] = script_json([*drawn, *histograms])
    return page


def script_json(value: Any) -> Any:
    """Return JSON that is safe inside a script element."""
    text = json.dumps(value, separators=(",", ":"))
    return _safe(text.replace("<", "\\u003c").replace("&", "\\u0026").replace("\u2028", "\\u2028"))


def _histograms(report: Report) -> list[charts.Chart]:
    made = []
    for row in sorted(report.exits, key=lambda row: -(row.total_ns or 0))[:MAX_HISTOGRAMS]:
        title = charts.histogram_title(row.name, plural(row.samples, "sample"), row.p50_ns, row.p99_ns)
        chart = charts.histogram_chart(row.fine_histogram, title)
        if chart:
            made.append(chart)
    return made


def _bring_up(report: Report) -> dict[str, Any]:
    made = report.bring_up
    if made is None or not (made.steps or made.vmm):
        return {"bring_up": []}
    verdict = "KVM answered every call as it must" if made.conforms else f"{made.n_violations} violations"
    explained = f", {plural(made.n_explained, 'refused call')} explained" if made.n_explained else ""
    accelerators = ", ".join(tried.sentence for tried in made.vmm.accelerators) if made.vmm else ""
    tried = f" Accelerator: {accelerators}." if accelerators else ""
    return {
        "bring_up": bring_up_tables(made),
        "bring_up_summary": f"{plural(len(made.objects), 'object')}, {plural(len(made.steps), 'call')}: "
        f"{verdict}{explained}.{tried}",
    }


def _contents(page: dict[str, Any]) -> list[tuple[str, str]]:
    wanted = [
        ("violations", "Violations", page["violations"]),
        ("vms-section", "VMs", page["vms"].rows),
        ("budget", "Time budget", page["budgets"]),
        ("waits-section", "Waits", page["waits"].rows),
        ("vm-exits", "VM-exits", page["exits"].rows),
        ("nested", "Nested guests", page["nested"]),
        ("slowest-exits", "Slowest", page["slowest"].rows),
        ("userspace-exits", "Userspace exits", page["userspace"].rows),
        ("timeline-section", "Timeline", page["timeline"]),
        ("over-time", "Over time", page["charts"]),
        ("latency", "Latency", page["histograms"]),
        ("details", "Details", page["details"]),
        ("model", "Model", page["rules"]),
        ("bring-up", "Bring-up", page["bring_up"]),
    ]
    return [(anchor, title) for anchor, title, content in wanted if content]


def build_page(report: Report, live: str = "") -> dict[str, Any]:
    """Return all that the template shows.

    Parameters
    ----------
    live : address that gives the rest of the timeline; "" for a page on its own
    """
    capture = report.capture
    page: dict[str, Any] = {
        "path": escape(capture.path),
        "version": __version__,
        "summary": headline(report),
        "verdict": " ".join(" ".join(verdict_line(report, Style())).split()).removeprefix("Model: "),
        "lossy": is_lossy(report),
        "loss": loss_line(report),
        "facts": [
            *([("Saved", saved_because(report))] if report.triggers else []),
            ("Capture", capture_line(capture)),
            ("Events", f"{count(capture.n_events)} in {duration(capture.duration_ns)}"),
            ("Loss", loss_line(report)),
            *([("VM", f"only {escape(capture.vm)}")] if capture.vm else []),
            *(("Note", note) for note in report.loss.notes if is_lossy(report)),
            *([("Filter", filter_line(capture.filters))] if filter_line(capture.filters) else []),
        ],
        "parts": [(name, charts.part_class(name)) for name in PARTS.values()],
        "budgets": [_budget(vcpu) for vcpu in report.vcpus],
        "vms": html_tables.vm_table(report),
        "waits": html_tables.waits_table(report),
        "exits": html_tables.exit_table(report),
        "nested": nested_tables(report),
        "slowest": html_tables.slowest_table(report),
        "userspace": html_tables.userspace_table(report),
        "details": html_tables.detail_tables(report),
        **_model_part(report),
        **_time_part(report, live=live),
        **_bring_up(report),
    }
    page["contents"] = _contents(page)
    return page


def html_environment() -> Environment:
    """Return the templates of this folder, escaping everything that is not marked as ours."""
    from jinja2 import Environment, FunctionLoader

    def load(name: str) -> str:
        return (files("kvmtrace.render.html") / name).read_text(encoding="utf-8")

    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(load))


def own_text(*names: str) -> Any:
    """Return files of this folder as text that needs no escaping, one behind the other."""
    here = files("kvmtrace.render.html")
    return _safe("\n".join((here / name).read_text(encoding="utf-8") for name in names))


def uplot_script() -> Any:
    """Return uPlot with its licence, as the licence asks."""
    return _safe(f"/*\n{own_text('uplot/LICENSE')}*/\n{own_text('uplot/uPlot.iife.min.js')}")


def render_html(report: Report, live: str = "") -> str:
    """Render the report as one HTML file; everything from the trace is escaped.

    Parameters
    ----------
    live : see build_page
    """
    template = html_environment().get_template("template.html.j2")
    names = ("script.js", "timeline_data.js", "timeline_draw.js", "timeline_sample.js", "timeline.js", "charts.js")
    script = _safe(f"{uplot_script()}\n{own_text(*names)}")
    style = own_text("uplot/uPlot.min.css", "style.css")
    return template.render(page=build_page(report, live), style=style, script=script)
