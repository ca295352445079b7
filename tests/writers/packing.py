"""A kvmtrace trace.dat as version 7, its pages compressed, and back as version 6, by trace-cmd.

Pages, formats and metadata stay the same bytes: reports of both differ in nothing.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from kvmtrace.formats.trace_dat.trace_dat_sections import META_MAGIC


def _trailer(data: bytes) -> bytes:
    """Return our recorder's metadata at the end of a file, which trace-cmd leaves out."""
    if not data.endswith(META_MAGIC):
        return b""
    end = len(data) - len(META_MAGIC)
    return data[end - 8 - int.from_bytes(data[end - 8 : end], "little") :]


def _convert(path: Path, *options: str) -> bytes:
    with TemporaryDirectory() as folder:
        out = Path(folder) / "converted.dat"
        command = ["trace-cmd", "convert", "-i", str(path), "-o", str(out), *options]
        subprocess.run(command, check=True, capture_output=True)
        return out.read_bytes() + _trailer(path.read_bytes())


def packed(path: Path) -> bytes:
    """Return the recording as trace.dat version 7, compressed with zstd."""
    return _convert(path, "--file-version", "7", "--compression", "zstd")


def unpacked(path: Path) -> bytes:
    """Return the recording as trace.dat version 6, whose pages can be cut and flipped."""
    data = path.read_bytes()
    return data if data[10:11] == b"6" else _convert(path, "--file-version", "6", "--compression", "none")
