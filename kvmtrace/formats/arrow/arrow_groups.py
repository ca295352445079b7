"""What is written about a Parquet file's row groups for its reader here: how many rows, which window, what is constant.

It stands between the rows and the footer, where no other reader looks, and is gone when other tools write the file
again, with other row groups or values: JSON, its length and CRC-32 (u32, little endian), and MAGIC. The footer's own
statistics say the same of a good file, but pyarrow ends the process over those of some damaged ones.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from kvmtrace.formats.arrow.arrow_schema import stored_as
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.table.event_table import COMMON_DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from kvmtrace.table.event_table import EventTable

MAGIC = b"KVMTRACE-GROUPS\n"
_LENGTHS = struct.Struct("<II")
_FOOTER_END = 8  # bytes: the footer's length and Parquet's own magic


@dataclass(frozen=True)
class RowGroup:
    """A row group.

    Parameters
    ----------
    rows : int
    window : int, number of the window that it belongs to
    same : column of the file -> the number (of `event`: the name) that stands in all rows
    """

    rows: int
    window: int
    same: Mapping[str, int | str]


def describe_group(table: EventTable, window: int) -> RowGroup:
    """Return what is written about a row group that holds the rows of a table."""
    same: dict[str, int | str] = {}
    for name in COMMON_DTYPES:
        value = _only_value(getattr(table, name)) if name != "ts_ns" else None
        if value is not None:
            same[stored_as(name)] = table.kinds[value].name if name == "kind" else value
    if "event" in same:
        event = str(same["event"])
        for name, dtype in table.kinds[table.kind_index[event]].fields.items():
            value = _only_value(table.field(event, name)) if is_number(dtype) else None
            if value is not None:
                same[f"{event}.{name}"] = value
    return RowGroup(len(table), window, same)


def is_number(dtype: np.dtype[Any]) -> bool:
    """Say whether a field holds one integer or boolean."""
    return dtype.kind in "iub" and not dtype.shape


def _only_value(values: NDArray[Any]) -> int | None:
    return int(values[0]) if len(values) and bool((values == values[0]).all()) else None


def pack_groups(groups: Iterable[RowGroup]) -> bytes:
    """Return the bytes that stand before a file's footer."""
    text = json.dumps([asdict(group) for group in groups], separators=(",", ":")).encode()
    return text + _LENGTHS.pack(len(text), zlib.crc32(text)) + MAGIC


def unpack_groups(data: memoryview) -> list[RowGroup] | None:
    """Return what is written about the row groups of a Parquet file, None where nothing is.

    Raises
    ------
    ValueError, KeyError, TypeError, OverflowError
        It is damaged.
    """
    if len(data) < _FOOTER_END:
        return None
    end = len(data) - _FOOTER_END - int.from_bytes(data[-8:-4], "little")
    at = end - len(MAGIC)
    if at < _LENGTHS.size or data[at:end] != MAGIC:
        return None
    length, checksum = _LENGTHS.unpack(data[at - _LENGTHS.size : at])
    text = data[max(at - _LENGTHS.size - length, 0) : at - _LENGTHS.size]
    if zlib.crc32(text) != checksum:
        raise ValueError("damaged notes on row groups")
    return [RowGroup(int(told["rows"]), int(told["window"]), dict(told["same"])) for told in json.loads(bytes(text))]


def value_of(told: int | str | None, dtype: np.dtype[Any], lowest: int | None = None) -> int | None:
    """Return a number that a column of this dtype can hold, at least `lowest`; None for all else."""
    if type(told) is not int:
        return None
    if dtype.kind == "b":
        return told if told in (0, 1) else None
    limits = np.iinfo(dtype)
    return told if (limits.min if lowest is None else lowest) <= told <= limits.max else None
