"""Small files that would become large ones: refused, or read in pieces; memory stays bounded."""

from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from writers.in_memory import InMemory
from writers.perf_data import COMPRESSED, PerfDataWriter
from writers.ring_buffer import event, page, record
from writers.trace_dat import TraceDatWriter

from kvmtrace.errors import FormatError, KvmtraceError
from kvmtrace.formats.arrow import arrow_reading, arrow_writing
from kvmtrace.formats.known_formats import open_recording, recognise

if TYPE_CHECKING:
    from pathlib import Path

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
    "chunks of 1 MB, zlib": lambda: bomb("zlib", chunk=1 << 20, n_chunks=400),
    "chunks of 16 MB, zlib": lambda: bomb("zlib", chunk=16 << 20, n_chunks=25),
    "perf.data": perf_bomb,
}


TEXT_BYTES, ROWS = 30_000, 10_000  # of the text in every row


def _rows_of(schema: pa.Schema, table: pa.Table, text: str) -> pa.Table:
    """Return ROWS rows like a table's, with `text` for every text."""
    columns = []
    for field in schema:
        known = next((value for value in table.column(field.name).to_pylist() if value is not None), None)
        value = text if pa.types.is_string(field.type) else known
        if field.name in {"row", "ts_ns"}:
            columns.append(pa.array(range(ROWS), field.type))
        elif pa.types.is_dictionary(field.type):
            codes = pa.array([0] * ROWS, field.type.index_type)
            columns.append(pa.DictionaryArray.from_arrays(codes, pa.array([known], field.type.value_type)))
        else:
            columns.append(pa.array([value] * ROWS, field.type))
    return pa.table(columns, schema=schema)


def small_export(path: Path, form: str) -> pa.Table:
    """Export an exec of a program, and return the table."""
    execs = record(event(13, struct.pack("<I", 16 | 8 << 16) + b"\x02abc" + b"/bin/sh\0"), 9)
    recording = recognise(InMemory(TraceDatWriter([page(900, [execs])]).v6()))
    with path.open("wb") as out:
        (arrow_writing.write_parquet if form == "parquet" else arrow_writing.write_arrow)(recording, out)
    return pq.read_table(path) if form == "parquet" else pa.ipc.open_file(path).read_all()


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("compression", ["zstd", "brotli", "gzip", "snappy", "lz4"])
def test_texts_of_a_parquet_file(compression: str, coded: bool, tmp_path: Path) -> None:
    """300 MB of text in some KB: dictionaries hold it once, packed pages almost not at all."""
    table = small_export(tmp_path / "small.parquet", "parquet")
    path = tmp_path / "large.parquet"
    rows = _rows_of(table.schema, table, "x" * TEXT_BYTES)
    pq.write_table(rows, path, compression=compression, use_dictionary=coded, row_group_size=ROWS)
    assert path.stat().st_size < 20 << 20
    out = tmp_path / "out.csv"
    code, mb, errors = peak_mb([sys.executable, "-m", "kvmtrace", "export", str(path), "-o", str(out)])
    assert (code, errors.count("\n")) == (3, 1), errors
    assert mb < LIMIT_MB, mb


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_texts_of_an_arrow_file(compression: str, tmp_path: Path) -> None:
    table = small_export(tmp_path / "small.arrow", "arrow")
    path = tmp_path / "large.arrow"
    rows = _rows_of(table.schema, table, "x" * TEXT_BYTES)
    with pa.ipc.new_file(path, rows.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(rows)
    assert path.stat().st_size < 4 << 20
    code, mb, errors = peak_mb([sys.executable, "-m", "kvmtrace", "export", str(path), "-o", str(tmp_path / "out.csv")])
    assert (code, errors.count("\n")) == (3, 1), errors
    assert mb < LIMIT_MB, mb


@pytest.mark.parametrize("at", range(0, 64, 7))
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_damaged_claims_are_damage(form: str, at: int, tmp_path: Path) -> None:
    """Bytes of the headers of pages, and of the footer, set to all ones."""
    small_export(tmp_path / "small", form)
    whole = (tmp_path / "small").read_bytes()
    for place in (at, 4 + at, len(whole) - 12 - at * 5):
        data = bytearray(whole)
        data[place : place + 2] = b"\xff\xff"
        try:
            recording = recognise(InMemory(bytes(data)))
            table = recording.events()
            for kind in table.kinds:
                for name in kind.fields if table.count(kind.name) else ():
                    table.field(kind.name, name)
        except KvmtraceError as error:
            assert error.exit_code in (2, 3)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017


def test_within_a_limit_of_addresses(tmp_path: Path) -> None:
    """A gigabyte of addresses, most of which libraries take, is enough for what takes as much once decompressed."""
    path = tmp_path / "bomb"
    path.write_bytes(bomb("zlib", chunk=1 << 20, n_chunks=500))
    command = ["prlimit", f"--as={1 << 30}", sys.executable, "-m", "kvmtrace", "report", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


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
