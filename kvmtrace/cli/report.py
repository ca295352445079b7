"""`kvmtrace report`: statistics, time budget and the comparison with the reference model."""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvmtrace.cli.allocation import prepare_memory
from kvmtrace.cli.interrupted import finish_interrupted
from kvmtrace.cli.output import write_text
from kvmtrace.errors import UsageError

if TYPE_CHECKING:
    from kvmtrace.render.text.report_text import TextOptions
    from kvmtrace.report.build import ReportOptions
    from kvmtrace.report.document import Report
    from kvmtrace.report.selection import Selection

_TIME_UNITS = {"": 1_000_000_000, "s": 1_000_000_000, "ms": 1_000_000, "us": 1_000, "ns": 1}
BY = ["reason", "userspace", "vcpu", "port", "gpa", "msr", "cr", "rip"]
SORT = ["count", "time", "mean", "p50", "p99", "max", "name", "key"]


class TimeType(click.ParamType):  # type: ignore[type-arg]
    """A time: "1.5", "20ms" after the recording's start, or "@123.456" as the trace's clock says."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, bool]:
        """Return (ns, relative to the start?)."""
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(@?)(\d+)(?:\.(\d*))?(s|ms|us|ns)?", str(value).strip())
        if not match:
            self.fail(f"{value!r} is no time; examples: 1.5, 20ms, @123.456", param, ctx)
        absolute, whole, fraction, unit = match.groups()
        size = _TIME_UNITS[unit or ""]
        fraction = fraction or ""
        return int(whole) * size + int(fraction or 0) * size // 10 ** len(fraction), not absolute


class Progress:
    """Events read so far, on standard error of a terminal, from half a second on."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._next = time.monotonic() + 0.5
        self._shown = False
        self._on = sys.stderr.isatty()

    def __call__(self, n_events: int) -> None:
        """Show the number, at most five times a second."""
        if self._on and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.2
            self._shown = True
            click.echo(f"\r{self._path}: {n_events:,} events\x1b[K", err=True, nl=False)

    def done(self) -> None:
        """Remove the line."""
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)


def wants_colour() -> bool:
    """Say whether standard output is a terminal that shall have colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def write(text: str, output: str | None) -> None:
    """Write to a file, through the pager on a terminal, or to standard output."""
    if output and output != "-":
        write_text(Path(output), text)
    elif sys.stdout.isatty() and text.count("\n") >= _terminal_lines():
        os.environ.setdefault("LESS", "-RSFX")
        click.echo_via_pager(text, color=wants_colour() or None)
    else:
        sys.stdout.write(text)


def _terminal_lines() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).lines
    except OSError:
        return 24


def load_report(path: str, options: ReportOptions) -> Report:
    """Open one file and report on it, with progress."""
    from dataclasses import replace

    from kvmtrace.formats import open_recording
    from kvmtrace.report.build import build_report

    progress = Progress(path)
    try:
        return build_report(open_recording(path), replace(options, progress=progress))
    finally:
        progress.done()


def _summaries(files: tuple[str, ...]) -> list[tuple[str, bytes]] | None:
    """Return the files' names and bytes if the first is one of `record --summary`, which holds no events."""
    from kvmtrace.formats.summary.summary_file import MAGIC, is_summary

    path = Path(files[0])
    if files[0] == "-" or not path.is_file():
        return None
    with path.open("rb") as file:
        if not is_summary(file.read(len(MAGIC))):
            return None
    return [(name, Path(name).read_bytes()) for name in files]


def _render_summaries(contents: list[tuple[str, bytes]], output_format: str, *, anonymize: bool) -> str:
    from kvmtrace.formats.summary.summary_file import read_summary
    from kvmtrace.render.text.summary_text import render_summary
    from kvmtrace.report.anonymize import anonymized_summary

    if output_format == "html":
        raise UsageError("a recording of --summary has no events to show in HTML; use text or json")
    if anonymize:
        contents = [(name, anonymized_summary(data)) for name, data in contents if read_summary(data, name)]
    summaries = [read_summary(data, name) for name, data in contents]
    if output_format == "json":
        return "".join(data.decode() for _, data in contents)
    return "\n".join(render_summary(summary) for summary in summaries)


def _selection(
    tid: int | None, vcpu_id: int | None, begin: tuple[int, bool] | None, end: tuple[int, bool] | None
) -> Selection:
    from kvmtrace.report.selection import Selection

    kinds = {moment[1] for moment in (begin, end) if moment}
    if len(kinds) > 1:
        raise UsageError("--from and --to: both relative to the start, or both with @")
    return Selection(tid, vcpu_id, begin[0] if begin else None, end[0] if end else None, kinds != {False})


