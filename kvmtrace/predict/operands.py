"""How a listing writes operands: registers, and the string instructions' forms."""

from __future__ import annotations

from functools import cache

from kvmtrace.lazy_dataclass import dataclass

Value = int | None

IF = 1 << 9
ZF = 1 << 6


@dataclass(frozen=True)
class StringIo:
    """An INS or OUTS instruction.

    Parameters
    ----------
    out : bool
    size : bytes per element
    rep : bool
    """

    out: bool
    size: int
    rep: bool


@cache
def locate(name: str) -> tuple[str, int, int]:
    """Return (name without prefix: "ax", shift, bits) of a register."""
    if name.startswith("e"):
        return name[1:], 0, 32
    if name[1] in "lh":
        return name[0] + "x", 8 if name[1] == "h" else 0, 8
    return name, 0, 16
