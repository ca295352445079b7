"""`kvmtrace doctor`: what this host can record, what is missing and how to get it."""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from kvmtrace.capture.diagnosis import Diagnosis
    from kvmtrace.capture.host_checks import Check

EPILOG = """\b
Examples:
  kvmtrace doctor
  sudo kvmtrace doctor --format json

Exit code 0 if something can be recorded here, 4 if not. Changes nothing, but for finishing the file of a
recorder that was killed.
"""
MARKS = {"ok": "ok", "missing": "MISSING", "optional": "-"}
COLOURS = {"ok": "green", "missing": "red", "optional": "yellow"}


@click.command("doctor", epilog=EPILOG)
@click.option("--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(form: str) -> int:
    """Say what this host can record, with which back end, and how to get what is missing."""
    from kvmtrace.capture.diagnosis import diagnose
    from kvmtrace.capture.recover import reclaim
    from kvmtrace.errors import CapabilityError

    for line in reclaim():
        click.echo(f"kvmtrace: {line}", err=True)
    diagnosis = diagnose()
    if form == "json":
        click.echo(json.dumps(diagnosis.to_dict(), indent=2))
    else:
        width = min(shutil.get_terminal_size((100, 24)).columns, 100)
        for line in render(diagnosis, width):
            click.echo(line)
    return 0 if diagnosis.can_record else CapabilityError.exit_code


def render(diagnosis: Diagnosis, width: int) -> list[str]:
    """Return the diagnosis as lines of at most `width` columns."""
    host = diagnosis.host
    lines = [f"{host['host']}: Linux {host['kernel']}, {host['cpu_model'] or 'unknown CPU'}", ""]
    column = max(len(check.name) for check in diagnosis.checks)
    for check in diagnosis.checks:
        lines += _render_check(check, column, width)
    lines.append("")
    for name, backend in diagnosis.backends.items():
        if backend["usable"]:
            text = f"records {', '.join(backend['records'])}"
        else:
            text = f"cannot be used here ({backend['why']})"
        lines += textwrap.wrap(f"--backend {name}: {text}", width, subsequent_indent="    ")
    return lines


def _render_check(check: Check, column: int, width: int) -> list[str]:
    mark = click.style(f"{MARKS[check.state]:7}", fg=COLOURS[check.state])
    lines = [f"{mark} {check.name:{column}}  {check.found}"]
    if check.remedy and check.state != "ok":
        indent = " " * (8 + column + 2)
        lines += textwrap.wrap(check.remedy, width, initial_indent=indent, subsequent_indent=indent)
    return lines
