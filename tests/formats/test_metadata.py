"""Capture metadata are as untrusted as the rest of a file: members of other types than documented are dropped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvmtrace.formats import open_recording
from kvmtrace.formats.common.metadata import clean_meta

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*-smp.dat")), ids=lambda path: path.stem)
def test_what_was_recorded_stays(path):
    data = path.read_bytes()
    size = int.from_bytes(data[-24:-16], "little")
    told = json.loads(data[-24 - size : -24])
    cleaned = clean_meta(told)
    assert {k: v for k, v in cleaned.items() if v is not None} == {k: v for k, v in told.items() if v is not None}
    assert open_recording(path).capture.meta == cleaned


@pytest.mark.parametrize(
    ("meta", "left"),
    [
        (None, {}),
        ([], {}),
        ("x", {}),
        ({"host": 5, "kernel": "k"}, {"kernel": "k"}),
        ({"notes": "x", "events": ["a", 3]}, {"events": ["a"]}),
        ({"cost_ns_per_event": float("inf")}, {}),
        ({"cost_ns_per_event": 10**400}, {}),
        ({"duration_ns": True}, {}),
        ({"threads": {"7": [1, "a"], "²": [1, "b"], "8": [1], "99999999999": [1, "c"]}}, {"threads": {"7": [1, "a"]}}),
        ({"guest_run": {"guest": {}, "vcpu_tids": {"0": 5, "1": "x"}}}, {"guest_run": {"vcpu_tids": {"0": 5}}}),
        ({"guest_run": [1], "target": None}, {"target": None}),
        ({"loss": {"by_cpu": {"0": 1 << 70, "1": 2}}}, {"loss": {"by_cpu": {"1": 2}}}),
        ({"host": "\ud800"}, {"host": "?"}),
        ({"of another version": [1]}, {"of another version": [1]}),
    ],
)
def test_members_of_other_types_are_dropped(meta, left):
    assert clean_meta(meta) == left


def test_what_no_json_can_hold_becomes_null():
    deep = json.loads("[" * 500 + "]" * 500)
    cleaned = clean_meta({"filters": {"a": float("inf"), "b": [1.5, float("nan")], "c": deep}})
    assert cleaned["filters"]["a"] is None
    assert cleaned["filters"]["b"] == [1.5, None]
    assert json.dumps(cleaned, allow_nan=False).count("[") < 50
