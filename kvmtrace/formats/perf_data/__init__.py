"""perf.data in file mode: layout, records, rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.formats.registry import Format

if TYPE_CHECKING:
    from kvmtrace.formats.source import Source
    from kvmtrace.table.recording import Recording

MAGIC = b"PERFILE2"


def _open(source: Source) -> Recording:
    from kvmtrace.formats.perf_data.perf_layout import read_perf_data
    from kvmtrace.formats.perf_data.perf_recording import PerfDataRecording

    return PerfDataRecording(read_perf_data(source.data(), source.path))


FORMAT = Format("perf.data", lambda source: source.head[:8] in (MAGIC, MAGIC[::-1]), _open)
