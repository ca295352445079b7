"""Capture metadata of a file (docs/capture-metadata.md): what has not the documented type is dropped.

Readers may then rely on the types; a member that was dropped counts as absent.
"""

from __future__ import annotations

import math
from typing import Any

INT_LIMIT = 1 << 63
TID_LIMIT = 1 << 31
MAX_DEPTH = 20
MAX_VMS = 4096
MAX_TRIGGERS = 100
PRINTED_NAMES = "exit_reason_names"  # of the metadata that an export of a text carries


class _AbsentError(Exception):
    """A value has another shape than documented."""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _AbsentError
    return value.encode("utf-8", "replace").decode()  # JSON may hold halves of surrogate pairs


def _int(value: Any) -> int:
    if type(value) is not int or not -INT_LIMIT <= value < INT_LIMIT:
        raise _AbsentError
    return value


def _number(value: Any) -> int | float:
    if type(value) is float and math.isfinite(value) and abs(value) < INT_LIMIT:
        return value
    return _int(value)


def _decimal(key: str) -> str:
    if not (key.isascii() and key.isdigit() and int(key[:11]) < TID_LIMIT and len(key) <= 10):
        raise _AbsentError
    return key


def _thread(value: Any) -> list[Any]:
    """Check [pid or -1, comm]."""
    if not isinstance(value, list) or len(value) != 2 or not -1 <= _int(value[0]) < TID_LIMIT:
        raise _AbsentError
    return [value[0], _text(value[1])]


def _tid(value: Any) -> int:
    if not 0 <= _int(value) < TID_LIMIT:
        raise _AbsentError
    return int(value)


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _AbsentError
    return value


def _filters(value: Any) -> Any:
    """Check an object or list; both are shown, and their names looked at."""
    return _texts(value) if isinstance(value, list) else _object(value)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise _AbsentError
    return [_text(item) for item in value if isinstance(item, str)]


def _vm(value: Any) -> dict[str, Any]:
    """Check a row of `vms`; the process is needed, of the rest what is right is kept."""
    row: dict[str, Any] = _checked(value, _VM)
    if "pid" not in row:
        raise _AbsentError
    return {name: row.get(name) for name in _VM}


def _trigger(value: Any) -> dict[str, Any]:
    """Check a row of `triggers`; of what is wrong nothing is known."""
    row: dict[str, Any] = _checked(value, _TRIGGER)
    return {name: row.get(name) for name in _TRIGGER}


def _triggers(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _AbsentError
    return [_trigger(item) for item in value[:MAX_TRIGGERS] if isinstance(item, dict)]


def _vms(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise _AbsentError
    found = []
    for item in value[:MAX_VMS]:
        try:
            found.append(_vm(item))
        except _AbsentError:
            continue
    return found


class _By:
    """An object whose keys are decimal numbers, or (not `decimal`) names."""

    def __init__(self, shape: Any, *, decimal: bool = True) -> None:
        self.shape = shape
        self.decimal = decimal

    def __call__(self, value: Any) -> dict[str, Any]:
        """Keep the members that are right."""
        out = {}
        for key, item in _object(value).items():
            try:
                out[_decimal(key) if self.decimal else key] = _checked(item, self.shape)
            except _AbsentError:
                continue
        return out


# fmt: off
_VM: dict[str, Any] = {
    "pid": _tid,
    **dict.fromkeys(("kind", "comm", "name", "uuid", "name_from", "unit", "pod", "container", "namespace"), _text),
    "debugfs": _texts,
    "vcpus": _By(_int),
}
_TRIGGER: dict[str, Any] = {
    **dict.fromkeys(("kind", "trigger", "vm", "reason", "detail"), _text),
    **dict.fromkeys(("ts_ns", "began_ns", "dur_ns", "vcpu_id"), _int),
    **dict.fromkeys(("pid", "tid"), _tid),
    "value": _number,
}
# fmt: on
_LOSS = {"by_cpu": _By(_int), "events": _int}
SHAPES: dict[str, Any] = {
    **dict.fromkeys(
        (
            "schema",
            "kvmtrace",
            "host",
            "kernel",
            "cpu_model",
            "backend",
            "clock",
            "event_set",
            "started",
            "ended_by",
            "isa",
        ),
        _text,
    ),
    **dict.fromkeys(("command", "events", "missing_events", "notes", PRINTED_NAMES), _texts),
    **dict.fromkeys(("n_events", "buffer_bytes", "target_status", "complete_from_ns", "complete_until_ns"), _int),
    **dict.fromkeys(("duration_ns", "cost_ns_per_event", "recorder_cpu_ns"), _number),
    "target": {"kind": _text, "guest": _text},
    "guest_run": {
        "guest": _text,
        "isa": _text,
        "arguments": _By(_int, decimal=False),
        "vcpu_tids": _By(_tid),
        "pid": _int,
        "ended": _text,
    },
    "loss": _LOSS,
    "discarded": _LOSS,
    "threads": _By(_thread),
    "vms": _vms,
    "triggers": _triggers,
    "filters": _filters,
    "qmp": _object,
}


def _checked(value: Any, shape: Any) -> Any:
    if not isinstance(shape, dict):
        return shape(value)
    out = dict(_object(value))
    for name, inner in shape.items():
        if name in out:
            try:
                out[name] = None if out[name] is None else _checked(out[name], inner)
            except _AbsentError:
                del out[name]
    return out


def clean_meta(meta: Any) -> dict[str, Any]:
    """Return the metadata without the members whose values are not as documented; {} for anything but an object."""
    cleaned: dict[str, Any] = _checked(meta, SHAPES) if isinstance(meta, dict) else {}
    return {key: _plain(value) for key, value in cleaned.items()}


def _plain(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Return a value that can be written as JSON: numbers that are none, and what is nested too deeply, are null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if not isinstance(value, (dict, list)):
        return value
    if not depth:
        return None
    if isinstance(value, list):
        return [_plain(item, depth - 1) for item in value]
    return {key: _plain(item, depth - 1) for key, item in value.items()}
