"""How far a command has come, on standard error of a terminal."""

from __future__ import annotations

import sys
import time

import click


class Progress:
    """Events read so far, on standard error of a terminal, from half a second on."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._next = time.monotonic() + 0.5
        self._shown = False
        self._on = sys.stderr.isatty()

    def __call__(self, n_events: int) -> None:
        """Show the number, at most five times a second."""
        if self._on and time.monotonic() >= self._next:
            self._next = time.monotonic() + 0.2
            self._shown = True
            click.echo(f"\r{self._path}: {n_events:,} events\x1b[K", err=True, nl=False)

    def done(self) -> None:
        """Remove the line."""
        if self._shown:
            click.echo("\r\x1b[K", err=True, nl=False)
