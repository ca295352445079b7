"""The formats that kvmtrace reads: the list, and opening what a path leads to. Recognised by content, never by name.

A new format is a folder with a FORMAT in its `__init__.py` and one line in FORMATS.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from kvmtrace.errors import FormatError, UsageError
from kvmtrace.formats.source import Source
from kvmtrace.isa.foreign import foreign_architecture
from kvmtrace.isa.registry import NAMES
from kvmtrace.isa.registry import recognise as recognise_isa
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvmtrace.table.recording import Recording

# folders beside this file, asked in this order; text last, as little tells it from anything else
FORMATS = (
    "arrow",
    "trace_dat",
    "bpf",
    "perf_data",
    "ftrace_text",
)


@dataclass(frozen=True)
class Format:
    """One format of recordings. Its folder's `__init__.py` imports nothing before `open` is called.

    Parameters
    ----------
    title : str, as messages name it; "" where others' title covers it
    sniff : says from a Source's head (of a folder: its path) whether it is this format; reads nothing more
    open : Source -> Recording; raises FormatError where it is damaged beyond what can be read
    """

    title: str
    sniff: Callable[[Source], bool]
    open: Callable[[Source], Recording]


def known_formats() -> Iterator[Format]:
    """Yield the formats in the order in which they are asked."""
    for name in FORMATS:
        found: Format = importlib.import_module(f"kvmtrace.formats.{name}").FORMAT
        yield found


def open_recording(path: str | Path, *, any_architecture: bool = False) -> Recording:
    """Open a recording of any supported format.

    Parameters
    ----------
    path : str or Path; "-" is standard input
    any_architecture : also one whose KVM events are of an architecture that no Isa describes

    Raises
    ------
    FormatError
        It is no trace, is damaged before its first event, or is of another architecture.
    UsageError
        There is no such file, or it may not be read.
    """
    recording = recognise(Source(path))
    if not any_architecture:
        _refuse_foreign(recording, str(path))
    return recording


def _refuse_foreign(recording: Recording, path: str) -> None:
    fields = {kind.name: kind.fields for kind in recording.kinds}
    exit_fields = fields.get("kvm_exit", {})
    if recognise_isa(exit_fields) is not None:
        return
    name = foreign_architecture(fields, exit_fields, recording.samples)
    if name is not None:
        found = f"those of {name}; kvmtrace export writes them as they are"
        raise FormatError(path, None, f"KVM events of {' or '.join(NAMES)}", found)


def is_recording(path: str | Path) -> bool:
    """Say whether a file is a recording of a supported format, from its head."""
    source = Source(path)
    try:
        return any(known.sniff(source) for known in known_formats())
    finally:
        source.close()


def recognise(source: Source) -> Recording:
    """Open what a source leads to, see open_recording."""
    try:
        for known in known_formats():
            if known.sniff(source):
                return known.open(source)
    finally:
        source.close()
    if source.is_folder:
        raise UsageError(f"{source.path}: is a folder, and no recording")
    from kvmtrace.formats.unrecognised import describe_unrecognised

    titles = [known.title for known in known_formats() if known.title]
    expected = f"{', '.join(titles[:-1])} or {titles[-1]}"
    raise FormatError(source.path, 0, expected, describe_unrecognised(source.head))
