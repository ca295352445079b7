"""`kvmtrace check`: only the comparison with the reference model."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from kvmtrace.cli.allocation import prepare_memory
from kvmtrace.cli.completion import files as recordings
from kvmtrace.cli.error_line import explain
from kvmtrace.cli.interrupted import finish_interrupted
from kvmtrace.cli.output import anonymize_option, check_output, force_option, text_width, wants_colour, write
from kvmtrace.cli.parameter_types import VM_HELP
from kvmtrace.cli.progress import opened
from kvmtrace.errors import CapabilityError, KvmtraceError, MissingEventError, UsageError

if TYPE_CHECKING:
    from kvmtrace.report.document import Report
    from kvmtrace.report.outcome import Outcome

EPILOG = """\
Example: kvmtrace check --require V6,V8 run.dat && echo conforms

\b
Many recordings:
  kvmtrace check -q recordings/*.dat
  kvmtrace check --format junit -o results.xml recordings/*.dat

Several recordings get a line each, their violations in full and totals; one that cannot be read is told, and the others
are checked all the same.

Exit code 1 means a violation, 3 that a recording cannot be read or no event of it is of KVM, 4 that a required rule
could not be checked.
"""


@dataclass(frozen=True)
class Wanted:
    """How a check is told."""

    output_format: str
    limit: int
    required: tuple[str, ...]
    anonymize: bool
    quiet: bool
    full: bool
    vm: str | None


@click.command("check", epilog=EPILOG)
@click.argument("files", nargs=-1, required=True, metavar="FILE...", shell_complete=recordings)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["text", "json", "tap", "junit", "sarif"]),
    default="text",
    show_default=True,
    help="tap: TAP 14; junit: JUnit XML; sarif: SARIF 2.1.0.",
)
@click.option("-o", "--output", metavar="FILE", help="Write there instead of standard output.")
@force_option
@click.option(
    "--limit",
    type=click.IntRange(0, 10**9),
    default=20,
    show_default=True,
    metavar="N",
    help="Violations shown per rule; all are counted.",
)
@click.option(
    "--require",
    metavar="RULE[,RULE...]",
    default="",
    help="Rules that must be checked: exit code 4 if the recording lacks what one of them needs.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print only what is wrong or suspicious; nothing if nothing is.")
@click.option("-v", "--verbose", is_flag=True, help="Several recordings: rules, coverage and limits of each, too.")
@click.option("--vm", metavar="NAME|UUID", help=VM_HELP)
@anonymize_option
def command(
    *,
    files: tuple[str, ...],
    output_format: str,
    output: str | None,
    force: bool,
    limit: int,
    require: str,
    quiet: bool,
    verbose: bool,
    vm: str | None,
    anonymize: bool,
) -> None:
    """Compare recordings with the reference model; exit code 1 if anything contradicts it."""
    if ((quiet or verbose) and output_format != "text") or (quiet and verbose):
        raise UsageError("-q and -v are about the text, and exclude each other")
    wanted = Wanted(output_format, limit, _rule_names(require), anonymize, quiet, verbose or len(files) == 1, vm)
    check_output(output, files, force=force)
    prepare_memory()
    finish_interrupted(files)
    outcomes = [_outcome(path, f" {number}" if len(files) > 1 else "", wanted) for number, path in enumerate(files, 1)]
    write(_told(outcomes, wanted, output), output)
    sys.stdout.flush()
    if any(one.error for one in outcomes):
        _end_with_error(outcomes)
    if any(one.n_violations for one in outcomes):
        sys.exit(1)


def _outcome(path: str, number: str, wanted: Wanted) -> Outcome:
    """Check one recording; what goes wrong with it is part of the outcome."""
    from kvmtrace.report.outcome import Outcome

    report = None
    name = f"recording{number}" if wanted.anonymize else path
    kept = None if wanted.anonymize else path
    try:
        report = _check(path, wanted)
        _demand(report, name, wanted.required)
    except (KvmtraceError, OSError, MemoryError) as error:
        if click.get_current_context().find_root().params.get("debug"):
            raise
        text, code = explain(error)
        return Outcome(name, report, error=text, error_code=code, recording=kept)
    return Outcome(name, report, recording=kept)


def _check(path: str, wanted: Wanted) -> Report:
    from kvmtrace.report.build import check_report

    with opened(path, vm=wanted.vm) as (recording, progress):
        report = check_report(recording, limit=wanted.limit, progress=progress)
    if not wanted.anonymize:
        return report
    from kvmtrace.report.anonymize import anonymized

    return anonymized(report)


def _told(outcomes: list[Outcome], wanted: Wanted, output: str | None) -> str:
    """Return the outcomes in the format that was asked for."""
    if wanted.output_format in ("tap", "junit", "sarif"):
        from kvmtrace.render.results import render_outcomes

        return render_outcomes(outcomes, wanted.output_format, "kvmtrace check")
    reports = [one.report for one in outcomes if one.model and one.model.n_kvm_events and one.report]
    if wanted.output_format == "json":
        return _json(reports, many=len(outcomes) > 1)
    from kvmtrace.render.terminal import Style
    from kvmtrace.render.text.check_text import render_check
    from kvmtrace.render.text.outcomes_text import render_many, totals_line

    style = Style(output is None and wants_colour(), text_width(output))
    if wanted.quiet or not wanted.full:
        return render_many(outcomes, style, wanted.limit, quiet=wanted.quiet)
    text = "\n".join(render_check(report, style, wanted.limit) for report in reports)
    return text + ("\n" + "\n".join(totals_line(outcomes, style)) + "\n" if len(outcomes) > 1 else "")


def _json(reports: list[Report], *, many: bool) -> str:
    from kvmtrace.report.json_document import to_json

    documents = [to_json(report, only=("capture", "loss", "model")) for report in reports]
    if many:
        return "[\n" + ",\n".join(documents) + "\n]\n"
    return documents[0] + "\n" if documents else ""


def _end_with_error(outcomes: list[Outcome]) -> None:
    """Tell each error on standard error, and end with the exit code of the first."""
    errors = [one for one in outcomes if one.error]
    for one in errors:
        click.echo(f"kvmtrace: {one.error}", err=True)
    sys.exit(errors[0].error_code)


def _rule_names(words: str) -> tuple[str, ...]:
    """Return the rules named by --require."""
    from kvmtrace.check.rule_registry import all_rules

    names = tuple(name for name in words.replace(" ", "").split(",") if name)
    unknown = [name for name in names if name not in all_rules()]
    if unknown:
        raise UsageError(f"there is no rule {', '.join(unknown)}; the rules are {', '.join(all_rules())}")
    return names


def _demand(report: Report, path: str, required: tuple[str, ...]) -> None:
    """Refuse a recording without KVM events, and one that lacks what a required rule needs."""
    model = report.model
    if model is None:
        return
    if not model.n_kvm_events:
        raise MissingEventError(f"{path}: none of its {model.n_events:,} events is of KVM: nothing was checked")
    lacking = [one.sentence for one in model.not_checked if one.rule in required and not one.part]
    if lacking:
        raise CapabilityError(f"{path}: {'; '.join(lacking)}", "record them as well, if this kernel traces them")
