"""Text of the kernel, of trace-cmd and of perf: lines, patterns, fields."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.formats.known_formats import Format

if TYPE_CHECKING:
    from kvmtrace.formats.source import Source
    from kvmtrace.table.recording import Recording


def _sniff(source: Source) -> bool:
    from kvmtrace.formats.ftrace_text.text_recording import looks_like_text

    return looks_like_text(source.head)


def _open(source: Source) -> Recording:
    from kvmtrace.formats.ftrace_text.text_recording import open_text

    return open_text(source.data(), source.path)


FORMAT = Format("text of ftrace, trace-cmd or perf", _sniff, _open)
