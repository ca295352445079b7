"""Read a guest's listing: addresses, bytes, mnemonics and comments, one instruction a line.

    ; words for people; the first comment block describes the guest
    label:
    1000  ba f8 03              mov dx, 0x3f8          ; why

`bits 32` or `bits 16` says what code segment the rows behind it run in; real mode is the rule.
Columns are separated by two or more spaces: hexadecimal linear address, bytes, text; a comment follows `;`.
A text that begins with `db` or `dd` is data. Addresses ascend and leave no gap except where a new line of code begins
on purpose elsewhere. The bytes are what runs; tests hold the text against a disassembler.
"""

from __future__ import annotations

import re
from dataclasses import field
from itertools import pairwise
from pathlib import Path

from kvmtrace.lazy_dataclass import dataclass

_ROW = re.compile(
    r"(?P<address>[0-9a-f]{4})  (?P<code>(?:[0-9a-f]{2} )*[0-9a-f]{2})\s{2,}(?P<text>[^;]+?)"
    r"\s*(?:;\s?(?P<comment>.*))?$"
)
_BITS = re.compile(r"bits (?P<bits>16|32)\s*(?:;.*)?$")
_LABEL = re.compile(r"(?P<name>[a-z_][a-z0-9_]*):\s*(?:;.*)?$")


@dataclass(frozen=True)
class Line:
    """One instruction (or data) of a listing.

    Parameters
    ----------
    address : linear address of the first byte
    code : the bytes
    text : mnemonic and operands
    comment : what it is for, may be ""
    bits : of the code segment that it runs in
    """

    address: int
    code: bytes
    text: str
    comment: str
    bits: int = 16

    @property
    def is_data(self) -> bool:
        """Whether these bytes are never executed."""
        return self.text.split()[0] in {"db", "dd"}


@dataclass(frozen=True)
class Listing:
    """A guest's code and data.

    Parameters
    ----------
    name : str
    lines : instructions and data, in the order of the file
    labels : name -> address
    """

    name: str
    lines: tuple[Line, ...]
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def entry(self) -> int:
        """Address of `start`, where vCPU 0 begins."""
        return self.labels["start"]

    def write_to(self, memory: bytearray | memoryview) -> None:
        """Copy all bytes to where they belong in `memory`, whose first byte is address 0."""
        for line in self.lines:
            memory[line.address : line.address + len(line.code)] = line.code


def parse_listing(name: str, text: str) -> Listing:
    """Parse a listing.

    Raises
    ------
    ValueError
        A line is none of blank, comment, label, row; or two rows overlap. Names the line's number.
    """
    lines: list[Line] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []  # labels whose address the next row tells
    bits = 16
    for number, raw in enumerate(text.splitlines(), 1):
        if not raw.strip() or raw.startswith(";"):
            continue
        if label := _LABEL.match(raw):
            waiting.append(label["name"])
            continue
        if mode := _BITS.match(raw):
            bits = int(mode["bits"])
            continue
        row = _ROW.match(raw)
        if row is None:
            raise ValueError(f"{name}.lst:{number}: not a row of a listing: {raw!r}")
        line = Line(int(row["address"], 16), bytes.fromhex(row["code"]), row["text"], row["comment"] or "", bits)
        labels.update(dict.fromkeys(waiting, line.address))
        waiting.clear()
        lines.append(line)
    _refuse_overlap(name, lines)
    return Listing(name, tuple(lines), labels)


def _refuse_overlap(name: str, lines: list[Line]) -> None:
    ordered = sorted(lines, key=lambda line: line.address)
    for before, after in pairwise(ordered):
        if before.address + len(before.code) > after.address:
            raise ValueError(f"{name}.lst: {after.address:#x} lies inside the row at {before.address:#x}")


def read_listing(name: str, folder: str = "") -> Listing:
    """Read the bundled listing `listings/FOLDER/NAME.lst`."""
    path = Path(__file__).with_name("listings") / folder / f"{name}.lst"
    return parse_listing(name, path.read_text(encoding="ascii"))
