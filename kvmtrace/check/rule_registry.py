"""All rules: one module each in check/rules, and those that other packages register as `kvmtrace.rules`.

A package names its rules in its metadata; each entry point is a Rule:

    [project.entry-points."kvmtrace.rules"]
    mine = "my_package.rules:RULE"

A rule that cannot be loaded is left out and named in one line; it never ends a check.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import kvmtrace.check.rules as package
from kvmtrace.check.rule import SUSPICION, VIOLATION, Rule
from kvmtrace.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUP = "kvmtrace.rules"
# contract, event injection, interrupts on their way, nested guests, the recording against itself, heuristics
_SERIES = "VJINSH"


class Registry(NamedTuple):
    """The rules by id, in their order, and a line for each that could not be loaded."""

    rules: dict[str, Rule]
    errors: tuple[str, ...]


def _own() -> Iterator[Rule]:
    for module in pkgutil.iter_modules(package.__path__):
        yield importlib.import_module(f"{package.__name__}.{module.name}").RULE


def _order(rule: Rule) -> tuple[int, int]:
    series, number = re.fullmatch(rf"([{_SERIES}])(\d+)", rule.id).groups()  # type: ignore[union-attr]
    return _SERIES.index(series), int(number)


def _is_asked_for(group: str) -> bool:
    """Say whether any package on the path may register something in this group.

    Reading the metadata of packages properly takes as long as a small recording, and seldom there is anything.
    """
    for folder in map(Path, dict.fromkeys(sys.path)):
        if folder.is_file():
            return True  # packages in an archive: whatever they say
        for found in folder.glob("*.*-info/entry_points.txt"):
            if group in found.read_text(encoding="utf-8", errors="replace"):
                return True
    return False


def _foreign(known: dict[str, Rule], errors: list[str]) -> Iterator[Rule]:
    """Yield the rules of other packages; what is wrong with them is added to `errors`."""
    if not _is_asked_for(GROUP):
        return
    from importlib.metadata import entry_points

    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        where = f"rule {point.name} ({point.value})"
        try:
            rule = point.load()
        except Exception as error:  # noqa: BLE001 (whatever another package's import raises)
            errors.append(f"{where} was not loaded: {type(error).__name__}: {error}")
            continue
        if not isinstance(rule, Rule):
            errors.append(f"{where} was not loaded: it is a {type(rule).__name__}, no kvmtrace.check.rule.Rule")
        elif wrong := _objection(rule, known):
            errors.append(f"{where} was not loaded: {wrong}")
        else:
            yield rule


def _objection(rule: Rule, known: dict[str, Rule]) -> str:
    """Say what speaks against a rule of somebody else's, "" if nothing does."""
    if rule.id in known:
        return f"there is a rule {rule.id} already"
    return "" if rule.severity in (VIOLATION, SUSPICION) else f"its severity is {rule.severity!r}"


@lru_cache(maxsize=1)
def registry() -> Registry:
    """Return all rules: ours in order, then others' by the name of their entry point."""
    rules = {rule.id: rule for rule in sorted(_own(), key=_order)}
    errors: list[str] = []
    for rule in _foreign(rules, errors):
        rules[rule.id] = rule
    return Registry(rules, tuple(errors))


def add_rule(rule: Rule) -> None:
    """Add a rule to this process, as an entry point would; one of ours cannot be replaced.

    Raises
    ------
    UsageError
        There is such a rule, or its severity is unknown.
    """
    rules = registry().rules
    wrong = _objection(rule, {name: known for name, known in rules.items() if is_own(known)})
    if wrong:
        raise UsageError(f"rule {rule.id}: {wrong}")
    rules[rule.id] = rule


def is_own(rule: Rule) -> bool:
    """Say whether a rule is one of ours."""
    return re.fullmatch(rf"[{_SERIES}]\d+", rule.id) is not None and rule in _own_rules()


@lru_cache(maxsize=1)
def _own_rules() -> frozenset[Rule]:
    return frozenset(_own())


def all_rules() -> dict[str, Rule]:
    """Return id -> rule."""
    return registry().rules
