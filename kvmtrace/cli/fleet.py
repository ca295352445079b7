"""`kvmtrace fleet`: many recordings summarised, reported on, compared and queried."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING

import click

from kvmtrace.cli.completion import files as recordings
from kvmtrace.cli.output import check_folder, check_output, force_option, text_width, wants_colour, write
from kvmtrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.fleet.reduce import Fleet
    from kvmtrace.fleet.summarizing import Progress
    from kvmtrace.render.terminal import Style

SHOW_EVERY_S = 0.2


@click.group(
    "fleet",
    epilog="Example: kvmtrace fleet summarize s3://traces/2026-11/ -o s3://summaries && "
    "kvmtrace fleet report s3://summaries",
)
def command() -> None:
    """Many recordings: summaries that add up, hosts unlike their peers, groups compared.

    Needs pip install 'kvmtrace[fleet]'. SOURCE and DEST are paths or fsspec URLs (s3://, gs://, file://).
    """


def _style(output: str | None) -> Style:
    from kvmtrace.render.terminal import Style

    return Style(wants_colour() and output is None, text_width(output))


def _shower() -> Callable[[Progress], None]:
    """Return what shows a job's progress on a terminal; in a pipe nothing does."""
    import time

    if not sys.stderr.isatty():
        return lambda _: None
    shown = 0.0

    def show(progress: Progress) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < SHOW_EVERY_S and progress.done < progress.total:
            return
        shown = now
        left = progress.remaining_s()
        rest = f", {left:,.0f} s left" if left is not None and progress.done < progress.total else ""
        line = f"{progress.done:,} of {progress.total:,} recordings, {progress.rate():,.1f}/s{rest}"
        end = "\n" if progress.done == progress.total else ""
        click.echo(f"\r\x1b[K{line}{end}", nl=False, err=True)

    return show


@command.command(
    "summarize",
    short_help="Turn recordings into summaries.",
    epilog="Example: kvmtrace fleet summarize /var/traces 'more/*.dat' -o summaries",
)
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...", shell_complete=recordings)
@click.option("-o", "--output", "dest", required=True, metavar="DEST", help="Folder or URL of the summaries.")
@click.option("--engine", type=click.Choice(["local", "dask"]), default="local", show_default=True)
@click.option("--scheduler", metavar="ADDRESS", help="A running Dask scheduler, tcp://HOST:8786.")
@click.option("--workers", type=click.IntRange(1, 4096), help="Processes on this machine; default: one per CPU.")
@click.option("--memory-limit", metavar="SIZE", help="Of each Dask worker started here, such as 2GiB.")
@click.option("--strict", is_flag=True, help="Exit code 3 if a source could not be summarised.")
def summarize(
    *, sources: tuple[str, ...], dest: str, engine: str, scheduler: str | None, workers: int | None,
    memory_limit: str | None, strict: bool,
) -> None:  # fmt: skip
    """Turn each recording into one small summary that adds up exactly.

    A recording whose summary is there already is not read again. What cannot be summarised becomes a row in the
    failures of DEST; Ctrl-C leaves what is done, and the same command goes on.
    """
    from kvmtrace.fleet.executors import Engine
    from kvmtrace.fleet.sources import find_sources
    from kvmtrace.fleet.store import Store
    from kvmtrace.fleet.summarizing import FAILED, summarize_all
    from kvmtrace.render.text.fleet_text import render_progress

    chosen = Engine(engine, workers, scheduler, memory_limit)
    store = Store(dest)
    if store.is_local:
        check_folder(store.root)
    progress = summarize_all(chosen, find_sources(sources), dest, _shower())
    click.echo(render_progress(progress), nl=False)
    if strict and progress.counts[FAILED]:
        sys.exit(3)


def _part(fleet: Fleet, where: str) -> Fleet:
    part = fleet.part(where)
    if not part.n_recordings:
        raise UsageError(f"no recording for which {where}")
    return part


@command.command(
    "report",
    short_help="Report over all summaries.",
    epilog="Example: kvmtrace fleet report summaries --by kernel --where \"host LIKE 'web-%'\"",
)
@click.argument("dest", metavar="DEST", shell_complete=recordings)
@click.option("--by", default="kernel,cpu_model", show_default=True, help="Columns: host,kernel,cpu_model,isa,day.")
@click.option("--where", metavar="SQL", help="Only recordings for which this holds.")
@click.option("--format", "output_format", type=click.Choice(["text", "html", "json"]), default="text")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write here instead of standard output.")
@force_option
@click.option("--all", "everything", is_flag=True, help="All rows of every table.")
def report(
    *, dest: str, by: str, where: str | None, output_format: str, output: str | None, everything: bool, force: bool
) -> None:  # fmt: skip
    """Report over all summaries: hosts unlike their peers, broken rules, totals and percentiles per group."""
    check_output(output, force=force)
    from kvmtrace.fleet.fleet_report import build_fleet_report
    from kvmtrace.fleet.reduce import Fleet

    columns = tuple(name.strip() for name in by.split(",") if name.strip())
    with Fleet(dest) as fleet:
        document = build_fleet_report(_part(fleet, where) if where else fleet, columns, where)
    if output_format == "json":
        write(document.to_json() + "\n", output)
    elif output_format == "html":
        from kvmtrace.render.html.fleet_page import render_fleet_html

        write(render_fleet_html(document), output)
    else:
        from kvmtrace.render.text.fleet_text import render_fleet_report

        write(render_fleet_report(document, _style(output), everything=everything), output)


@command.command(
    "compare",
    short_help="Compare two groups of hosts.",
    epilog="Example: kvmtrace fleet compare summaries --base \"kernel LIKE '6.1.%'\" --new \"kernel LIKE '6.12.%'\"",
)
@click.argument("dest", metavar="DEST", shell_complete=recordings)
@click.option("--base", required=True, metavar="SQL", help="Which recordings are the base.")
@click.option("--new", required=True, metavar="SQL", help="Which recordings are new.")
@click.option("--format", "output_format", type=click.Choice(["text", "json"]), default="text")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write here instead of standard output.")
@force_option
@click.option("--all", "everything", is_flag=True, help="All rows of every table.")
@click.option("--fail-on-regression", is_flag=True, help="Exit code 1 if something became slower.")
def compare(
    *, dest: str, base: str, new: str, output_format: str, output: str | None, everything: bool,
    fail_on_regression: bool, force: bool,
) -> None:  # fmt: skip
    """Compare two groups of hosts, within each CPU model; the host is the statistical unit."""
    check_output(output, force=force)
    from kvmtrace.fleet.cohorts import compare_cohorts
    from kvmtrace.fleet.reduce import Fleet
    from kvmtrace.render.text.fleet_text import render_fleet_comparison

    with Fleet(dest) as fleet:
        result = compare_cohorts(_part(fleet, base), _part(fleet, new), (base, new))
    if output_format == "json":
        document = {"schema": "kvmtrace.fleet-compare/1", **dataclasses.asdict(result)}
        for row, change in zip(document["changes"], result.changes, strict=True):
            row |= {"significant": change.significant, "regression": change.is_regression}
        write(json.dumps(document, indent=1, allow_nan=False) + "\n", output)
    else:
        write(render_fleet_comparison(result, _style(output), everything=everything), output)
    if fail_on_regression and result.regressions:
        sys.exit(1)


@command.command(
    "sql",
    short_help="Answer a query with CSV.",
    epilog='Example: kvmtrace fleet sql summaries "SELECT host, sum(count) FROM exits GROUP BY host"',
)
@click.argument("dest", metavar="DEST", shell_complete=recordings)
@click.argument("query", metavar="QUERY")
def sql(*, dest: str, query: str) -> None:
    """Answer a query over the summaries with CSV (DuckDB's SQL).

    Tables: recordings, exits, userspace_exits, vcpus, vms, ports, msrs, gpas, calls, rules, findings, failures.
    The query reaches these alone: no file is read or written (kvmtrace.load_fleet in Python joins your own).
    """
    from kvmtrace.fleet.reduce import Fleet

    with Fleet(dest) as fleet:
        fleet.lock(query)
        click.echo(fleet.csv(query), nl=False)
