"""Guests of one's own: a listing in a file, run like a bundled guest (`kvmtrace record --guest FILE.lst`).

The form is that of `listings/`; docs/guest-listings.md documents it. Nothing is known of the guest's counts beforehand.
"""

from __future__ import annotations

import re
from pathlib import Path

from kvmtrace.errors import FormatError, UsageError
from kvmtrace.workload.guests import RAM_BYTES, Guest
from kvmtrace.workload.listing import parse_listing
from kvmtrace.workload.result import KnownCounts

SUFFIX = ".lst"
MAX_BYTES = 1 << 20
_OPTION = re.compile(r"^;!\s*(\S+)\s*$", re.MULTILINE)
OPTIONS = ("irqchip",)


def is_guest_file(name: str) -> bool:
    """Say whether a guest's name is that of a file."""
    return name.endswith(SUFFIX)


def read_guest(name: str) -> Guest:
    """Read a guest from a file.

    Raises
    ------
    UsageError
        There is no such file, or it asks for something unknown.
    FormatError
        It is no listing, has no label `start`, or code beyond the guest's memory.
    """
    path = Path(name)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"guest {name}: {error.strerror}") from error
    text = _decoded(name, data)
    try:
        listing = parse_listing(path.stem, text)
    except ValueError as error:
        raise FormatError(name, None, "a guest's listing", str(error)) from None
    if "start" not in listing.labels:
        raise FormatError(name, None, "a label start, where the guest begins", "none")
    end = max((line.address + len(line.code) for line in listing.lines), default=0)
    if end > RAM_BYTES:
        raise FormatError(name, None, f"code below {RAM_BYTES:#x}, the end of the guest's memory", f"{end:#x}")
    options = _options(name, text)
    summary = next((line.removeprefix(";").strip() for line in text.splitlines() if line.startswith("; ")), name)
    guest = Guest(name, summary, (), lambda _: KnownCounts(), irqchip="irqchip" in options)
    guest.__dict__["listing"] = listing  # what the cached property would read from the bundled ones
    return guest


def _decoded(name: str, data: bytes) -> str:
    if len(data) > MAX_BYTES:
        raise FormatError(name, MAX_BYTES, f"at most {MAX_BYTES} bytes", "more")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as error:
        raise FormatError(name, error.start, "ASCII", f"byte {data[error.start]:#04x}") from None


def _options(name: str, text: str) -> set[str]:
    """Return what the lines `;! OPTION` ask for."""
    given = set(_OPTION.findall(text))
    unknown = given - set(OPTIONS)
    if unknown:
        raise UsageError(f"guest {name}: there is no option {min(unknown)}; there is {', '.join(OPTIONS)}")
    return given
