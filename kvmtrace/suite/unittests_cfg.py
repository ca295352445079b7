"""The tests of kvm-unit-tests: `unittests.cfg` beside its `run` script.

    [vmexit_cpuid]
    file = vmexit.flat
    smp = 2
    extra_params = -append 'cpuid'
    check = /sys/module/kvm/parameters/x=Y
    groups = vmexit nodefault

Each runs as `run_tests.sh` runs it: `run FILE -smp N PARAMETERS` in the tree's top folder. `run` gives 77 for a test
that it skips, and turns the exit codes of QEMU's isa-debug-exit into 0 for success.

Source: kvm-unit-tests, scripts/common.bash (for_each_unittest), scripts/runtime.bash (run), docs/unittests.txt
"""

from __future__ import annotations

import platform
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.errors import UsageError
from kvmtrace.suite.listed_test import SuiteTest

if TYPE_CHECKING:
    from collections.abc import Iterator

_SECTION = re.compile(r"\[([^\]]+)\]\s*")
_FILE = re.compile(r"^\s*file\s*=", re.MULTILINE)
_NAMES = {"extra_params": "parameters", "qemu_params": "parameters", "test_args": "arguments"}
_QUOTES = '"""'


def is_unittests_cfg(text: str) -> bool:
    """Say whether a text is a list of kvm-unit-tests."""
    return any(_SECTION.fullmatch(line) for line in text.splitlines()) and bool(_FILE.search(text))


def read_unittests_cfg(path: Path, text: str) -> list[SuiteTest]:
    """Return the tests of a `unittests.cfg`.

    Raises
    ------
    UsageError
        It does not lie where kvm-unit-tests has it.
    """
    folder = path.absolute().parent
    if not (folder / "run").is_file():
        raise UsageError(f"{path}: there is no {folder / 'run'}, which kvm-unit-tests run by")
    arch = _arch(folder.parent)
    return [_test(name, values, folder, arch) for name, values in _sections(text)]


def _sections(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the sections with their values; a value within three quotes goes over lines."""
    name, values = "", dict[str, str]()
    lines = iter(text.splitlines())
    for line in lines:
        section = _SECTION.fullmatch(line.strip())
        if section:
            if name and values.get("file"):
                yield name, values
            name, values = section[1], {}
            continue
        key, equals, value = line.partition("=")
        if not equals or line.lstrip().startswith("#"):
            continue
        value = value.strip()
        if value.startswith(_QUOTES):
            value = _long_value(value, lines)
        values[_NAMES.get(key.strip(), key.strip())] = value
    if name and values.get("file"):
        yield name, values


def _long_value(first: str, lines: Iterator[str]) -> str:
    text = first.removeprefix(_QUOTES)
    while _QUOTES not in text:
        more = next(lines, None)
        if more is None:
            break
        text += " " + more
    return text.split(_QUOTES)[0].strip()


def _arch(top: Path) -> str:
    """Return what the tests were built for."""
    config = top / "config.mak"
    found = re.search(r"^ARCH=(\w+)", config.read_text(), re.MULTILINE) if config.is_file() else None
    return found[1] if found else platform.machine()


def _test(name: str, values: dict[str, str], folder: Path, arch: str) -> SuiteTest:
    top = folder.parent
    environment = [f"TESTNAME={name}"] + ([f"ACCEL={values['accel']}"] if values.get("accel") else [])
    words = _words(values.get("parameters", ""))
    if values.get("arguments"):
        words += ["-append", " ".join(_words(values["arguments"]))]
    program = [str(folder / "run"), str(folder / values["file"]), "-smp", values.get("smp", "1"), *words]
    seconds = values.get("timeout", "").removesuffix("s")
    return SuiteTest(
        name,
        ("env", "-C", str(top), *environment, *program),
        timeout_s=float(seconds) if seconds.isdecimal() and int(seconds) else None,
        skip=_why_not(values, folder, arch),
    )


def _words(text: str) -> list[str]:
    """Return what the shell would make of parameters; without a closing quote, the words as they are."""
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def _why_not(values: dict[str, str], folder: Path, arch: str) -> str:
    """Return why a test does not run here, "" if it does."""
    if values.get("arch") and values["arch"] != arch:
        return f"for {values['arch']} only"
    if "nodefault" in values.get("groups", "").split():
        return "its group nodefault is run by hand only"
    if not (folder / values["file"]).exists():
        return f"{values['file']} was not built"
    for demand in values.get("check", "").split():
        name, _, wanted = demand.partition("=")
        try:
            found = Path(name).read_text().strip()
        except OSError:
            return f"there is no {name}"
        if found != wanted:
            return f"{name} is not {wanted}"
    return ""
