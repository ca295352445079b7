"""`kvmtrace report`: statistics, time budget and the comparison with the reference model."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvmtrace.cli.allocation import prepare_memory
from kvmtrace.cli.completion import files as recordings
from kvmtrace.cli.interrupted import finish_interrupted
from kvmtrace.cli.option_pairs import refuse_pairs
from kvmtrace.cli.output import anonymize_option, check_output, force_option, text_width, wants_colour, write
from kvmtrace.cli.parameter_types import ID, VM_HELP, Moment, Parts
from kvmtrace.cli.progress import opened
from kvmtrace.errors import UsageError
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from kvmtrace.render.terminal import Style
    from kvmtrace.render.text.report_text import TextOptions
    from kvmtrace.report.build import ReportOptions
    from kvmtrace.report.document import Report
    from kvmtrace.report.selection import Selection
    from kvmtrace.table.event_table import EventTable

BY = ["vm", "reason", "userspace", "vcpu", "waits", "port", "gpa", "msr", "cr", "sysreg", "rip"]
PARTS = ["details", "bring-up", "rules", "limits", "all"]
SORT = ["count", "time", "mean", "p50", "p99", "max", "name", "key"]


def load_report(path: str, options: ReportOptions, vm: str | None = None) -> Report:
    """Open one file and report on it, or on one VM of it, with progress."""
    from kvmtrace.report.build import build_report

    with opened(path, vm=vm) as (recording, progress):
        return build_report(recording, replace(options, progress=progress))


@dataclass(frozen=True)
class Request:
    """What the command line asks for; see the options' help."""

    files: tuple[str, ...]
    output_format: str
    output: str | None
    by: str | None
    sort: str | None
    vm: str | None
    tid: int | None
    vcpu_id: int | None
    level: int | None
    begin: tuple[int, bool] | None
    end: tuple[int, bool] | None
    perf_compatible: bool
    no_model: bool
    guest_symbols: str | None
    explain: int | None
    as_guest: bool
    slowest: int | None
    show: tuple[str, ...]
    full: bool
    verbose: bool
    anonymize: bool
    force: bool

    def refuse_what_does_not_go_together(self) -> None:
        """Refuse options of which one would be passed over in silence."""
        given = {
            "--explain": self.explain is not None,
            "--format": self.output_format != "text",
            "--format html": self.output_format == "html",
            "--by": self.by is not None,
            "--slowest": self.slowest is not None,
            "--show": bool(self.show) or self.verbose,
            "--sort": self.sort is not None,
            "--from": self.begin is not None,
            "--to": self.end is not None,
            "--perf-compatible": self.perf_compatible,
            "--no-model": self.no_model,
            "--guest-symbols": self.guest_symbols is not None,
            "--level": self.level is not None,
        }
        refuse_pairs([name for name, is_given in given.items() if is_given])
        if self.as_guest and (self.explain is None or len(self.files) > 1):
            raise UsageError("--as-guest writes one VM-exit's past: FILE --explain N --as-guest")
        if self.begin and self.end and self.begin[1] == self.end[1] and self.begin[0] > self.end[0]:
            raise UsageError("--from is behind --to: nothing lies between them")
        if self.full and self.output_format != "html":
            raise UsageError("--full is for --format html: text has --show all, and JSON is whole")
        if self.output_format == "html" and len(self.files) > 1:
            raise UsageError("--format html takes one FILE; kvmtrace compare shows two side by side")

    def selects(self) -> list[str]:
        """Return the options given that need events."""
        kept = (self.by, self.sort, self.tid, self.vcpu_id, self.level, self.begin, self.end)
        given = (*kept, self.guest_symbols, self.explain)
        names = ("--by", "--sort", "--tid", "--vcpu", "--level", "--from", "--to", "--guest-symbols", "--explain")
        return [name for name, value in zip(names, given, strict=True) if value is not None]

    def selection(self) -> Selection:
        """Return the part of the recordings that is asked for."""
        from kvmtrace.report.selection import Selection

        kinds = {moment[1] for moment in (self.begin, self.end) if moment}
        if len(kinds) > 1:
            raise UsageError("--from and --to: both relative to the start, or both with @")
        begin, end = (moment[0] if moment else None for moment in (self.begin, self.end))
        return Selection(
            self.tid, self.vcpu_id, begin, end, kinds != {False}, None if self.level is None else int(self.level)
        )

    def style(self) -> Style:
        """Return the colours and the width of what is printed."""
        from kvmtrace.render.terminal import Style

        return Style(wants_colour() and self.output is None, text_width(self.output))

    def text_options(self) -> TextOptions:
        """Return how to print."""
        from kvmtrace.render.text.report_text import SHOW, TextOptions

        show = frozenset(SHOW if self.verbose or "all" in self.show else self.show)
        return TextOptions(self.by, self.sort, perf=self.perf_compatible, show=show, slowest=self.slowest)

    def report_options(self) -> ReportOptions:
        """Return what the report shall hold."""
        from kvmtrace.report.build import ALL_ROWS, DOCUMENT_ROWS, SHOWN_ROWS, SLOWEST, ReportOptions

        options = ReportOptions(
            self.selection(),
            model=not self.no_model,
            perf_only=self.perf_compatible and self.output_format == "text",
            timeline=self.output_format == "html",
            every_segment=self.full,
            slowest=max(self.slowest or 0, SLOWEST),
            detail_rows=ALL_ROWS if self.by else SHOWN_ROWS if self.output_format == "text" else DOCUMENT_ROWS,
            every_step=self.output_format == "json",
        )
        if not self.guest_symbols:
            return options
        from kvmtrace.report.guest_symbols import read_guest_symbols

        return replace(options, symbol=read_guest_symbols(self.guest_symbols).name)


