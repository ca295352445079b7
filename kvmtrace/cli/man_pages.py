"""Manual pages, made of what `--help` says: `python -m kvmtrace.cli.man_pages DIR` writes kvmtrace-record.1 and others.

Source of the layout: man-pages(7), groff_man(7)
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvmtrace import __version__
from kvmtrace.cli.main import cli

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

HEADING = re.compile(r"(Examples?|Exit codes):\n")


def pages() -> dict[str, str]:
    """Return file name -> manual page, of the command and all its subcommands."""
    with click.Context(cli, info_name="kvmtrace", **cli.context_settings) as context:
        return dict(_pages_of(cli, context))


def _pages_of(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    name = context.command_path.replace(" ", "-")
    yield f"{name}.1", _page(command, context, name)
    if isinstance(command, click.Group):
        for sub in command.list_commands(context):
            child = command.get_command(context, sub)
            assert child is not None
            with click.Context(child, info_name=sub, parent=context) as inner:
                yield from _pages_of(child, inner)


def _page(command: click.Command, context: click.Context, name: str) -> str:
    summary, _, rest = (command.help or "").strip().partition("\n\n")
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [
        f'.TH {name.upper()} 1 "" "kvmtrace {__version__}" "User Commands"',
        ".SH NAME",
        f"{_text(name)} \\- {_text(_line(summary).rstrip('.'))}",
        ".SH SYNOPSIS",
        f"\\fB{_text(context.command_path)}\\fR {_text(usage)}",
        ".SH DESCRIPTION",
        *_paragraphs((summary, *rest.split("\n\n"))),
        ".SH OPTIONS",
        *_options(command, context),
        *_epilog(command.epilog or ""),
    ]
    if isinstance(command, click.Group):
        others = [f"\\fB{_text(f'{name}-{sub}')}\\fR(1)" for sub in command.list_commands(context)]
        parts += [".SH SEE ALSO", ", ".join(others)]
    return "\n".join(parts) + "\n"


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        if text:
            yield from (".PP", _text(_line(text)))


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for param in command.get_params(context):
        record = param.get_help_record(context)
        if record is not None:
            yield ".TP"
            yield f"\\fB{_text(record[0])}\\fR"
            yield _text(record[1])


def _epilog(epilog: str) -> Iterator[str]:
    """Yield the examples and remarks; blocks that click leaves as they are stay so."""
    for block in epilog.split("\n\n"):
        kept = block.startswith("\b\n")
        text = block.removeprefix("\b\n").strip("\n")
        heading = HEADING.match(text + "\n")
        if heading and kept:
            yield f".SH {heading[1].upper()}"
            text = text[heading.end() :]
        elif not kept:
            title, colon, rest = text.partition(": ")
            if colon and title in ("Example", "Examples"):
                yield f".SH {title.upper()}"
                text = rest
        yield from (".nf", _text(text), ".fi") if kept else (".PP", _text(_line(text)))


def _line(text: str) -> str:
    return " ".join(text.replace("\b", "").split())


def _text(text: str) -> str:
    """Return text in which nothing is a request or an escape of roff."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return re.sub(r"^([.'])", r"\\&\1", escaped, flags=re.MULTILINE)


def main() -> None:
    """Write the pages into the folder that is named."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main()
