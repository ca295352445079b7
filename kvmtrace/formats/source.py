"""What a path leads to: a file, a device, a pipe or a folder. Its beginning is looked at before the rest is read."""

from __future__ import annotations

import mmap
import os
import stat
import sys
from pathlib import Path
from typing import BinaryIO

from kvmtrace.errors import UsageError
from kvmtrace.scratch import scratch_file

STDIN = "-"
HEAD_BYTES = 64 << 10  # what formats are recognised by
# files up to this size are read: a mapped file that somebody truncates meanwhile kills the process (SIGBUS);
# of pipes and devices more than this goes to a file without a name, which is mapped
READ_LIMIT = 64 << 20
PIECE_BYTES = 1 << 20


class Source:
    """A path whose format is to be found.

    Attributes
    ----------
    path : str, as the user named it; "-" is standard input
    is_folder : bool
    head : bytes, the first HEAD_BYTES of a file; b"" of a folder

    Raises
    ------
    UsageError
        There is no such file, or it may not be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.is_folder = self.path != STDIN and Path(self.path).is_dir()
        self.head = b""
        self._data: memoryview | None = None
        self._file: BinaryIO | None = None
        if not self.is_folder:
            try:
                self._open()
            except OSError as error:
                raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> UsageError:
        return UsageError(f"{self.path}: {error.strerror or error}")

    def _open(self) -> None:
        # unbuffered: a pipe hands over what is there
        self._file = sys.stdin.buffer if self.path == STDIN else Path(self.path).open("rb", buffering=0)  # noqa: SIM115 (close())
        if self._is_regular():
            self.head = os.pread(self._file.fileno(), HEAD_BYTES, 0)
        else:
            self.head = _read(self._file, HEAD_BYTES)

    def _is_regular(self) -> bool:
        try:
            assert self._file is not None
            return self.path != STDIN and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        except (OSError, ValueError):  # standard input that is no file at all
            return False

    def data(self) -> memoryview:
        """Return the whole file: mapped if it is large, read if it is small; of a pipe or device what it gives."""
        if self._data is None:
            assert self._file is not None
            try:
                self._data = self._whole(self._file)
            except OSError as error:
                raise self._unreadable(error) from error
            self.close()
        return self._data

    def _whole(self, file: BinaryIO) -> memoryview:
        if not self._is_regular():
            return self._drain(file)
        if os.fstat(file.fileno()).st_size <= READ_LIMIT:
            return memoryview(file.read())
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def _drain(self, file: BinaryIO) -> memoryview:
        """Return all that a pipe or device gives; what is large goes to a file, half of the free room at most."""
        pieces, size = [self.head], len(self.head)
        while size <= READ_LIMIT:
            piece = file.read(PIECE_BYTES)
            if not piece:
                return memoryview(b"".join(pieces))
            pieces.append(piece)
            size += len(piece)
        import shutil
        import tempfile

        with scratch_file() as copy:
            limit = shutil.disk_usage(tempfile.gettempdir()).free // 2
            copy.writelines(pieces)
            pieces.clear()
            while piece := file.read(PIECE_BYTES):
                size += len(piece)
                if size > limit:
                    raise UsageError(f"{self.path}: does not end within {limit} bytes; give the name of a file")
                copy.write(piece)
            copy.flush()
            return memoryview(mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ))

    def close(self) -> None:
        """Let go of the file; what data() returned stays."""
        if self._file is not None and self.path != STDIN:
            self._file.close()
        self._file = None


def _read(file: BinaryIO, size: int) -> bytes:
    """Return the next `size` bytes of a pipe, fewer only at its end."""
    pieces: list[bytes] = []
    while size and (piece := file.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
