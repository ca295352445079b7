"""`kvmtrace compare`: two recordings, or two sets of them."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from kvmtrace.cli.allocation import prepare_memory
from kvmtrace.cli.completion import files as recordings
from kvmtrace.cli.output import check_output, force_option, write
from kvmtrace.cli.parameter_types import VM_HELP, FiniteRange
from kvmtrace.cli.progress import opened
from kvmtrace.errors import CapabilityError, UsageError

if TYPE_CHECKING:
    from kvmtrace.ab.recordings import RecordingComparison
    from kvmtrace.ab.run import RunSamples


def _load(path: str, vm: str | None, level: int | None) -> RunSamples:
    from kvmtrace.ab.collect_run import read_run

    with opened(path, vm=vm) as (recording, progress):
        return read_run(recording, progress, level=level)


def _render(result: RecordingComparison, output_format: str, *, everything: bool) -> str:
    from kvmtrace.render.text import compare_text as recordings_text

    if output_format == "json":
        return recordings_text.render_comparison_json(result)
    if output_format == "html":
        from kvmtrace.render.html.compare_page import render_comparison_html

        return render_comparison_html(result)
    return recordings_text.render_comparison_text(result, everything=everything)


def _numbered(side: str, paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{side} {i + 1}" for i in range(len(paths)))


@click.command(
    "compare",
    epilog="Example: kvmtrace compare before.dat after.dat --fail-on-regression. "
    "Several runs per side: kvmtrace compare --base b1.dat --base b2.dat --base b3.dat n1.dat n2.dat n3.dat",
)
@click.argument("files", nargs=-1, required=True, metavar="BASE NEW", shell_complete=recordings)
@click.option(
    "--base",
    "base",
    multiple=True,
    metavar="FILE",
    shell_complete=recordings,
    help="A run of the base side (repeatable); then every FILE argument is a run of the new side.",
)
@click.option("--format", "output_format", type=click.Choice(["text", "html", "json"]), default="text")
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Write here instead of standard output.")
@force_option
@click.option(
    "--min-effect",
    type=FiniteRange(0, 10),
    help="Smallest relative change that counts; default 0.05, or 0.25 with fewer than three runs on a side.",
)
@click.option("--vm", metavar="NAME|UUID", help=VM_HELP)
@click.option(
    "--level",
    type=click.Choice(["1", "2"]),
    help="Only VM-exits of this level: 1 the guest, 2 guests of the guest; time budget and model stay whole.",
)
@click.option("--all", "everything", is_flag=True, help="List the insignificant tests too.")
@click.option("--anonymize", is_flag=True, help="Drop the files' names; a comparison names nothing else of the host.")
@click.option(
    "--fail-on-regression",
    is_flag=True,
    help="Exit code 1 if something became slower or more frequent, 4 if the sides cannot be compared.",
)
def command(
    *, files: tuple[str, ...], base: tuple[str, ...], output_format: str, output: str | None, min_effect: float | None,
    everything: bool, fail_on_regression: bool, vm: str | None, level: str | None, anonymize: bool, force: bool,
) -> None:  # fmt: skip
    """Compare recordings per exit reason and phase, with significance.

    What was recorded differently (events, filters, guests, architectures, losses) is not compared, and said first.
    With one run per side, blocks within the runs are compared; with three or more, the runs themselves.
    """
    check_output(output, (*base, *files), force=force)
    from kvmtrace.ab.recordings import compare_runs

    if not base:
        if len(files) != 2:
            raise UsageError("compare takes BASE and NEW; for several runs per side give the base ones with --base")
        base, files = files[:1], files[1:]
    prepare_memory()
    chosen = None if level is None else int(level)
    sides = [[_load(path, vm, chosen) for path in side] for side in (base, files)]
    result = compare_runs(*sides, min_effect=min_effect)
    if chosen is not None:
        result = replace(result, notes=(f"only VM-exits of L{chosen} are compared", *result.notes))
    if anonymize:
        result = replace(result, base_runs=_numbered("base", base), new_runs=_numbered("new", files))
    text = _render(result, output_format, everything=everything)
    write(text, output)
    if fail_on_regression and not result.comparable:
        raise CapabilityError(f"a regression cannot be told: {result.obstacles[0].why}", "record both sides alike")
    if fail_on_regression and result.regressed:
        sys.exit(1)
