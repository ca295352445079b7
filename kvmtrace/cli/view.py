"""`kvmtrace view`: the report in a browser, its timeline read from the recording."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import click

from kvmtrace.cli.allocation import prepare_memory
from kvmtrace.cli.completion import files as recordings
from kvmtrace.cli.interrupted import finish_interrupted
from kvmtrace.cli.report import load_report
from kvmtrace.errors import CapabilityError, UsageError

if TYPE_CHECKING:
    from kvmtrace.report.stretches import Stretches
    from kvmtrace.view.server import ViewServer


@click.command("view", epilog="Example: kvmtrace view run.dat")
@click.argument("file", metavar="FILE", shell_complete=recordings)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, metavar="N", help="Listen here; default: any free port."
)
@click.option("--open", "open_browser", is_flag=True, help="Open the page in this machine's browser.")
@click.option("--no-model", is_flag=True, help="Do not compare with the reference model.")
def command(*, file: str, port: int, open_browser: bool, no_model: bool) -> None:
    """Show a recording's report in a browser; its timeline reaches every moment, however long the recording.

    The page is served on this machine alone (127.0.0.1), to whoever has the address that is printed. Ctrl-C ends it.
    """
    from kvmtrace.formats.summary import is_summary_file

    if file != "-" and is_summary_file(file):
        raise UsageError("a recording of --summary has no events to show over time; use kvmtrace report")
    prepare_memory()
    finish_interrupted([file])
    with _server(file, port, model=not no_model) as server, contextlib.suppress(KeyboardInterrupt):
        click.echo(f"{server.url}  (Ctrl-C ends)")
        if open_browser:
            import webbrowser

            webbrowser.open(server.url)
        server.serve_forever()


def _server(file: str, port: int, *, model: bool) -> ViewServer:
    from kvmtrace.report.build import ReportOptions
    from kvmtrace.view.live_report import serve_report

    kept: list[Stretches] = []
    report = load_report(file, ReportOptions(model=model, timeline=True, stretches=kept.append))
    try:
        return serve_report(report, kept[0] if kept else None, port)
    except OSError as error:
        raise CapabilityError(f"port {port}: {error.strerror}", "choose another one with --port") from error
