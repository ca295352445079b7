"""Which selftests run in which lab, with which arguments, and which do not, by name and with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from selftests.build import build_selftests


@dataclass(frozen=True)
class Planned:
    """A test to run."""

    name: str
    arguments: tuple[str, ...] = ()


def plan_for(isa: str, kernel: str) -> list[Planned]:
    """Return the tests of a lab host, in the Makefile's order."""
    return [Planned(name) for name in build_selftests(kernel).built]