def _render(reports: list[Report], output_format: str, text: TextOptions, *, colour: bool) -> str:
    from kvmtrace.render.terminal import Style
    from kvmtrace.render.text.report_text import render_text
    from kvmtrace.report.document import render_json

    if output_format == "json":
        documents = [render_json(report) for report in reports]
        return documents[0] + "\n" if len(documents) == 1 else "[\n" + ",\n".join(documents) + "\n]\n"
    if output_format == "html":
        html: str = importlib.import_module("kvmtrace.render.html").render_html(reports[0])
        return html
    return "\n".join(render_text(report, text, Style(colour)) for report in reports)


def _story(path: str, number: int, tid: int | None, vcpu_id: int | None, *, anonymize: bool) -> str:
    from kvmtrace.check.explain import explain_exit
    from kvmtrace.formats import open_recording
    from kvmtrace.render.text.explain_text import render_story
    from kvmtrace.report.anonymize import anonymized_story

    story = explain_exit(open_recording(path).events(), number, tid=tid, vcpu=vcpu_id)
    return render_story(anonymized_story(story) if anonymize else story)


@click.command(
    "report",
    epilog="Example: kvmtrace report run.dat --by port --sort count. "
    "For scripts: kvmtrace report run.dat --format json -o run.json",
)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["text", "html", "json"]),
    default="text",
    help="json: one document, for several FILEs a list of them.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write here instead of standard output.")
@click.option("--by", type=click.Choice(BY), help="Only this table, with all its rows.")
@click.option("--sort", type=click.Choice(SORT), help="Sort the table by this column.")
@click.option("--tid", type=click.IntRange(1), help="Only this thread.")
@click.option("--vcpu", "vcpu_id", type=click.IntRange(0), help="Only vCPUs with this id.")
@click.option(
    "--from",
    "begin",
    type=TimeType(),
    metavar="T",
    help="Only from T on: 1.5 or 20ms after the start, or @123.456 on the trace's clock.",
)
@click.option("--to", "end", type=TimeType(), metavar="T", help="Only up to T.")
@click.option("--perf-compatible", is_flag=True, help="The tables of `perf kvm stat report`, in its layout.")
@click.option("--no-model", is_flag=True, help="Do not compare with the reference model.")
@click.option(
    "--guest-symbols",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="System.map or kallsyms of the guest, to name guest addresses.",
)
@click.option(
    "--explain",
    type=click.IntRange(1),
    metavar="N",
    help="Tell VM-exit number N (of --tid or --vcpu) as the story of one lifecycle.",
)
@click.option("--anonymize", is_flag=True, help="Drop host, thread names and addresses, consistently.")
def command(
    *, files: tuple[str, ...], output_format: str, output: str | None, by: str | None, sort: str | None,
    tid: int | None, vcpu_id: int | None, begin: tuple[int, bool] | None, end: tuple[int, bool] | None,
    perf_compatible: bool, no_model: bool, guest_symbols: str | None, explain: int | None, anonymize: bool,
) -> None:  # fmt: skip
    """Report on recordings: exits, time budget, attribution, and whether the reference model agrees.

    FILE is a kvmtrace recording, trace.dat, perf.data, ftrace text, or - for standard input.
    """
    prepare_memory()
    finish_interrupted(files)
    if explain is not None:
        write("\n".join(_story(path, explain, tid, vcpu_id, anonymize=anonymize) for path in files), output)
        return
    from dataclasses import replace

    from kvmtrace.render.text.report_text import TextOptions
    from kvmtrace.report.anonymize import anonymized
    from kvmtrace.report.build import ReportOptions
    from kvmtrace.report.guest_symbols import read_guest_symbols

    summaries = _summaries(files)
    if summaries is not None:
        write(_render_summaries(summaries, output_format, anonymize=anonymize), output)
        return
    if output_format == "html" and len(files) > 1:
        raise UsageError("--format html takes one FILE; kvmtrace compare shows two side by side")
    options = ReportOptions(
        _selection(tid, vcpu_id, begin, end),
        model=not no_model,
        perf_only=perf_compatible and output_format == "text",
        timeline=output_format == "html",
    )
    if guest_symbols:
        options = replace(options, symbol=read_guest_symbols(guest_symbols).name)
    reports = [load_report(path, options) for path in files]
    if anonymize:
        reports = [anonymized(report) for report in reports]
    text = TextOptions(by=by, sort=sort, perf=perf_compatible)
    write(_render(reports, output_format, text, colour=wants_colour() and output is None), output)
