"""Reads TAP 14 as its specification says, for tests: version, plan, test points with their YAML."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

_POINT = re.compile(r"(not )?ok (\d+) - ((?:[^#\\]|\\.)*?)(?: # (SKIP|TODO) ?(.*))?")


@dataclass
class Point:
    ok: bool
    number: int
    description: str
    directive: str | None
    reason: str
    said: dict[str, Any]


def read_tap(text: str) -> list[Point]:
    """Return the test points; asserts that the document is well-formed and its plan holds."""
    lines = text.splitlines()
    assert lines[0] == "TAP version 14"
    plan = re.fullmatch(r"1\.\.(\d+)", lines[1])
    assert plan
    points: list[Point] = []
    block: list[str] | None = None
    for line in lines[2:]:
        if block is not None:
            assert line.startswith("  "), line
            if line == "  ...":
                points[-1].said = yaml.safe_load("\n".join(block))
                block = None
            else:
                block.append(line[2:])
        elif line == "  ---":
            block = []
        else:
            found = _POINT.fullmatch(line)
            assert found, line
            description = re.sub(r"\\(.)", r"\1", found[3])
            points.append(Point(not found[1], int(found[2]), description, found[4], found[5] or "", {}))
    assert block is None
    assert [point.number for point in points] == list(range(1, int(plan[1]) + 1))
    return points
