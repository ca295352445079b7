"""`kvmtrace export`: a recording as Parquet, Arrow, CSV or Perfetto."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from kvmtrace.cli.allocation import prepare_memory
from kvmtrace.cli.completion import files as recordings
from kvmtrace.cli.interrupted import finish_interrupted
from kvmtrace.cli.output import anonymize_option, check_output, force_option, write_file
from kvmtrace.cli.parameter_types import VM_HELP
from kvmtrace.cli.progress import opened
from kvmtrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.table.recording import Recording

    Write = Callable[[Recording, IO[bytes], Callable[[int], None]], None]

TABLES = ("events", "vm_exits", "userspace_exits")
TABLE_SUFFIXES = (".parquet", ".arrow", ".csv")
SUFFIXES = (*TABLE_SUFFIXES, ".perfetto.json", ".pftrace")


def _suffix(name: str) -> str:
    """Return which of SUFFIXES a file has."""
    lower = name.lower()
    found = next((suffix for suffix in SUFFIXES if lower.endswith(suffix)), None)
    if found is None:
        raise UsageError(f"{name}: the suffix must be one of {', '.join(SUFFIXES)}")
    return found


def _writer(suffix: str, table: str, *, grouped: bool) -> Write:
    """Return what writes a table as a file of this suffix."""
    if suffix not in TABLE_SUFFIXES:
        from kvmtrace.render.perfetto.trace_file import write_trace

        return lambda recording, out, progress: write_trace(
            recording, out, as_json=suffix == ".perfetto.json", progress=progress
        )
    if table != "events":
        from kvmtrace.formats.arrow.row_tables import write_rows
        from kvmtrace.spans.row_streams import ROW_TABLES

        return lambda recording, out, progress: write_rows(
            ROW_TABLES[table](recording, progress), out, suffix.removeprefix(".")
        )
    from kvmtrace.formats.arrow import arrow_writing as arrow

    writers: dict[str, Write] = {
        ".parquet": functools.partial(arrow.write_parquet, grouped=grouped),
        ".arrow": arrow.write_arrow,
        ".csv": arrow.write_csv,
    }
    return writers[suffix]


@click.command("export", epilog="Example: kvmtrace export run.dat -o run.parquet")
@click.argument("file", metavar="FILE", shell_complete=recordings)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    shell_complete=recordings,
    help="Where to; the suffix decides the format: " + ", ".join(SUFFIXES) + ".",
)
@click.option(
    "--table",
    type=click.Choice(TABLES),
    default="events",
    show_default=True,
    help="A row for every event, every VM-exit (paired, decoded), or every return to the VMM.",
)
@click.option("--vm", metavar="NAME|UUID", help=VM_HELP)
@click.option(
    "--grouped",
    is_flag=True,
    help="Events of .parquet by thread and kind instead of by time: kvmtrace reads it sooner; `row` is the order.",
)
@anonymize_option
@force_option
def command(
    *, file: str, output: str, table: str, vm: str | None, grouped: bool, anonymize: bool, force: bool
) -> None:  # fmt: skip
    """Write a recording in another tool's format.

    .parquet and .arrow hold every event with its fields (read them with pandas, DuckDB, Polars); .csv the
    same as text (a cell that a spreadsheet would take for a formula begins with an apostrophe); .pftrace and
    .perfetto.json are timelines for the Perfetto viewer, a track per vCPU.
    """
    suffix = _suffix(output)
    if grouped and (suffix != ".parquet" or table != "events"):
        raise UsageError("--grouped is for the events of .parquet")
    if table != "events" and suffix not in TABLE_SUFFIXES:
        raise UsageError(f"--table {table} is for {', '.join(TABLE_SUFFIXES)}; {suffix} is a timeline")
    check_output(output, [file], force=force)
    prepare_memory()
    finish_interrupted([file])
    with opened(file, vm=vm, any_architecture=True) as (recording, progress):
        source = recording
        if anonymize:
            from kvmtrace.report.anonymized_recording import AnonymizedRecording

            source = AnonymizedRecording(recording)
        write = _writer(suffix, table, grouped=grouped)
        write_file(Path(output), lambda out: write(source, out, progress))
    click.echo(f"{output}: {Path(output).stat().st_size:,} bytes")
