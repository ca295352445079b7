"""Where a Parquet file's column chunks are, against pyarrow; footers that lie are told."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvmtrace._native.parquet_footer import column_chunks

if TYPE_CHECKING:
    from collections.abc import Mapping


def written(columns: Mapping[str, object], **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, **options)
    return sink.getvalue()


COLUMNS = {"number": list(range(100)), "text": ["a", None] * 50, "list": [[1, 2]] * 100, "flag": [True, False] * 50}
FILES = {
    "usual": written(COLUMNS, row_group_size=30),
    "plain": written(COLUMNS, compression="none", use_dictionary=False, write_statistics=False),
    "one": written({"number": [1]}, compression="gzip"),
    "empty": written({"number": pa.array([], pa.int64())}),
    "many": written({f"column {i}": [i] for i in range(40)}, store_schema=False),
}


def count(data: bytes) -> tuple[int, int]:
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    return metadata.num_row_groups, metadata.num_columns


@pytest.mark.parametrize("name", FILES)
def test_chunks_are_pyarrows(name: str) -> None:
    data = FILES[name]
    found = column_chunks(memoryview(data), *count(data))
    metadata = pq.ParquetFile(io.BytesIO(data)).metadata
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            want = metadata.row_group(group).column(number)
            codec, *told = found[group, number].tolist()
            dictionary = want.dictionary_page_offset if want.has_dictionary_page else -1
            assert told == [want.total_compressed_size, want.data_page_offset, dictionary]
            assert (codec == 0) == (want.compression == "UNCOMPRESSED")


@pytest.mark.parametrize("counts", [(3, 4), (4, 3), (4, 5), (0, 4), (1 << 20, 1 << 20)])
def test_other_counts_than_the_footers_are_refused(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="footer"):
        column_chunks(memoryview(FILES["usual"]), *counts)


def test_damaged_footers_are_refused_or_read() -> None:
    data = np.frombuffer(FILES["usual"], np.uint8)
    n_groups, n_columns = count(FILES["usual"])
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(500):
        damaged = data.copy()
        damaged[-8 - int(rng.integers(1500))] ^= 1 << int(rng.integers(8))
        try:
            assert column_chunks(memoryview(damaged.tobytes()), n_groups, n_columns).shape == (n_groups, n_columns, 4)
        except ValueError:
            refused += 1
    assert 0 < refused < 500


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + b"\xff\xff\xff\xffPAR1", b"PAR1\0\0\0\0PAR1"])
def test_files_without_a_footer(data: bytes) -> None:
    with pytest.raises(ValueError, match="no footer"):
        column_chunks(memoryview(data), 1, 1)


@pytest.mark.parametrize("depth", [20, 100_000])
def test_depth_is_bounded(depth: int) -> None:
    """Lists in lists in lists: C's stack is not the file's to use."""
    footer = b"\x59" + b"\x19" * depth  # field 5, a list of one list of one list ...
    with pytest.raises(ValueError, match="contradicts itself"):
        column_chunks(memoryview(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"), 0, 1)
