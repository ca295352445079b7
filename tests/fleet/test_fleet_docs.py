"""docs/fleet.md names only commands and options that exist."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

from kvmtrace.cli.main import COMMANDS

DOCS = (Path(__file__).parents[2] / "docs" / "fleet.md").read_text()
LINES = [line for line in re.findall(r"^    ((?:dask|kvmtrace) .*)$", DOCS, re.MULTILINE) if "{" not in line]


def command_of(words: list[str]) -> click.Command:
    """Return the command that words begin with."""
    if words[0] == "dask":
        found = importlib.import_module(f"distributed.cli.dask_{words[1]}").main
    else:
        found = importlib.import_module(COMMANDS[words[1]][0]).command
        if isinstance(found, click.Group):
            found = found.commands[words[2]]
    assert isinstance(found, click.Command)
    return found


@pytest.mark.parametrize("line", LINES)
def test_commands_exist(line: str) -> None:
    for part in line.split(" && "):
        words = shlex.split(part, comments=True)
        if words[0] not in ("dask", "kvmtrace"):
            continue
        known = {name for parameter in command_of(words).params for name in parameter.opts}
        assert {word for word in words[1:] if re.fullmatch(r"--?[a-z-]+", word)} <= known


def test_there_are_some() -> None:
    assert {tuple(line.split()[:2]) for line in LINES} >= {("dask", "scheduler"), ("dask", "worker"), ("dask", "ssh")}
    assert len(LINES) > 12
