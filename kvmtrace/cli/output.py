"""Files that commands write for the user: private, complete or not there, and the user's own under sudo."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from kvmtrace.cli.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable


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


def write_file(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file readable by its owner only; it appears as a whole, and no planted link is followed.

    Devices and pipes that are there already are written to as they are.
    """
    write_whole(path, write, _give_to_user)


def write_text(path: Path, text: str) -> None:
    """Write a text as write_file does."""

    def write(out: IO[bytes]) -> None:
        out.write(text.encode("utf-8", "replace"))

    write_file(path, write)


def _give_to_user(fd: int) -> None:
    """Give a new file to the user who called sudo."""
    if os.geteuid() != 0 or "SUDO_UID" not in os.environ:
        return
    from kvmtrace.capture.invoking_user import invoking_user

    user = invoking_user()
    if user is not None:
        os.fchown(fd, *user)
