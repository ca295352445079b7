"""Parquet and Arrow files of `kvmtrace export`: writing and reading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.formats.known_formats import Format

if TYPE_CHECKING:
    from kvmtrace.formats.source import Source
    from kvmtrace.table.recording import Recording

MAGICS = (b"PAR1", b"ARROW1")


def _open(source: Source) -> Recording:
    from kvmtrace.formats.arrow.arrow_reading import ArrowRecording

    return ArrowRecording(source.data(), source.path)


FORMAT = Format("Parquet or Arrow", lambda source: source.head.startswith(MAGICS), _open)
