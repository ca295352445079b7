"""How far a command has come, on standard error of a terminal: how much of the file, of how many bytes, is read."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvmtrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvmtrace.table.recording import Recording

FIRST_S, EVERY_S = 0.5, 0.2
BAR = 24  # columns
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))


class Progress:
    """A bar on standard error of a terminal, from half a second on; it is called with the events read so far."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._next = time.monotonic() + FIRST_S
        self._shown = False
        self._on = sys.stderr.isatty()
        self._recording: Recording | None = None
        self._size = _size(path)
        self._opening = threading.Timer(FIRST_S, self._show, [f"opening, {_bytes(self._size)}"])
        self._opening.daemon = True
        if self._on:
            self._opening.start()

    def follow(self, recording: Recording) -> Recording:
        """Tell from now on how much of this recording is read; return it."""
        self._opening.cancel()
        self._recording = recording
        return recording

    def __call__(self, n_events: int) -> None:
        """Show how far it is, at most five times a second."""
        if self._on and time.monotonic() >= self._next:
            self._next = time.monotonic() + EVERY_S
            self._show(self._words(n_events))

    def _words(self, n_events: int) -> str:
        share = self._recording.read_share if self._recording is not None else None
        if share is None or self._size is None:
            return f"{n_events:,} events"
        done = round(share * BAR)
        read = round(share * self._size)
        return f"[{'#' * done}{'.' * (BAR - done)}] {_bytes(self._size, read)}, {n_events:,} events"

    def _show(self, words: str) -> None:
        self._shown = True
        click.echo(f"\r{self._path}: {words}\x1b[K", err=True, nl=False)

    def done(self) -> None:
        """Remove the line."""
        self._opening.cancel()
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)


def _size(path: str) -> int | None:
    """Return the bytes of a file, None of what has none (a pipe, a folder)."""
    try:
        return Path(path).stat().st_size if Path(path).is_file() else None
    except OSError:
        return None


def _bytes(size: int | None, read: int | None = None) -> str:
    """Return "540.5 MB", or how much of it is read: "120.1 of 540.5 MB"."""
    if size is None:
        return "of unknown size"
    unit, name = next(
        ((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= unit), (1, "B")
    )
    of = "" if read is None else f"{read / unit:,.1f} of "
    return f"{of}{size / unit:,.1f} {name}"


@contextlib.contextmanager
def opened(path: str, *, vm: str | None = None, any_architecture: bool = False) -> Iterator[tuple[Recording, Progress]]:
    """Give a recording, or what `--vm` means of it, and what shows how far it is read.

    Parameters
    ----------
    path : as the user named it; an fsspec URL is copied to this machine
    any_architecture : see open_recording
    """
    from kvmtrace.formats import open_recording
    from kvmtrace.table.one_vm import only_vm

    with _at_hand(path) as here:
        progress = Progress(here)
        try:
            recording = open_recording(here, any_architecture=True) if any_architecture else open_recording(here)
            if here != path:
                from dataclasses import replace

                recording.capture = replace(recording.capture, path=path)
            yield progress.follow(only_vm(recording, vm)), progress
        finally:
            progress.done()


@contextlib.contextmanager
def _at_hand(path: str) -> Iterator[str]:
    """Give the path of a recording on this machine."""
    if "://" not in path:
        yield path
        return
    from kvmtrace.fleet.sources import at_hand

    try:
        with at_hand(path) as here:
            yield str(here)
    except FileNotFoundError as error:
        if error.filename != path:
            raise
        raise UsageError(f"{path}: no such file") from error
