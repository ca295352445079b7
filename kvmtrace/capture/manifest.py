"""What stands in a spool's manifest, checked before it is used: a damaged one stops nobody but itself.

created_ns   int, when the recording began
owner        null or [uid, gid], who gets the file
state        absent (nothing was recorded yet), "recording", "sealed" (ftrace: `places` and `end` say where the
pages go), "complete" (bpf: `out` is readable as it stands)
meta         while "recording": the capture's metadata
discarded    CPU -> events deleted because of --max-size
skips        file -> bytes at its beginning that are left out
publishing   true from when the finished file `out` is about to get the user's name: without `out` it has it
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from kvmtrace.capture.invoking_user import UNCHANGED

if TYPE_CHECKING:
    from collections.abc import Callable

STATES = (None, "recording", "sealed", "complete")


class DamagedSpoolError(ValueError):
    """A spool cannot be finished, now or later."""


def read_manifest(text: bytes) -> dict[str, Any]:
    """Return the manifest; {} if none was written yet.

    Raises
    ------
    DamagedSpoolError
        It is not what a recorder writes.
    """
    if not text.strip():
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedSpoolError("its manifest is damaged") from error
    if not isinstance(values, dict):
        raise DamagedSpoolError("its manifest is damaged")
    for name, is_valid in _CHECKS.items():
        if not is_valid(values):
            raise DamagedSpoolError(f"its manifest is damaged: {name}")
    return values


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_owner(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and len(value) == 2 and all(_is_count(v) and v < UNCHANGED for v in value)
    )


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_count, value.values()))


def _is_meta(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("target"), dict):
        return False
    vms = value.get("vms", [])
    if not isinstance(vms, list) or not all(isinstance(vm, dict) for vm in vms):
        return False
    lists = (value.get("notes"), value.get("events"), value["target"].get("pids"))
    texts = (value.get("clock"), value.get("kvmtrace"))
    return all(isinstance(found, list) for found in lists) and all(isinstance(found, str) for found in texts)


_CHECKS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "state": lambda values: values.get("state") in STATES,
    "created_ns": lambda values: _is_count(values.get("created_ns")),
    "owner": lambda values: _is_owner(values.get("owner")),
    "meta": lambda values: values.get("state") != "recording" or _is_meta(values.get("meta")),
    "places": lambda values: values.get("state") != "sealed" or _is_counts(values.get("places")),
    "end": lambda values: values.get("state") != "sealed" or _is_count(values.get("end")),
    "discarded": lambda values: _is_counts(values.get("discarded", {})),
    "skips": lambda values: _is_counts(values.get("skips", {})),
    "publishing": lambda values: isinstance(values.get("publishing", False), bool),
}
