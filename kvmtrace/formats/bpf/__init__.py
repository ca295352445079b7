"""The eBPF back end's capture file: layout and reading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmtrace.formats.known_formats import Format

if TYPE_CHECKING:
    from kvmtrace.formats.source import Source
    from kvmtrace.table.recording import Recording

MAGIC = b"KVMTRACE-BPF-1\n\0"


def _open(source: Source) -> Recording:
    from kvmtrace.formats.bpf.bpf_layout import read_bpf_capture
    from kvmtrace.formats.bpf.bpf_recording import BpfRecording

    return BpfRecording(read_bpf_capture(source.data(), source.path))


FORMAT = Format("a kvmtrace recording", lambda source: source.head.startswith(MAGIC), _open)
