"""`kvmtrace check`: only the comparison with the reference model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from kvmtrace.cli.allocation import prepare_memory
from kvmtrace.cli.interrupted import finish_interrupted
from kvmtrace.cli.output import text_width, wants_colour, write
from kvmtrace.cli.progress import Progress
from kvmtrace.errors import CapabilityError, MissingEventError, UsageError

if TYPE_CHECKING:
    from kvmtrace.report.document import Report


def _check(path: str, limit: int) -> Report:
    from kvmtrace.formats import open_recording
    from kvmtrace.report.build import check_report

    progress = Progress(path)
    try:
        return check_report(open_recording(path), limit=limit, progress=progress)
    finally:
        progress.done()


@click.command(
    "check",
    epilog="Example: kvmtrace check --require V6,V8 run.dat && echo conforms. Exit code 1 means a violation, "
    "3 that no event is of KVM, 4 that a required rule could not be checked.",
)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--format", "output_format", type=click.Choice(["text", "json"]), default="text")
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
@click.option("--anonymize", is_flag=True, help="Drop host, file and thread names and addresses, consistently.")
def command(*, files: tuple[str, ...], output_format: str, limit: int, require: str, anonymize: bool) -> None:
    """Compare recordings with the reference model; exit code 1 if anything contradicts it."""
    from kvmtrace.render.terminal import Style
    from kvmtrace.render.text.check_text import render_check
    from kvmtrace.report.anonymize import anonymized
    from kvmtrace.report.json_document import to_json

    required = _rule_names(require)
    prepare_memory()
    finish_interrupted(files)
    reports = [_check(path, limit) for path in files]
    if anonymize:
        reports = [anonymized(report) for report in reports]
    empty = [report for report in reports if report.model and not report.model.n_kvm_events]
    told = [report for report in reports if report not in empty]
    if output_format == "json" and told:
        documents = [to_json(report, only=("capture", "loss", "model")) for report in told]
        write(documents[0] + "\n" if len(files) == 1 else "[\n" + ",\n".join(documents) + "\n]\n", None)
    elif told:
        style = Style(wants_colour(), text_width(None))
        write("\n".join(render_check(report, style, limit) for report in told), None)
    sys.stdout.flush()
    for report in reports:
        _demand(report, required)
    if any(report.model and report.model.n_violations for report in reports):
        sys.exit(1)


def _rule_names(words: str) -> tuple[str, ...]:
    """Return the rules named by --require."""
    from kvmtrace.check.rule_registry import all_rules

    names = tuple(name for name in words.replace(" ", "").split(",") if name)
    unknown = [name for name in names if name not in all_rules()]
    if unknown:
        raise UsageError(f"there is no rule {', '.join(unknown)}; the rules are {', '.join(all_rules())}")
    return names


def _demand(report: Report, required: tuple[str, ...]) -> None:
    """Refuse a recording without KVM events, and one that lacks what a required rule needs."""
    model, path = report.model, report.capture.path
    if model is None:
        return
    if not model.n_kvm_events:
        raise MissingEventError(f"{path}: none of its {model.n_events:,} events is of KVM: nothing was checked")
    lacking = [one.sentence for one in model.not_checked if one.rule in required and not one.part]
    if lacking:
        raise CapabilityError(f"{path}: {'; '.join(lacking)}", "record them as well, if this kernel traces them")
