"""A reproducer as a listing that `kvmtrace record --guest FILE.lst` runs; docs/guest-listings.md documents the form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.predict.assembler import BEGIN
from kvmtrace.render.terminal import escape, plural

if TYPE_CHECKING:
    from kvmtrace.predict.assembler import Placed
    from kvmtrace.predict.reproducer import Reproducer

CODE_WIDTH = 24  # eight bytes
TEXT_WIDTH = 24


def render_listing(found: Reproducer, path: str) -> str:
    """Return the guest's listing."""
    lines = [f"; repeats VM-exits {found.first} to {found.last} of {_ascii(path)}", ";"]
    for reason, number in sorted(found.left_out.items(), key=lambda item: -item[1]):
        lines.append(f"; left out: {plural(number, 'VM-exit')} of {_ascii(reason)}")
    for row in found.program.placed():
        lines += ["start:"] if row.address == BEGIN else []
        lines.append(_row(row))
    return "\n".join([*lines, ""])


def _row(row: Placed) -> str:
    comment = f"; {row.comment}" if row.comment else ""
    code = row.code.hex(" ")
    return f"{row.address:04x}  {code:<{CODE_WIDTH - 1}} {row.text:<{TEXT_WIDTH}}  {comment}".rstrip()


def _ascii(text: str) -> str:
    return escape(text).encode("ascii", "backslashreplace").decode()
