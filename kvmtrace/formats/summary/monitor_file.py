"""The file of `kvmtrace record --monitor`: one JSON object, "kvmtrace.monitor/1", read without trust.

capture/bpf/monitor_recorder.py documents its members.
"""

from __future__ import annotations

import json
from typing import Any

from kvmtrace.errors import FormatError
from kvmtrace.formats.common.cursor import describe_bytes
from kvmtrace.formats.common.metadata import clean_meta
from kvmtrace.lazy_dataclass import dataclass

SCHEMA = "kvmtrace.monitor/1"
MAX_ROWS = 1 << 16


@dataclass(frozen=True)
class MonitoredTransition:
    """How often threads took a step, and whether the model allows it."""

    from_state: str
    event: str
    to_state: str
    count: int
    allowed: bool


@dataclass(frozen=True)
class ForbiddenTransition:
    """A step that the model does not allow, with the (state, step, ts_ns) before and at it."""

    tid: int
    pid: int
    ts_ns: int
    state: str
    step: str
    last: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Monitored:
    """What a monitor saw."""

    meta: dict[str, Any]
    threads: int
    transitions: tuple[MonitoredTransition, ...]
    n_forbidden: int
    forbidden: tuple[ForbiddenTransition, ...]


def read_monitored(data: bytes, path: str) -> Monitored:
    """Read a file's bytes.

    Raises
    ------
    FormatError
        They are no such object.
    """
    try:
        value = json.loads(data)
        if not isinstance(value, dict) or value.get("schema") != SCHEMA:
            raise FormatError(path, 0, SCHEMA, describe_bytes(data[:32]))
        return Monitored(
            clean_meta(value["meta"]),
            _number(value["threads"]),
            tuple(_transition(row) for row in _rows(value["transitions"])),
            _number(value["n_forbidden"]),
            tuple(_forbidden(row) for row in _rows(value["forbidden"])),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(path, None, f"a complete {SCHEMA}", f"{type(error).__name__}: {error}") from None


def _rows(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or len(value) > MAX_ROWS or not all(isinstance(row, dict) for row in value):
        raise TypeError("no list of objects")
    return value


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise TypeError(f"{value!r:.40} is no count")
    return value


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no name")
    return value


def _transition(row: dict[str, Any]) -> MonitoredTransition:
    names = (_word(row["from"]), _word(row["event"]), _word(row["to"]))
    return MonitoredTransition(*names, _number(row["count"]), row["allowed"] is True)


def _forbidden(row: dict[str, Any]) -> ForbiddenTransition:
    last = tuple((_word(one["state"]), _word(one["step"]), _number(one["ts_ns"])) for one in _rows(row["last"]))
    numbers = (_number(row["tid"]), _number(row["pid"]), _number(row["ts_ns"]))
    return ForbiddenTransition(*numbers, _word(row["state"]), _word(row["step"]), last)
