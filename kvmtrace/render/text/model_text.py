"""The comparison with the reference model as text."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from kvmtrace.check.verdict import not_recorded
from kvmtrace.render.terminal import Column, Style, count, escape, plural, table
from kvmtrace.render.text.event_fields import describe_fields

if TYPE_CHECKING:
    from kvmtrace.check.verdict import Comparison, ContextEvent, Violation
    from kvmtrace.fleet.fleet_report import FindingRow
    from kvmtrace.report.document import Report

CONTEXT_EVENTS = 12
NARROW = 80  # columns: names of events stand in no column of their own
_SHOWN_FIELDS = 5


def verdict_line(report: Report, style: Style) -> list[str]:
    """Say in one line whether the recording conforms to the model."""
    model = report.model
    if model is None:
        return ["  Model:   not compared"]
    judged = (
        ""
        if model.judged_share is None
        else f"; {judged_percent(model.judged_share)} of the vCPU threads' events judged"
    )
    counts = (
        f"{judged}; {count(model.n_events)} events: {count(model.explained_events)} explained, "
        f"{count(model.unknown_events)} unknown, {_unexplained(model)}"
        f"{count(model.environment_events)} of other threads; "
        f"{count(model.n_checks)} checks"
    )
    unchecked = [one.rule for one in model.not_checked if one.applies and not one.part]
    counts += f"; not checked: {', '.join(unchecked)}" if unchecked else ""
    suspicions = f", {plural(model.n_suspicions, 'suspicion')}" if model.n_suspicions else ""
    verdict = model.verdict.upper() if model.n_violations else model.verdict
    lines = style.wrapped(f"{verdict}{suspicions}{counts}", "  Model:   ", " " * 11)
    paint = style.bad if model.n_violations else style.good if model.verdict == "conforms" else style.warn
    return [lines[0].replace(verdict, paint(verdict), 1), *lines[1:]]


MOST_NAMED = 4  # events


def _unexplained(model: Comparison) -> str:
    """Name the events that no table of the model has, where they are more than a few."""
    if not model.many_unexplained:
        return ""
    named = [f"{escape(event)} {count(number)}" for event, number in list(model.unexplained.items())[:MOST_NAMED]]
    total = count(sum(model.unexplained.values()))
    return f"{total} unexplained ({', '.join(named)}{', ...' if len(model.unexplained) > MOST_NAMED else ''}), "


def judged_percent(share: float) -> str:
    """Return a share as text that says 100 % of nothing less than all."""
    return f"{share:.0%}" if share in (0.0, 1.0) else f"{min(max(share, 0.001), 0.999):.1%}"


def unchecked_lines(report: Report, style: Style) -> list[str]:
    """Return a line for each rule of which nothing could be checked, and for each that could not be loaded."""
    model = report.model
    if model is None:
        return []
    words = unchecked_rules(model)
    lines = [line for text in (*words, *model.rule_errors) for line in style.wrapped(escape(text), " " * 11, " " * 13)]
    return [style.warn(line) for line in lines]


def unchecked_rules(model: Comparison) -> list[str]:
    """Return a sentence for each rule of which nothing could be checked."""
    return [one.sentence for one in model.not_checked if one.applies and not one.part]


def rules_of_others(model: Comparison) -> list[str]:
    """Return a sentence that names the rules that do not apply to the recording's architecture, if there are any."""
    found = list(dict.fromkeys(one.rule for one in model.not_checked if not one.applies and not one.part))
    words = f"{', '.join(found)} do not apply: this architecture's KVM traces nothing to check them by"
    return [words] if found else []


def cannot_show(model: Comparison, *, whole: bool = True) -> list[str]:
    """Say in words what the recording does not show: rules that were not checked, in part or at all, and blind spots.

    Parameters
    ----------
    whole : rules of which nothing was checked as well; False where they are told already
    """
    parts: dict[str, list[str]] = {}
    for one in model.not_checked:
        if one.part and one.applies:
            parts.setdefault(one.rule, []).extend(one.missing)
    return [
        *(words for words in (*unchecked_rules(model), *model.rule_errors) if whole),
        *rules_of_others(model),
        *(f"{rule} checked in part: {not_recorded(missing)}" for rule, missing in parts.items()),
        *model.cannot_see,
    ]


def model_sections(report: Report, style: Style, limit: int) -> list[str]:
    """Return violations (first divergence on top), rules, coverage, and what could not be seen."""
    return [
        *violation_sections(report, style, limit),
        *rules_sections(report, style),
        *limits_section(report, style, whole=False),
    ]


def violation_sections(report: Report, style: Style, limit: int) -> list[str]:
    """Return the violations, the first divergence on top, each with the command that tells what led to it."""
    return [] if report.model is None else _violations(report, report.model, style, limit)


def rules_sections(report: Report, style: Style) -> list[str]:
    """Return the rules with their counts, and the coverage."""
    return [] if report.model is None else [*_rules(report.model, style), *_coverage(report.model, style)]


def limits_section(report: Report, style: Style, *, whole: bool = True) -> list[str]:
    """Return what the recording cannot show."""
    hidden = cannot_show(report.model, whole=whole) if report.model else []
    if not hidden:
        return []
    lines = [style.title("What this recording cannot show")]
    for words in hidden:
        lines += style.wrapped(escape(words), "  - ", "    ")
    return [*lines, ""]


