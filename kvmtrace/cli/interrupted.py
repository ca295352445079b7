"""Commands that read a file first finish what a killed recorder left of it; if nothing, that costs a listing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterable


def finish_interrupted(files: Iterable[str]) -> None:
    """Finish the interrupted recordings of these files, and say so on standard error; others' are left alone."""
    waiting = [path for path in (Path(name) for name in files if name != "-") if _waits_beside(path)]
    if not waiting:
        return
    from kvmtrace.capture.recover import reclaim_file

    for line in dict.fromkeys(line for path in waiting for line in reclaim_file(path)):
        click.echo(f"kvmtrace: {line}", err=True)


def _waits_beside(output: Path) -> bool:
    prefix = f".{output.name}.kvmtrace-"
    try:
        return any(entry.name.startswith(prefix) for entry in output.parent.iterdir())
    except OSError:
        return False
