"""The tests of kvm-unit-tests: `unittests.cfg` beside its `run` script.

    [vmexit_cpuid]
    file = vmexit.flat
    smp = 2
    extra_params = -append 'cpuid'
    check = /sys/module/kvm/parameters/x=Y
    groups = vmexit nodefault

Each runs as `run_tests.sh` runs it, by bash in the tree's top folder, which expands what the values hold ($MAX_SMP,
quotes, back ticks): `run FILE -smp N ARGUMENTS PARAMETERS`. A VMM that already gives up without a test, say because
this machine lacks a CPU feature, means that the test is skipped, and so does a true `disabled_if`. `run` gives 77 for a
test that it skips, and turns the exit codes of QEMU's isa-debug-exit into 0 for success.

Source: kvm-unit-tests, scripts/common.bash (for_each_unittest), scripts/runtime.bash (run, premature_failure),
scripts/vmm.bash (vmm_optname), docs/unittests.rst
"""

from __future__ import annotations

import platform
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.errors import UsageError
from kvmtrace.suite.listed_test import SuiteTest

if TYPE_CHECKING:
    from collections.abc import Iterator

_SECTION = re.compile(r"\[([^\]]+)\]\s*")
_FILE = re.compile(r"^\s*file\s*=", re.MULTILINE)
SPARE_S = 60  # `run` ends a test after its own limit; what comes before and after takes some time, too
_QUOTES = '"""'
_ESCAPED_NEWLINE = re.compile(r"(?<!\\)((?:\\\\)*)\\\n")
_SCRIPT = """\
cd {top} || exit 2
: "${{MAX_SMP:=$(getconf _NPROCESSORS_ONLN)}}"
{disabled}{tried}\
exec env {settings} {run} {file} {options}
"""
_TRIED = """\
told=$(env {settings} {run} _NO_FILE_4Uhere_ {options} 2>&1 </dev/null)
if ! grep _NO_FILE_4Uhere_ <<<"$told" | grep -qiE 'could not (load|open)|error loading|failed to load|unable to open'
then
    echo "skipped, the VMM says: $(tail -n 1 <<<"$told")"
    exit 77
fi
"""
_DISABLED = """\
if ( [ ! -f config.mak ] || source ./config.mak; {condition} )
then
    echo skipped, disabled because: {told}
    exit 77
fi
"""


@dataclass(frozen=True)
class _Tree:
    """How a tree was configured.

    Parameters
    ----------
    arch : what the tests were built for
    names : what the values of a test are called that go to the VMM as they are
    smp, arguments : the VMM's options for the number of vCPUs and for the guest's arguments
    always : what is always given to the VMM
    efi : whether the tests are UEFI programs
    """

    arch: str
    names: tuple[str, ...] = ("extra_params", "qemu_params")
    smp: str = "-smp"
    arguments: str = "-append"
    always: str = ""
    efi: bool = False


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
    tree = _tree(folder.parent)
    return [_test(name, values, folder, tree) for name, values in _sections(text)]


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
        values[key.strip()] = value
    if name and values.get("file"):
        yield name, values


def _long_value(first: str, lines: Iterator[str]) -> str:
    """Return what stands within three quotes, as one line."""
    text = first.removeprefix(_QUOTES)
    while _QUOTES not in text:
        more = next(lines, None)
        if more is None:
            break
        text += "\n" + more
    return _ESCAPED_NEWLINE.sub(r"\1", text.split(_QUOTES)[0]).replace("\n", " ").strip()


def _tree(top: Path) -> _Tree:
    """Return how a tree was configured; one without a configuration is this machine's."""
    config = top / "config.mak"
    found = dict(re.findall(r"^(\w+)=(\S*)", config.read_text(), re.MULTILINE)) if config.is_file() else {}
    tree = _Tree(found.get("ARCH", platform.machine()), efi=found.get("CONFIG_EFI") == "y")
    if found.get("TARGET") == "kvmtool":
        always = "--nodefaults --network mode=none --loglevel=warning"
        return replace(tree, names=("kvmtool_params",), smp="--cpus", arguments="--params", always=always)
    return tree


def _test(name: str, values: dict[str, str], folder: Path, tree: _Tree) -> SuiteTest:
    file = folder / values["file"]
    if tree.efi and file.suffix == ".flat":
        file = file.with_suffix(".efi")
    seconds = values.get("timeout", "").removesuffix("s")
    own_limit = float(seconds) if seconds.isdecimal() and int(seconds) else None
    return SuiteTest(
        name,
        ("bash", "-c", _script(name, values, file, tree)),
        timeout_s=None if own_limit is None else own_limit + SPARE_S,
        skip=_why_not(values, file, tree.arch),
    )


def _script(name: str, values: dict[str, str], file: Path, tree: _Tree) -> str:
    """Return what bash runs; smp, arguments and parameters are words of its own in the list."""
    groups = values.get("groups", "").split()
    settings = [f"TESTNAME={shlex.quote(name)}"]
    settings += [f"{key.upper()}={shlex.quote(values[key])}" for key in ("machine", "accel") if values.get(key)]
    how = [f"TIMEOUT={shlex.quote(values['timeout'])}"] if values.get("timeout") else []
    how += [f"{group.upper()}=yes" for group in ("migration", "panic") if group in groups]
    options = [tree.smp, values.get("smp", "1")]
    options += [tree.arguments, values["test_args"]] if values.get("test_args") else []
    options += [tree.always, *(values[key] for key in tree.names if key in values)]
    words = {"run": shlex.quote(str(file.parent / "run")), "options": " ".join(option for option in options if option)}
    condition = values.get("disabled_if", "")
    return _SCRIPT.format(
        top=shlex.quote(str(file.parent.parent)),
        disabled=_DISABLED.format(condition=condition, told=shlex.quote(condition)) if condition else "",
        tried="" if tree.efi else _TRIED.format(settings=" ".join(settings), **words),
        settings=" ".join([*settings, *how]),
        file=shlex.quote(str(file)),
        **words,
    )


def _why_not(values: dict[str, str], file: Path, arch: str) -> str:
    """Return why a test does not run here, "" if it does."""
    if values.get("arch") and values["arch"] != arch:
        return f"for {values['arch']} only"
    groups = values.get("groups", "").split()
    if "nodefault" in groups:
        return "its group nodefault is run by hand only"
    if not file.exists():
        return f"{file.name} was not built"
    for demand in values.get("check", "").split():
        name, _, wanted = demand.partition("=")
        try:
            found = Path(name).read_text().strip()
        except OSError:
            return f"there is no {name}"
        if found != wanted:
            return f"{name} is not {wanted}"
    return ""
