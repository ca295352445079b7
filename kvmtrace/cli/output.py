"""Files that commands write: private, complete or not there, the user's own under sudo, and never what is read."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from kvmtrace.errors import CapabilityError, UsageError
from kvmtrace.whole_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

HEAD_BYTES = 4096  # enough to recognise a summary
force_option = click.option("--force", is_flag=True, help="Write over a recording.")
anonymize_option = click.option(
    "--anonymize", is_flag=True, help="Drop host, file, thread and VM names and guest addresses, consistently."
)


def check_output(output: str | Path | None, inputs: Iterable[str | Path] = (), *, force: bool = False) -> None:
    """Refuse an output that would destroy something, before any work is done.

    Parameters
    ----------
    output : where the command will write; None or "-" for standard output
    inputs : what it reads; never written over, under whatever name or link
    force : the user gave --force: another recording may be written over

    Raises
    ------
    UsageError
        It is no file's name, an input, or a recording without `force`.
    CapabilityError
        Its folder is not there, or not writable.
    """
    if output is None or str(output) == "-":
        return
    path = Path(output)
    if str(output) in {"", "."} or path.is_dir():
        raise UsageError(f"-o needs the name of a file, not {str(output)!r}")
    for name in inputs:
        if str(name) != "-" and _same_file(path, Path(name)):
            raise UsageError(f"{output} is the input {name}: write to another file")
    if path.is_file() and not force and _is_recording(path):
        raise UsageError(f"{output} is a recording; --force writes over it")
    if not path.exists() and not os.access(path.parent, os.W_OK):
        raise CapabilityError(f"{output} cannot be written: {_why_not(path.parent)}")


def check_folder(folder: str | Path, *, made: bool = True) -> None:
    """Refuse a folder for outputs before any work is done.

    Parameters
    ----------
    folder : where the command will write
    made : the command makes it, but none of the folders above it: a mistyped path is no tree of new folders

    Raises
    ------
    CapabilityError
        It is not there, or its own folder is not, or not writable.
    """
    path = Path(folder).absolute()
    holder = path.parent if made and not path.exists() else path
    if not holder.is_dir():
        raise CapabilityError(f"{holder}: no such directory", "make it, or choose another place")
    if not os.access(holder, os.W_OK):
        raise CapabilityError(f"{folder} cannot be written: {_why_not(holder)}")


def _why_not(folder: Path) -> str:
    """Say why nothing can be written to a folder."""
    if not folder.is_dir():
        return "No such directory"
    return "Read-only file system" if os.statvfs(folder).f_flag & os.ST_RDONLY else "Permission denied"


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:  # one of them is not there
        return False


def _is_recording(path: Path) -> bool:
    from kvmtrace.formats.known_formats import is_recording
    from kvmtrace.formats.summary import is_monitored, is_summary

    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:  # what cannot be read cannot be written over by accident either: writing tells why
        return False
    return is_summary(head) or is_monitored(head) or is_recording(path)


def wants_colour() -> bool:
    """Say whether standard output is a terminal that shall have colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def text_width(output: str | None) -> int:
    """Return how many columns a text shall have that goes to `output` (None: standard output)."""
    from kvmtrace.render.terminal import columns_wanted

    return columns_wanted(terminal=output is None and sys.stdout.isatty())


def write(text: str, output: str | None) -> None:
    """Write to a file, through the pager on a terminal, or to standard output."""
    if output and output != "-":
        write_text(Path(output), text)
    elif sys.stdout.isatty() and text.count("\n") >= _terminal_lines():
        os.environ.setdefault("LESS", "-RFX")
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

    Raises
    ------
    OSError
        It cannot be written.
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
