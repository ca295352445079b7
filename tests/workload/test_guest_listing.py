"""The listings: what the text says is what the bytes do."""

from __future__ import annotations

import pytest
from iced_x86 import Decoder, Formatter, FormatterSyntax

from kvmtrace.workload import GUESTS
from kvmtrace.workload.guests import RAM_BYTES
from kvmtrace.workload.listing import Line, Listing, parse_listing


def formatter() -> Formatter:
    made = Formatter(FormatterSyntax.NASM)
    made.hex_prefix, made.hex_suffix, made.uppercase_hex = "0x", "", False
    made.space_after_operand_separator = True
    made.show_branch_size = made.branch_leading_zeros = made.add_leading_zero_to_hex_numbers = False
    return made


def disassemble(line: Line) -> tuple[str, int]:
    """Return text and length of the first instruction in a row's bytes, as the processor would see it."""
    instruction = Decoder(line.bits, line.code, ip=line.address).decode()
    return formatter().format(instruction), instruction.len


ALL = [guest for named in GUESTS.values() for guest in (named, *named.variants.values())]
INSTRUCTIONS = [
    pytest.param(line, id=f"{guest.listing.name}-{line.address:04x}")
    for guest in ALL
    for line in guest.listing.lines
    if not line.is_data
]


@pytest.mark.parametrize("line", INSTRUCTIONS)
def test_bytes_are_the_instruction_named(line: Line) -> None:
    assert disassemble(line) == (line.text, len(line.code))


@pytest.mark.parametrize("guest", ALL, ids=lambda guest: guest.listing.name)
def test_code_has_no_gaps(guest) -> None:
    """An instruction is followed by one, or it is one that nothing follows."""
    lines = guest.listing.lines
    starts = {line.address for line in lines}
    for line in lines:
        if line.is_data or line.address + len(line.code) in starts:
            continue
        assert line.text in {"out 0xf4, al", "int3", "iret"}, line


@pytest.mark.parametrize("guest", ALL, ids=lambda guest: guest.listing.name)
def test_listing_fits_the_machine(guest) -> None:
    listing = guest.listing
    assert listing.name == (guest.file or guest.name)
    assert all(line.address + len(line.code) <= RAM_BYTES for line in listing.lines)
    memory = bytearray(RAM_BYTES)
    listing.write_to(memory)
    first = next(line for line in listing.lines if line.address == listing.entry)
    assert memory[listing.entry : listing.entry + len(first.code)] == first.code


def test_parse_rows_labels_and_comments() -> None:
    text = """; words

start:
1000  90                nop        ; nothing
1001  f4  hlt

end:
3000  41 42  db "AB"
"""
    listing = parse_listing("x", text)
    assert listing == Listing(
        "x",
        (Line(0x1000, b"\x90", "nop", "nothing"), Line(0x1001, b"\xf4", "hlt", ""), Line(0x3000, b"AB", 'db "AB"', "")),
        {"start": 0x1000, "end": 0x3000},
    )
    assert [line.is_data for line in listing.lines] == [False, False, True]


@pytest.mark.parametrize("bad", ["1000 90 nop", "10  90  nop", "1000  9  nop", "1000  90", "Start:", "zz"])
def test_parse_names_the_bad_line(bad: str) -> None:
    with pytest.raises(ValueError, match=r"x\.lst:2"):
        parse_listing("x", f"; fine\n{bad}\n")


def test_parse_refuses_overlap() -> None:
    with pytest.raises(ValueError, match="0x1001 lies inside the row at 0x1000"):
        parse_listing("x", "1000  90 90  nop\n1001  90  nop\n")