def _answer(request: Request) -> str:
    """Return the text to write."""
    from kvmtrace.formats.summary import is_monitored_file

    if is_monitored_file(request.files[0]):
        return _monitored(request)
    summaries = _summaries(request.files)
    if summaries is not None:
        if request.selects():
            raise UsageError(f"a recording of --summary holds counts and no events: nothing for {request.selects()[0]}")
        return _render_summaries(summaries, request)
    if request.explain is not None:
        return "\n".join(_story(path, request) for path in request.files)
    options = request.report_options()
    reports = [load_report(path, options, request.vm) for path in request.files]
    if request.anonymize:
        from kvmtrace.report.anonymize import anonymized

        reports = [anonymized(report) for report in reports]
    return _render(reports, request)


def _monitored(request: Request) -> str:
    """Return what files of `record --monitor` hold."""
    from kvmtrace.formats.summary.monitor_file import read_monitored
    from kvmtrace.render.text.monitor_text import render_monitored

    if request.selects() or request.output_format == "html" or request.vm or request.anonymize:
        raise UsageError("a recording of --monitor holds counts of transitions: it is shown as text or json as it is")
    contents = [(path, Path(path).read_bytes()) for path in request.files]
    found = [(path, read_monitored(data, path)) for path, data in contents]
    if request.output_format == "json":
        return "".join(data.decode() for _, data in contents)
    return "\n".join(render_monitored(one, path, request.style()) for path, one in found)


