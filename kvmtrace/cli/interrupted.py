"""Commands that read files first finish what a killed recorder left; a directory listing when there is nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterable

RUN_DIR = Path("/run/kvmtrace")  # capture/registry.py; not imported, reading a file must start fast


def finish_interrupted(files: Iterable[str]) -> None:
    """Finish interrupted recordings, those of `files` at least, and say so on standard error."""
    outputs = [Path(name) for name in files if name != "-"]
    if not any(_waits_beside(path) for path in outputs) and not _registered():
        return
    from kvmtrace.capture.recover import reclaim

    looked: list[Path | None] = [None, *outputs]
    for line in dict.fromkeys(line for output in looked for line in reclaim(output)):
        click.echo(f"kvmtrace: {line}", err=True)


def _waits_beside(output: Path) -> bool:
    prefix = f".{output.name}.kvmtrace-"
    try:
        return any(entry.name.startswith(prefix) for entry in output.parent.iterdir())
    except OSError:
        return False


def _registered() -> bool:
    try:
        return any(RUN_DIR.iterdir())
    except OSError:
        return False
