"""The document as JSON: it round-trips, it is what its schema says, and the schema is what its types say."""

from __future__ import annotations

import copy
import dataclasses
import json
import typing
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from click.testing import CliRunner

from kvmtrace.cli.report import command
from kvmtrace.errors import FormatError
from kvmtrace.formats import open_recording
from kvmtrace.report.build import ReportOptions, build_report
from kvmtrace.report.document import CaptureInfo, LossInfo, Report
from kvmtrace.report.json_document import dump, from_json, members, to_json
from kvmtrace.report.json_schema import shipped_schema, write

if TYPE_CHECKING:
    from collections.abc import Iterator

FIXTURES = Path(__file__).parents[2] / "fixtures"
PATHS = sorted(FIXTURES.glob("*.dat"))
CAPTURE = CaptureInfo("x", "f", None, None, None, None, None, None, (), 0, None, None, None)
EMPTY = Report(CAPTURE, LossInfo(0, {}, False, 0))


@cache
def strict() -> jsonschema.Draft202012Validator:
    """Return the shipped schema, but without members that it does not name."""
    schema = copy.deepcopy(json.loads(shipped_schema()))
    for described in (schema, *schema["$defs"].values()):
        described["additionalProperties"] = False
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_fixtures_report_round_trips_and_is_as_the_schema_says(path: Path) -> None:
    report = build_report(open_recording(str(path)))
    text = to_json(report)
    assert from_json(text) == report
    value = json.loads(text)
    if value["replay"]:  # a few of thousands of equal steps are enough
        for vcpu in value["replay"]["vcpus"]:
            vcpu["steps"] = vcpu["steps"][:300]
    errors = [f"{error.json_path}: {error.message}" for error in strict().iter_errors(value)]
    assert errors[:5] == []


def test_a_timeline_round_trips() -> None:
    report = build_report(open_recording(str(FIXTURES / "vmx-6.1-smp.dat")), ReportOptions(timeline=True))
    assert report.timeline is not None
    assert from_json(to_json(report)) == report


def test_the_shipped_schema_is_the_one_of_the_types() -> None:
    assert shipped_schema() == write(), "python -m kvmtrace.report.json_schema > kvmtrace/report/report.schema.json"


def test_the_schema_is_printed_without_a_file() -> None:
    done = CliRunner().invoke(command, ["--schema"])
    assert (done.exit_code, done.output) == (0, shipped_schema())


def leaves(kind: Any, seen: set[type]) -> Iterator[tuple[str, Any]]:
    """Yield (class.member, type) of all that a class holds."""
    if kind in seen:
        return
    seen.add(kind)
    for name, _, hint in members(kind):
        waiting = [hint]
        while waiting:
            one = waiting.pop()
            waiting += typing.get_args(one) if typing.get_origin(one) is not typing.Literal else ()
            if dataclasses.is_dataclass(one) and isinstance(one, type):
                yield from leaves(one, seen)
            else:
                yield f"{kind.__name__}.{name}", one


def test_every_leaf_is_typed() -> None:
    assert [name for name, kind in leaves(Report, set()) if kind in {Any, object}] == []


def test_what_check_prints_is_read_back() -> None:
    assert from_json(to_json(EMPTY, only=("capture", "loss", "model"))) == EMPTY
    assert strict().is_valid(dump(EMPTY))


def test_members_of_newer_versions_are_passed_over() -> None:
    assert from_json(json.dumps({**dump(EMPTY), "later": {"a": 1}})) == EMPTY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exits": 5}, "expected a list at exits, found 5"),
        ({"capture": {"path": "x"}}, "expected an object with format, host"),
        ({"loss": {**dump(EMPTY.loss), "events": "none"}}, 'expected an integer at loss.events, found "none"'),
        ({"schema": "kvmtrace.report/9"}, "expected 'kvmtrace.report/1' at schema"),
    ],
)
def test_what_is_no_report_is_told_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as caught:
        from_json(json.dumps({**dump(EMPTY), **change}), "r.json")
    assert message in str(caught.value)
    assert str(caught.value).startswith("r.json: ")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "5"])
def test_what_is_no_json_is_told_in_one_line(text: str) -> None:
    with pytest.raises(FormatError):
        from_json(text)
