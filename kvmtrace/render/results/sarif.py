"""SARIF 2.1.0: the rules as descriptors, each violation as a result with the events that led to it.

A recording has no lines; its findings are said to be on line 1, because viewers show nothing without one, and the
logical location names vCPU, thread and event.

Source: OASIS, "Static Analysis Results Interchange Format (SARIF) Version 2.1.0".
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from kvmtrace import __version__
from kvmtrace.render.results.finding_text import context_line, finding_line, finding_place
from kvmtrace.render.terminal import escape

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from kvmtrace.check.rule import Rule
    from kvmtrace.check.verdict import ContextEvent, Violation
    from kvmtrace.report.outcome import Outcome

SCHEMA_URI = "https://json.schemastore.org/sarif-2.1.0.json"
LEVELS = {"violation": "error", "suspicion": "warning"}


def render_sarif(outcomes: Sequence[Outcome]) -> str:
    """Return a SARIF log with one run."""
    from kvmtrace.check.rule_registry import all_rules

    rules = list(all_rules().values())
    index = {rule.id: number for number, rule in enumerate(rules)}
    results = [_result(finding, outcome, index) for outcome in outcomes for finding in outcome.findings]
    driver = {
        "name": "kvmtrace",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": [_descriptor(rule) for rule in rules],
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [_invocation(outcomes)],
        "artifacts": [{"location": _artifact(_path_of(one)), "description": _text(_told(one))} for one in outcomes],
        "results": results + [_own_result(one) for one in outcomes if one.own_failed],
        "columnKind": "unicodeCodePoints",
    }
    return json.dumps({"$schema": SCHEMA_URI, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _text(text: str) -> dict[str, str]:
    return {"text": escape(text)}


def _path_of(outcome: Outcome) -> str:
    return outcome.recording or outcome.name


def _artifact(path: str) -> dict[str, str]:
    """Return the location of a file: relative as given, or absolute."""
    return {"uri": Path(path).as_uri() if path.startswith("/") else quote(os.fsencode(path))}


def _told(outcome: Outcome) -> str:
    own = f"{outcome.name}: {outcome.own.status}, {outcome.own.words}; " if outcome.own else ""
    return f"{own}{outcome.verdict}"


def _descriptor(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "name": rule.title.title().replace(" ", ""),
        "shortDescription": _text(rule.title),
        "fullDescription": _text(rule.sentence),
        "help": _text(f"{rule.sentence} Source: {rule.source}"),
        "defaultConfiguration": {"level": LEVELS.get(rule.severity, "warning")},
    }


def _result(finding: Violation, outcome: Outcome, index: dict[str, int]) -> dict[str, Any]:
    path = _path_of(outcome)
    flow = [{"location": _location(path, finding, event)} for event in finding.context]
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "level": LEVELS.get(finding.severity, "warning"),
        "message": _text(f"{finding_line(finding)}. {finding.why}"),
        "locations": [_location(path, finding, None)],
        "partialFingerprints": {"kvmtraceFinding/v1": _fingerprint(finding, outcome)},
        "properties": {
            "test": outcome.name,
            "event_index": finding.event_index,
            "ts_ns": finding.ts_ns,
            "vcpu_id": finding.vcpu_id,
            "tid": finding.tid,
            "cpu": finding.cpu,
            "source": finding.source,
        },
    }
    if finding.rule in index:
        result["ruleIndex"] = index[finding.rule]
    if flow:
        result["codeFlows"] = [{"threadFlows": [{"locations": flow}]}]
    return result


def _location(path: str, finding: Violation, event: ContextEvent | None) -> dict[str, Any]:
    """Return where a finding, or an event around it, is."""
    number = finding.event_index if event is None else event.event_index
    vcpu = "?" if finding.vcpu_id is None else finding.vcpu_id
    words = finding_place(finding) if event is None else context_line(event)
    return {
        "physicalLocation": {"artifactLocation": _artifact(path), "region": {"startLine": 1}},
        "logicalLocations": [{"fullyQualifiedName": f"vCPU {vcpu}/thread {finding.tid}/event {number}"}],
        "message": _text(words),
    }


def _fingerprint(finding: Violation, outcome: Outcome) -> str:
    """Return what stays the same when the same test shows the same finding again."""
    same = "\0".join((finding.rule, outcome.name, finding.event, finding.expected))
    return hashlib.sha256(same.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _own_result(outcome: Outcome) -> dict[str, Any]:
    """Return a test's own failure: no rule of the model, but a reader of the log wants it."""
    own = outcome.own
    assert own is not None
    return {
        "level": "error",
        "message": _text(f"{outcome.name}: {own.status}, {own.words}"),
        "locations": [
            {"physicalLocation": {"artifactLocation": _artifact(_path_of(outcome)), "region": {"startLine": 1}}}
        ],
        "properties": {"test": outcome.name, "seconds": round(own.seconds, 3)},
    }


def _invocation(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    notes = [
        {"level": "error", "message": _text(f"{outcome.name}: {outcome.error}")}
        for outcome in outcomes
        if outcome.error
    ]
    notes += [
        {"level": "note", "message": _text(f"{outcome.name}: {one.sentence}")}
        for outcome in outcomes
        if outcome.model
        for one in outcome.model.not_checked
        if one.applies and not one.part
    ]
    found: dict[str, Any] = {"executionSuccessful": not any(outcome.error for outcome in outcomes)}
    return found | ({"toolExecutionNotifications": notes} if notes else {})
