"""perf.data in file mode: layout, records, rows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kvmtrace.formats.known_formats import Format

if TYPE_CHECKING:
    from kvmtrace.formats.source import Source
    from kvmtrace.table.recording import Recording

MAGIC = b"PERFILE2"


def _open(source: Source) -> Recording:
    from kvmtrace.formats.common.old_layouts import with_settled_layout
    from kvmtrace.formats.perf_data.perf_layout import read_perf_data
    from kvmtrace.formats.perf_data.perf_recording import PerfDataRecording

    perf = read_perf_data(source.data(), source.path)
    return with_settled_layout(lambda formats: PerfDataRecording(replace(perf, formats=formats)), perf.formats)


FORMAT = Format("perf.data", lambda source: source.head[:8] in (MAGIC, MAGIC[::-1]), _open)
