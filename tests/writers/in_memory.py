"""A source of bytes that are in no file."""

from __future__ import annotations

from kvmtrace.formats.source import HEAD_BYTES, Source


class InMemory(Source):
    """Bytes under a name."""

    def __init__(self, data: bytes, path: str = "in memory") -> None:
        self.path, self.is_folder = path, False
        self.head, self._data, self._file = data[:HEAD_BYTES], memoryview(data), None
