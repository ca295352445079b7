"""Which tests a suite has: a folder of executables, a list of commands, KVM's selftests, kvm-unit-tests.

    tests = find_tests("x86/unittests.cfg")

A source is recognised by what it is: a folder with a `kselftest-list.txt` is an installed kselftest, any other gives
its executables; a file is a `unittests.cfg`, a kselftest list, an executable, or a command for the shell per line.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.errors import UsageError
from kvmtrace.suite.listed_test import SuiteTest
from kvmtrace.suite.unittests_cfg import is_unittests_cfg, read_unittests_cfg

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

KSELFTEST_LIST = "kselftest-list.txt"
MAX_LIST_BYTES = 4 << 20
_KSELFTEST_LINE = re.compile(r"[\w./-]+:[\w./-]+")
_NOT_TESTS = ("*.so", "*.so.*", "*.sh.inc", ".*", "run_kselftest.sh")


def find_tests(sources: Iterable[str], only: Sequence[str] = (), leave_out: Sequence[str] = ()) -> list[SuiteTest]:
    """Return the tests of all sources, in their order, each with a name of its own.

    Parameters
    ----------
    only, leave_out : patterns of names, as of the shell

    Raises
    ------
    UsageError
        A source is not there or holds no test, or the patterns leave none.
    """
    found = [test for source in sources for test in tests_of(source)]
    chosen = [
        test
        for test in found
        if (not only or _matches(test.name, only)) and not (leave_out and _matches(test.name, leave_out))
    ]
    if found and not chosen:
        raise UsageError(f"no test is left of {len(found)}")
    return unique_names(chosen)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Say whether a name, or its last part, fits one of the patterns."""
    return any(fnmatchcase(part, pattern) for pattern in patterns for part in (name, name.rsplit("/", 1)[-1]))


def unique_names(tests: Iterable[SuiteTest]) -> list[SuiteTest]:
    """Return the tests with a number behind each name that was there before."""
    seen: dict[str, int] = {}
    named = []
    for test in tests:
        seen[test.name] = seen.get(test.name, 0) + 1
        named.append(test if seen[test.name] == 1 else replace(test, name=f"{test.name} ({seen[test.name]})"))
    return named


def tests_of(source: str) -> list[SuiteTest]:
    """Return the tests of one source."""
    path = Path(source)
    if path.is_dir():
        listing = path / KSELFTEST_LIST
        tests = _kselftests(path, listing.read_text()) if listing.is_file() else _executables(path)
    elif path.is_file():
        tests = _tests_of_file(path)
    else:
        raise UsageError(f"{source}: no such file or folder; a command stands behind --")
    if not tests:
        raise UsageError(f"{source} holds no test")
    return tests


def _tests_of_file(path: Path) -> list[SuiteTest]:
    if os.access(path, os.X_OK):
        return [SuiteTest(path.name, (str(path.absolute()),))]
    with path.open("rb") as file:
        data = file.read(MAX_LIST_BYTES)
    if b"\0" in data:
        raise UsageError(f"{path} is neither executable nor a list of tests")
    text = data.decode(errors="replace")
    if is_unittests_cfg(text):
        return read_unittests_cfg(path, text)
    lines = _lines(text)
    if lines and all(_KSELFTEST_LINE.fullmatch(line) for line in lines):
        return _kselftests(path.parent, text)
    return [SuiteTest(line, ("/bin/sh", "-c", line)) for line in lines]


def _lines(text: str) -> list[str]:
    """Return the lines that are neither empty nor comments."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def _kselftests(folder: Path, text: str) -> list[SuiteTest]:
    """Return the tests that an installed kselftest lists, "collection:test", which run in their collection's folder."""
    tests = []
    for line in _lines(text):
        collection, _, name = line.partition(":")
        place = (folder / collection).absolute()
        tests.append(SuiteTest(f"{collection}/{name}", ("env", "-C", str(place), f"./{name}")))
    return tests


def _executables(folder: Path) -> list[SuiteTest]:
    """Return the executables in a folder and below it, hidden ones and libraries left out."""
    tests = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_file() or not os.access(path, os.X_OK):
            continue
        if any(fnmatchcase(part, pattern) for part in inside.parts for pattern in _NOT_TESTS):
            continue
        tests.append(SuiteTest(str(inside), (str(path.absolute()),)))
    return tests
