"""The comparison with the reference model as text."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from kvmtrace.render.terminal import WIDTH, Column, Style, count, escape, plural, table

if TYPE_CHECKING:
    from kvmtrace.check.verdict import Comparison
    from kvmtrace.report.document import Report

CONTEXT_EVENTS = 12
_SHOWN_FIELDS = 5
_HEX_FIELDS = frozenset(
    {
        "rip",
        "guest_rip",
        "gpa",
        "address",
        "fault_address",
        "error_code",
        "intr_info",
        "info1",
        "info2",
        "port",
        "ecx",
        "data",
        "val",
        "cmd",
        "arg",
    }
)


def verdict_line(report: Report, style: Style) -> list[str]:
    """Say in one line whether the recording conforms to the model."""
    model = report.model
    if model is None:
        return ["  Model:   not compared"]
    checked = sum(rule.checked for rule in model.rules.values())
    counts = (
        f"; {count(model.n_events)} events: {count(model.explained_events)} explained, "
        f"{count(model.unknown_events)} unknown, {_unexplained(model)}"
        f"{count(model.environment_events)} of other threads; "
        f"{count(checked)} checks"
    )
    suspicions = f", {plural(model.n_suspicions, 'suspicion')}" if model.n_suspicions else ""
    verdict = plural(model.n_violations, "violation").upper() if model.n_violations else "conforms"
    lines = textwrap.wrap(
        f"{verdict}{suspicions}{counts}",
        WIDTH,
        initial_indent="  Model:   ",
        subsequent_indent=" " * 11,
        break_on_hyphens=False,
    )
    paint = style.bad if model.n_violations else style.good
    return [lines[0].replace(verdict, paint(verdict), 1), *lines[1:]]


MOST_NAMED = 4  # events


def _unexplained(model: Comparison) -> str:
    """Name the events that no table of the model has, where they are more than a few."""
    if not model.many_unexplained:
        return ""
    named = [f"{escape(event)} {count(number)}" for event, number in list(model.unexplained.items())[:MOST_NAMED]]
    total = count(sum(model.unexplained.values()))
    return f"{total} unexplained ({', '.join(named)}{', ...' if len(model.unexplained) > MOST_NAMED else ''}), "


def model_sections(report: Report, style: Style, limit: int) -> list[str]:
    """Return violations (first divergence on top), rules, coverage, and what could not be seen."""
    model = report.model
    if model is None:
        return []
    lines = _violations(model, style, limit)
    lines += _rules(model, style)
    lines += _coverage(model, style)
    if model.cannot_see:
        lines += [style.title("What this recording cannot show")]
        for words in model.cannot_see:
            lines += textwrap.wrap(escape(words), WIDTH, initial_indent="  - ", subsequent_indent="    ")
        lines.append("")
    return lines


def _violations(model: Any, style: Style, limit: int) -> list[str]:
    if not model.violations:
        return []
    first = model.first_divergence
    rest = [violation for violation in model.violations if violation != first]
    ordered = ([first] if first else []) + rest
    lines = []
    for number, violation in enumerate(ordered[:limit]):
        title = "First divergence from the model" if number == 0 and violation == first else "Also"
        lines += [*_violation(violation, title, style), ""]
    found = model.n_violations + model.n_suspicions
    if found > min(limit, len(ordered)):
        lines += [style.faint(f"... {count(found - min(limit, len(ordered)))} more (kvmtrace check --limit N)"), ""]
    return lines


def _violation(violation: Any, title: str, style: Style) -> list[str]:
    vcpu = "?" if violation.vcpu_id is None else violation.vcpu_id
    paint = style.bad if violation.severity == "violation" else style.warn
    lines = [paint(f"{title}: {violation.severity} of {escape(violation.rule)}")]
    where = (
        f"event {count(violation.event_index)} ({escape(violation.event)}) at {violation.ts_ns / 1e9:.9f} s, "
        f"vCPU {vcpu}, thread {violation.tid}, CPU {violation.cpu}"
    )
    lines += textwrap.wrap(where, WIDTH, initial_indent="  at:       ", subsequent_indent=" " * 12)
    for label, words in (
        ("expected", violation.expected),
        ("observed", violation.observed),
        ("why", violation.why),
        ("source", violation.source),
    ):
        lines += (
            textwrap.wrap(escape(words), WIDTH, initial_indent=f"  {label + ':':<10}", subsequent_indent=" " * 12)
            if words
            else []
        )
    return lines + _context(violation, style)


def _context(violation: Any, style: Style) -> list[str]:
    """Return the events around a violation, the one found wrong marked with `>`."""
    lines = []
    for event in _around(violation.context, violation.event_index):
        fields = " ".join(f"{name}={_value(name, value)}" for name, value in list(event.fields.items())[:_SHOWN_FIELDS])
        mark = ">" if event.event_index == violation.event_index else " "
        delta = (event.ts_ns - violation.ts_ns) / 1000
        line = f"  {mark} {delta:+12.3f} us  [{event.cpu:03d}] {escape(event.event):<22} {escape(fields)}"
        lines.append(style.bad(line[:WIDTH]) if mark == ">" else line[:WIDTH])
    return lines


def _around(context: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    """Return at most CONTEXT_EVENTS events, the violation's among them."""
    position = next((i for i, event in enumerate(context) if event.event_index == index), len(context) - 1)
    start = max(min(position - CONTEXT_EVENTS // 2, len(context) - CONTEXT_EVENTS), 0)
    return context[start : start + CONTEXT_EVENTS]


def _value(name: str, value: int | str) -> str:
    as_hex = isinstance(value, int) and (abs(value) > 0xFFFF or name in _HEX_FIELDS)
    return f"{value:#x}" if as_hex else str(value)


def _rules(model: Any, style: Style) -> list[str]:
    rules = [(name, rule) for name, rule in model.rules.items() if rule.checked or rule.unknown]
    if not rules:
        return []
    columns = [
        Column("rule", [escape(name) for name, _ in rules], left=True, flexible=True),
        Column("checked", [count(rule.checked) for _, rule in rules]),
        Column("held", [count(rule.held) for _, rule in rules]),
        Column("violated", [count(rule.violated) for _, rule in rules]),
        Column("unknown", [count(rule.unknown) for _, rule in rules]),
        Column("what must hold", [meaning_of(name) for name, _ in rules], left=True, flexible=True),
    ]
    return [style.title("Rules of the reference model"), *table(columns, style), ""]


def meaning_of(rule: str) -> str:
    """Return a rule's sentence, "" if the model has none for it."""
    from kvmtrace.check.registry import all_rules

    known = all_rules().get(rule)
    return known.title if known else ""


def _coverage(model: Any, style: Style) -> list[str]:
    seen = model.coverage
    words = (
        f"  states {seen.states_seen} of {seen.states_in_model}, transitions {seen.transitions_seen} of "
        f"{seen.transitions_in_model}, exit reasons {seen.exit_reasons_seen} of {seen.exit_reasons_in_model}"
    )
    return [style.title("Coverage of the model"), words, ""]
