"""JUnit XML, in the common part of what Jenkins and Maven Surefire accept; GitLab and GitHub's actions read it too."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape as xml_text
from xml.sax.saxutils import quoteattr

from kvmtrace.render.results.finding_text import finding_line, finding_paragraph
from kvmtrace.report.outcome import totals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvmtrace.report.outcome import Outcome

# characters that XML 1.0 has no way to say
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _legal(text: str) -> str:
    return _ILLEGAL.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def _attributes(**values: object) -> str:
    return "".join(f" {name}={quoteattr(_legal(str(value)))}" for name, value in values.items())


def _element(name: str, text: str, **values: object) -> str:
    return f"<{name}{_attributes(**values)}>{xml_text(_legal(text))}</{name}>"


def render_junit(outcomes: Sequence[Outcome], suite: str) -> str:
    """Return one test suite with a test case per outcome.

    A violation is a failure; a test's own failure is one as well, its crash or hang an error, as is a recording that
    could not be read.
    """
    sums = totals(outcomes)
    cases = [_case(one, suite) for one in outcomes]
    seconds = sum(one.own.seconds for one in outcomes if one.own)
    errors = sum(_is_error(one) for one in outcomes)
    head = _attributes(
        name=suite,
        tests=sums.all,
        errors=errors,
        skipped=sums.skipped,
        failures=sums.failed - errors,
        time=f"{seconds:.3f}",
    )
    return "\n".join(['<?xml version="1.0" encoding="UTF-8"?>', f"<testsuite{head}>", *cases, "</testsuite>", ""])


def _is_error(outcome: Outcome) -> bool:
    """Say whether an outcome counts as an error: nothing that a violation or a failed test explains."""
    crashed = outcome.own is not None and outcome.own.status in ("crash", "hang")
    return outcome.failed and not outcome.n_violations and (bool(outcome.error) or crashed)


def _case(outcome: Outcome, suite: str) -> str:
    own = outcome.own
    head = _attributes(
        name=outcome.name, classname=suite.replace(" ", "."), time=f"{own.seconds:.3f}" if own else "0.000"
    )
    parts = [f"    {part}" for part in (*_failures(outcome), *_skip(outcome), *_error(outcome), *_output(outcome))]
    return "\n".join([f"  <testcase{head}>", *parts, "  </testcase>"])


def _failures(outcome: Outcome) -> list[str]:
    parts = []
    own = outcome.own
    if outcome.n_violations:
        broken = [one for one in outcome.findings if one.severity == "violation"]
        text = "\n\n".join(finding_paragraph(one, outcome.recording) for one in broken)
        message = finding_line(broken[0]) if broken else outcome.verdict
        if outcome.n_violations > 1:
            message = f"{outcome.verdict}: {message}"
        parts.append(_element("failure", text, message=message, type="kvmtrace.violation"))
    if own is not None and own.status == "fail":
        parts.append(_element("failure", own.last_words, message=own.words, type="test.fail"))
    return parts


def _skip(outcome: Outcome) -> list[str]:
    if not outcome.skipped:
        return []
    return [_element("skipped", "", message=outcome.verdict if outcome.own is None else outcome.own.words)]


def _error(outcome: Outcome) -> list[str]:
    """Return the one error element that Surefire allows."""
    own = outcome.own
    if own is not None and own.status in ("crash", "hang"):
        return [_element("error", own.last_words, message=own.words, type=f"test.{own.status}")]
    return [_element("error", "", message=outcome.error, type="kvmtrace.error")] if outcome.error else []


def _output(outcome: Outcome) -> list[str]:
    """Return the verdict, suspicions and where the recording is."""
    lines = [f"verdict: {outcome.verdict}"]
    lines += [finding_line(one) for one in outcome.findings if one.severity != "violation"]
    lines += [f"recording: {outcome.recording}"] if outcome.recording else []
    lines += [f"log: {outcome.own.log}"] if outcome.own and outcome.own.log else []
    return [_element("system-out", "\n".join(lines))]