def rules_line(report: Report) -> str:
    """Say in a line how many rules were checked; "" without a model."""
    model = report.model
    if model is None:
        return ""
    checked = [rule for rule in model.rules.values() if rule.checked]
    violated = sum(rule.violated > 0 for rule in model.rules.values())
    seen = model.coverage
    return (
        f"Rules: {len(checked)} of {len(model.rules)} had something to check, {violated} violated; "
        f"{seen.transitions_seen} of {seen.transitions_in_model} transitions of the model seen"
    )


def limits_line(report: Report) -> str:
    """Say in a line how much the recording cannot show; "" if nothing is known to be hidden."""
    limits = cannot_show(report.model) if report.model else []
    return f"Limits: {plural(len(limits), 'thing')} that this recording cannot show" if limits else ""


def _violations(report: Report, model: Comparison, style: Style, limit: int) -> list[str]:
    if not model.violations:
        return []
    first = model.first_divergence
    rest = [violation for violation in model.violations if violation != first]
    ordered = ([first] if first else []) + rest
    lines = []
    for number, violation in enumerate(ordered[:limit]):
        title = "First divergence from the model" if number == 0 and violation == first else "Also"
        lines += [*_violation(violation, title, report.capture.path, style), ""]
    found = model.n_violations + model.n_suspicions
    if found > min(limit, len(ordered)):
        lines += [style.faint(f"... {count(found - min(limit, len(ordered)))} more (kvmtrace check --limit N)"), ""]
    return lines


def _violation(violation: Violation, title: str, path: str, style: Style) -> list[str]:
    vcpu = "?" if violation.vcpu_id is None else violation.vcpu_id
    paint = style.bad if violation.severity == "violation" else style.warn
    lines = [paint(f"{title}: {violation.severity} of {escape(violation.rule)}")]
    where = (
        f"event {count(violation.event_index)} ({escape(violation.event)}) at {violation.ts_ns / 1e9:.9f} s, "
        f"vCPU {vcpu}{f' of {escape(violation.vm)}' if violation.vm else ''}, thread {violation.tid}, "
        f"CPU {violation.cpu}"
    )
    lines += style.wrapped(where, "  at:       ", " " * 12)
    for label, words in (
        ("expected", violation.expected),
        ("observed", violation.observed),
        ("why", violation.why),
        ("source", violation.source),
        ("led to", explain_command(violation, path)),
    ):
        lines += style.wrapped(escape(words), f"  {label + ':':<10}", " " * 12) if words else []
    return lines + _context(violation, style)


def explain_command(violation: Violation | FindingRow, path: str) -> str:
    """Return the command that tells the VM-exit of a violation step by step; "" before the first VM-exit."""
    if violation.vm_exit is None:
        return ""
    return f"kvmtrace report {shlex.quote(path)} --explain {violation.vm_exit} --tid {violation.tid}"


def _context(violation: Violation, style: Style) -> list[str]:
    """Return the events around a violation, the one found wrong marked with `>`."""
    lines = []
    for event in _around(violation.context, violation.event_index):
        fields = ", ".join(describe_fields(event.event, event.fields, _SHOWN_FIELDS))
        mark = ">" if event.event_index == violation.event_index else " "
        delta = (event.ts_ns - violation.ts_ns) / 1000
        narrow = style.width < NARROW
        name = escape(event.event) if narrow else f"{escape(event.event):<18}"
        line = f"  {mark} {delta:+12.3f} us  [{event.cpu:03d}] {name} {fields}"
        shown = style.wrapped(line, "", " " * (28 if narrow else 44))[:2]
        lines += [style.bad(part) for part in shown] if mark == ">" else shown
    return lines


def _around(context: tuple[ContextEvent, ...], index: int) -> tuple[ContextEvent, ...]:
    """Return at most CONTEXT_EVENTS events, the violation's among them."""
    position = next((i for i, event in enumerate(context) if event.event_index == index), len(context) - 1)
    start = max(min(position - CONTEXT_EVENTS // 2, len(context) - CONTEXT_EVENTS), 0)
    return context[start : start + CONTEXT_EVENTS]


def _rules(model: Comparison, style: Style) -> list[str]:
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
    from kvmtrace.check.rule_registry import all_rules

    known = all_rules().get(rule)
    return known.title if known else ""


def _coverage(model: Comparison, style: Style) -> list[str]:
    seen = model.coverage
    words = (
        f"states {seen.states_seen} of {seen.states_in_model}, transitions {seen.transitions_seen} of "
        f"{seen.transitions_in_model}, exit reasons {seen.exit_reasons_seen} of {seen.exit_reasons_in_model}"
    )
    not_seen = style.wrapped(unseen_parts(model), "  ", "    ") if unseen_parts(model) else []
    return [style.title("Coverage of the model"), *style.wrapped(words, "  ", "    "), *not_seen, ""]


def unseen_parts(model: Comparison) -> str:
    """Name the parts of the lifecycle of which nothing was seen, "" if there are none."""
    parts = [part.part + ("" if part.recorded else " (not recorded)") for part in model.coverage.not_seen]
    return f"not seen: {', '.join(parts)}" if parts else ""
