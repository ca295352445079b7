"""trace.dat, versions 6 and 7: layout, ring-buffer pages, rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvmtrace.formats.known_formats import Format

if TYPE_CHECKING:
    from kvmtrace.formats.source import Source
    from kvmtrace.table.recording import Recording

MAGIC = b"\x17\x08\x44tracing"


def _open(source: Source) -> Recording:
    from kvmtrace.formats.trace_dat.trace_dat_layout import read_trace_dat

    trace = read_trace_dat(source.data(), source.path)
    if trace.text is not None and not trace.buffers:  # of a latency tracer
        from kvmtrace.formats.ftrace_text.text_recording import TextRecording

        return TextRecording(memoryview(trace.text), source.path, "trace.dat")
    from kvmtrace.formats.common.old_layouts import with_settled_layout
    from kvmtrace.formats.trace_dat.trace_dat_recording import TraceDatRecording

    return with_settled_layout(lambda formats: TraceDatRecording(replace(trace, formats=formats)), trace.formats)


FORMAT = Format("trace.dat", lambda source: source.head.startswith(MAGIC), _open)
