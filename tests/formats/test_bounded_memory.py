"""Small files that would become large ones: refused, or read in pieces; memory stays bounded."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib

import pytest
import zstandard
from writers.in_memory import InMemory
from writers.perf_data import COMPRESSED, PerfDataWriter
from writers.trace_dat import TraceDatWriter

from kvmtrace.errors import FormatError
from kvmtrace.formats.arrow import arrow_reading, arrow_writing
from kvmtrace.formats.known_formats import open_recording, recognise

LIMIT_MB = 300  # of the whole process; it takes 80 to 130 to start
LARGE = 128 << 20


def zeros(algorithm: str, size: int) -> bytes:
    """Return `size` zeros, compressed."""
    if algorithm == "zlib":
        stream = zlib.compressobj()
        return b"".join(stream.compress(bytes(1 << 20)) for _ in range(size >> 20)) + stream.flush()
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    return b"".join(stream.compress(bytes(1 << 20)) for _ in range(size >> 20)) + stream.flush()


class Bomb(TraceDatWriter):
    """A version 7 file with a section, or pages, that become large."""

    section: int = -1
    chunk: int = 0
    n_chunks: int = 1

    def _section(self, number: int, data: bytes) -> bytes:
        if number != self.section:
            return super()._section(number, data)
        packed = zeros(self.compression, LARGE)
        return struct.pack("<HHIQII", number, 1, 0, len(packed) + 8, len(packed), LARGE) + packed

    def _chunks(self, pages: bytes) -> bytes:
        if not self.chunk:
            return super()._chunks(pages)
        packed = zeros(self.compression, self.chunk)
        return struct.pack("<I", self.n_chunks) + (struct.pack("<II", len(packed), self.chunk) + packed) * self.n_chunks


def bomb(compression: str, **more: int) -> bytes:
    writer = Bomb([bytes(4096)], compression=compression)
    for name, value in more.items():
        setattr(writer, name, value)
    return writer.v7()


def perf_bomb() -> bytes:
    """A stream of 512 MB."""
    stream = zstandard.ZstdCompressor(level=1).compressobj()
    packed = b"".join(stream.compress(bytes(1 << 20)) for _ in range(512)) + stream.flush()
    writer = PerfDataWriter([], compressed=True)
    records = [packed[i : i + 60_000] for i in range(0, len(packed), 60_000)]
    writer._body = lambda: b"".join(struct.pack("<IHH", COMPRESSED, 0, 8 + len(r)) + r for r in records)
    return writer.bytes()


def test_more_rows_than_a_file_can_hold_are_refused(tmp_path, monkeypatch):
    """A column of one value takes no room: what a file claims is held against its size."""
    path = tmp_path / "file.parquet"
    with path.open("wb") as out:
        arrow_writing.write_parquet(recognise(InMemory(b" v-1 [000] 1.5: kvm_fpu: load\n" * 10)), out)
    assert len(open_recording(path).events()) == 10
    monkeypatch.setattr(arrow_reading, "MIN_ROWS", 5)
    monkeypatch.setattr(arrow_reading, "ROWS_PER_BYTE", 0)
    with pytest.raises(FormatError, match="10 rows in"):
        open_recording(path)


CASES = {
    "formats, zstd": lambda: bomb("zstd", section=18),
    "formats, zlib": lambda: bomb("zlib", section=18),
    "comms, zstd": lambda: bomb("zstd", section=21),
    "a chunk, zstd": lambda: bomb("zstd", chunk=LARGE),
    "chunks, zstd": lambda: bomb("zstd", chunk=16 << 20, n_chunks=60),
    "chunks of 1 MB, zstd": lambda: bomb("zstd", chunk=1 << 20, n_chunks=900),
    "chunks of 1 MB, zlib": lambda: bomb("zlib", chunk=1 << 20, n_chunks=900),
    "chunks of 16 MB, zlib": lambda: bomb("zlib", chunk=16 << 20, n_chunks=55),
    "perf.data": perf_bomb,
}


# between pytest and the command: a child begins with its parent's memory in its account
MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=False)
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def peak_mb(command: list[str]) -> tuple[int, int, str]:
    """Return (exit code, peak memory in MB, standard error) of a command."""
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, check=True)
    code, peak = map(int, done.stdout.split())
    return code, peak, done.stderr


@pytest.mark.parametrize("name", CASES)
def test_memory_is_bounded(name, tmp_path):
    path = tmp_path / "bomb"
    path.write_bytes(CASES[name]())
    assert path.stat().st_size < 3 << 20
    code, mb, errors = peak_mb([sys.executable, "-m", "kvmtrace", "check", str(path)])
    assert (code in (0, 3), errors.count("\n") <= 1) == (True, True), errors
    assert mb < LIMIT_MB, (mb, errors)