def _print_schema(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from kvmtrace.report.json_schema import shipped_schema

    sys.stdout.write(shipped_schema())
    context.exit()


def _summaries(files: tuple[str, ...]) -> list[tuple[str, bytes]] | None:
    """Return the files' names and bytes if the first is one of `record --summary`, which holds no events."""
    from kvmtrace.formats.summary import is_summary_file

    if files[0] == "-" or not is_summary_file(files[0]):
        return None
    return [(name, Path(name).read_bytes()) for name in files]


def _render_summaries(contents: list[tuple[str, bytes]], request: Request) -> str:
    from kvmtrace.formats.summary.summary_file import only_vm, read_summary
    from kvmtrace.render.text.summary_text import render_summary
    from kvmtrace.report.anonymize import anonymized_summary

    if request.output_format == "html":
        raise UsageError("a recording of --summary has no events to show in HTML; use text or json")
    if request.vm is not None:
        contents = [(name, only_vm(data, name, request.vm)) for name, data in contents]
    if request.anonymize:
        contents = [(name, anonymized_summary(data, read_summary(data, name).meta)) for name, data in contents]
    summaries = [read_summary(data, name) for name, data in contents]
    if request.output_format == "json":
        return "".join(data.decode() for _, data in contents)
    return "\n".join(render_summary(summary) for summary in summaries)


def _render(reports: list[Report], request: Request) -> str:
    if request.output_format == "json":
        from kvmtrace.report.json_document import to_json

        documents = [to_json(report) for report in reports]
        return documents[0] + "\n" if len(documents) == 1 else "[\n" + ",\n".join(documents) + "\n]\n"
    if request.output_format == "html":
        html: str = importlib.import_module("kvmtrace.render.html").render_html(reports[0])
        return html
    if request.perf_compatible:  # the other tables' code is not loaded for these
        from kvmtrace.render.text.perf_text import render_perf_report

        return "\n".join(map(render_perf_report, reports))
    from kvmtrace.render.text.report_text import render_text

    return "\n".join(render_text(report, request.text_options(), request.style()) for report in reports)


def _story(path: str, request: Request) -> str:
    from kvmtrace.check.explain import explain_exit
    from kvmtrace.render.text.explain_text import render_story
    from kvmtrace.report.anonymize import anonymized_story
    from kvmtrace.report.story_waits import who_ran
    from kvmtrace.table.vm_threads import names_of_threads

    assert request.explain is not None
    with opened(path, vm=request.vm) as (recording, _):
        if request.as_guest:
            return _listing(recording.events(), path, request)
        story = explain_exit(recording.events(), request.explain, tid=request.tid, vcpu=request.vcpu_id)
        ran = who_ran(recording, story)
    story = replace(story, vm=names_of_threads(recording).get(story.tid), ran=ran)
    return render_story(anonymized_story(story) if request.anonymize else story, request.style())


def _listing(events: EventTable, path: str, request: Request) -> str:
    """Return a guest that repeats the VM-exits up to the one that is explained."""
    from kvmtrace.predict.reproducer import reproduce
    from kvmtrace.render.text.reproducer_text import render_listing

    assert request.explain is not None
    found = reproduce(events, request.explain, tid=request.tid, vcpu=request.vcpu_id)
    return render_listing(found, "a recording" if request.anonymize else path)


@click.command(
    "report",
    epilog="Example: kvmtrace report run.dat --by port --sort count. "
    "For scripts: kvmtrace report run.dat --format json -o run.json",
)
@click.argument("files", nargs=-1, required=True, metavar="FILE...", shell_complete=recordings)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["text", "html", "json"]),
    default="text",
    help="json: one document, for several FILEs a list of them.",
)
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write here instead of standard output.")
@force_option
@click.option(
    "--by", type=click.Choice(BY), help="Only this table, with all its rows; with json: all rows of its list."
)
@click.option("--sort", type=click.Choice(SORT), help="Sort the table by this column.")
@click.option("--vm", metavar="NAME|UUID", help=VM_HELP)
@click.option("--tid", type=ID, help="Only this thread.")
@click.option("--vcpu", "vcpu_id", type=click.IntRange(0, 2**31 - 1), help="Only vCPUs with this id.")
@click.option(
    "--level",
    type=click.Choice(["1", "2"]),
    help="Only VM-exits of this level: 1 the guest, 2 guests of the guest; the time budget stays whole.",
)
@click.option(
    "--from",
    "begin",
    type=Moment(),
    metavar="T",
    help="Only from T on: 1.5 or 20ms after the start, or @123.456 on the trace's clock.",
)
@click.option("--to", "end", type=Moment(), metavar="T", help="Only up to T.")
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
@click.option(
    "--as-guest",
    is_flag=True,
    help="With --explain: write a guest that repeats the VM-exits up to N, for `record --guest FILE.lst`.",
)
@click.option(
    "--slowest",
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="Only the N slowest VM-exits, each with its number for --explain.",
)
@click.option(
    "--show",
    type=Parts(PARTS),
    default=(),
    metavar="PART[,PART]",
    help=f"Tell these parts in full: {', '.join(PARTS)}.",
)
@click.option("-v", "--verbose", is_flag=True, help="The same as --show all.")
@click.option("--full", is_flag=True, help="With --format html: all of a long recording, however large the page.")
@anonymize_option
@click.option("--schema", is_flag=True, is_eager=True, expose_value=False, callback=_print_schema,
              help="Print the JSON Schema of --format json, and end.")  # fmt: skip
def command(**options: Any) -> None:
    """Report on recordings: exits, time budget, attribution, and whether the reference model agrees.

    FILE is a kvmtrace recording, trace.dat, perf.data, ftrace text, or - for standard input.
    """
    request = Request(**options)
    request.refuse_what_does_not_go_together()
    check_output(request.output, request.files, force=request.force)
    prepare_memory()
    finish_interrupted(request.files)
    write(_answer(request), request.output)
