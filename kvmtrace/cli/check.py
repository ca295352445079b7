"""`kvmtrace check`: only the comparison with the reference model."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from kvmtrace.cli.allocation import prepare_memory
from kvmtrace.cli.interrupted import finish_interrupted
from kvmtrace.cli.output import text_width, wants_colour, write
from kvmtrace.cli.progress import Progress

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
    epilog="Example: kvmtrace check run.dat && echo conforms. Exit code 1 means at least one violation.",
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
@click.option("--anonymize", is_flag=True, help="Drop host, file and thread names and addresses, consistently.")
def command(*, files: tuple[str, ...], output_format: str, limit: int, anonymize: bool) -> None:
    """Compare recordings with the reference model; exit code 1 if anything contradicts it."""
    from kvmtrace.render.terminal import Style
    from kvmtrace.render.text.check_text import render_check
    from kvmtrace.report.anonymize import anonymized
    from kvmtrace.report.json_document import to_json

    prepare_memory()
    finish_interrupted(files)
    reports = [_check(path, limit) for path in files]
    if anonymize:
        reports = [anonymized(report) for report in reports]
    if output_format == "json":
        documents = [to_json(report, only=("capture", "loss", "model")) for report in reports]
        write(documents[0] + "\n" if len(files) == 1 else "[\n" + ",\n".join(documents) + "\n]\n", None)
    else:
        style = Style(wants_colour(), text_width(None))
        write("\n".join(render_check(report, style, limit) for report in reports), None)
    if any(report.model and report.model.n_violations for report in reports):
        sys.stdout.flush()
        sys.exit(1)
