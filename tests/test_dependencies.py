"""Dependencies: every one has a lower bound, none an upper one without a reason, and CI's set satisfies them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(r for extra in PROJECT["optional-dependencies"].values() for r in extra if "kvmtrace[" not in r),
]
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
OLDEST = ROOT / ".ci" / "oldest.txt"  # make test-oldest


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned(path: Path = CONSTRAINTS) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    assert all(len(pair) == 2 for pair in pairs), lines
    return {normal(name): version for name, version in pairs}


def numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version)]


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_lower_bound_only_and_within_what_ci_installs(requirement):
    match = re.fullmatch(r"([A-Za-z0-9_-]+)(?:\[\w+\])?>=([0-9.]+)", requirement)
    assert match, "NAME>=VERSION: a lower bound, and no upper one"
    assert numbers(pinned()[normal(match[1])]) >= numbers(match[2])
    assert pinned(OLDEST)[normal(match[1])] == match[2]  # the bound is a version that was tested


def test_constraints_are_names_and_versions_alone():
    text = CONSTRAINTS.read_text()
    assert not re.search(r"://|@|--|file:|^-", text, re.MULTILINE)
    assert normal("bcc") not in pinned()  # that name is another project's on PyPI
