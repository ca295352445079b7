"""`kvmtrace export`: a recording as Parquet, Arrow, CSV or Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from kvmtrace.cli.allocation import prepare_memory
from kvmtrace.cli.interrupted import finish_interrupted
from kvmtrace.cli.output import write_file
from kvmtrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.table.recording import Recording

SUFFIXES = (".parquet", ".arrow", ".csv", ".perfetto.json", ".pftrace")


def _write_perfetto(recording: Recording, out: IO[bytes], *, as_json: bool) -> None:
    import io

    from kvmtrace.check.engine import check_recording
    from kvmtrace.render.perfetto import write_pftrace, write_trace_json
    from kvmtrace.spans.slices import collect_segments, label_threads

    segments = collect_segments(recording.iter_events())
    labels = label_threads(recording, segments.tids)
    violations = check_recording(recording).violations
    if not as_json:
        write_pftrace(out, segments, labels=labels, violations=violations, clock=recording.capture.clock)
        return
    text = io.TextIOWrapper(out, encoding="utf-8", write_through=True)
    write_trace_json(text, segments, labels=labels, violations=violations)
    text.detach()


def _writer(name: str) -> Callable[[Recording, IO[bytes]], None]:
    """Return the writer of a file's suffix."""
    from functools import partial

    lower = name.lower()
    if lower.endswith(".perfetto.json"):
        return partial(_write_perfetto, as_json=True)
    if lower.endswith(".pftrace"):
        return partial(_write_perfetto, as_json=False)
    from kvmtrace.formats.arrow import arrow_writing as arrow

    writers: dict[str, Callable[[Recording, IO[bytes]], None]] = {
        ".parquet": arrow.write_parquet,
        ".arrow": arrow.write_arrow,
        ".csv": arrow.write_csv,
    }
    return writers[Path(lower).suffix]


@click.command("export", epilog="Example: kvmtrace export run.dat -o run.parquet")
@click.argument("file", metavar="FILE")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    help="Where to; the suffix decides the format: " + ", ".join(SUFFIXES) + ".",
)
def command(*, file: str, output: str) -> None:
    """Write a recording in another tool's format.

    .parquet and .arrow hold every event with its fields (read them with pandas, DuckDB, Polars); .csv the
    same as text; .pftrace and .perfetto.json are timelines for the Perfetto viewer, a track per vCPU.
    They name threads and guest addresses: to share findings, use `kvmtrace report --anonymize`.
    """
    if not output.lower().endswith(SUFFIXES):
        raise UsageError(f"{output}: the suffix must be one of {', '.join(SUFFIXES)}")
    from kvmtrace.formats import open_recording

    prepare_memory()
    finish_interrupted([file])
    recording = open_recording(file, any_architecture=True)
    write = _writer(output)
    write_file(Path(output), lambda out: write(recording, out))
    click.echo(f"{output}: {Path(output).stat().st_size:,} bytes")
