"""What tests a source holds: folders, lists of commands, kselftests, kvm-unit-tests."""

from __future__ import annotations

import os
import platform
import subprocess
from typing import TYPE_CHECKING

import pytest

from kvmtrace.errors import UsageError
from kvmtrace.suite import suite_tests
from kvmtrace.suite.suite_tests import find_tests
from kvmtrace.suite.unittests_cfg import SPARE_S

if TYPE_CHECKING:
    from pathlib import Path

    from kvmtrace.suite.listed_test import SuiteTest

UNITTESTS = """\
# a comment

[apic]
file = apic.flat
smp = 2
extra_params = -cpu qemu64,+x2apic -append "a 'b c'"
arch = x86_64
timeout = 30
groups = apic

[other_arch]
file = apic.flat
arch = riscv64

[by_hand]
file = apic.flat
groups = nodefault

[long]
file = apic.flat
test_args = "one two"
extra_params = \"\"\"-m 2g
  -cpu max\"\"\"
accel = kvm

[demands]
file = apic.flat
check = /proc/sys/kernel/ostype=Minix

[unbuilt]
file = absent.flat

[disabled]
file = apic.flat
disabled_if = [[ "$ARCH" == "x86_64" ]]

[moved]
file = apic.flat
smp = $(((MAX_SMP < 99)?MAX_SMP:99))
test_args = `expr 1 + 2`
groups = migration

[no_vmm]
file = apic.flat
extra_params = -cpu none

[no_file]
smp = 1
"""
# tells what it was told; like QEMU, it names the file that it cannot load, if it comes so far
RUN = """\
#!/bin/sh
case "$*" in
*"-cpu none"*) echo no such CPU >&2; exit 1;;
_NO_FILE_4Uhere_*) echo "qemu: could not open kernel file '_NO_FILE_4Uhere_'" >&2; exit 1;;
esac
printf '%s' "${PWD##*/} $TESTNAME ${ACCEL:--} ${MIGRATION:--} ${PANIC:--} ${TIMEOUT:--}"
printf ' <%s>' "$@"
echo
"""


def program(path: Path, text: str = "#!/bin/sh\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def unit_tests(tmp_path: Path) -> Path:
    program(tmp_path / "x86" / "run")
    (tmp_path / "x86" / "apic.flat").touch()
    (tmp_path / "config.mak").write_text("ARCH=x86_64\nPROCESSOR=x86_64\n")
    path = tmp_path / "x86" / "unittests.cfg"
    path.write_text(UNITTESTS)
    return path


def test_kvm_unit_tests(unit_tests: Path) -> None:
    tests = {test.name: test for test in find_tests([str(unit_tests)])}
    assert list(tests) == ["apic", "other_arch", "by_hand", "long", "demands", "unbuilt", "disabled", "moved", "no_vmm"]
    assert tests["apic"].timeout_s == 30 + SPARE_S
    assert tests["apic"].skip == ""
    assert {name: test.skip for name, test in tests.items() if test.skip} == {
        "other_arch": "for riscv64 only",
        "by_hand": "its group nodefault is run by hand only",
        "demands": "/proc/sys/kernel/ostype is not Minix",
        "unbuilt": "absent.flat was not built",
    }


def ran(test: SuiteTest) -> tuple[int, list[str]]:
    """Run a test; return its exit code, and what `run` was told the last time."""
    done = subprocess.run(test.argv, capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]})
    return done.returncode, done.stdout.splitlines()[-1:]


def test_kvm_unit_tests_run_as_by_their_own_script(unit_tests: Path) -> None:
    program(unit_tests.parent / "run", RUN)
    tests = {test.name: test for test in find_tests([str(unit_tests)])}
    flat = str(unit_tests.parent / "apic.flat")
    cpus = str(len(os.sched_getaffinity(0)))
    top = unit_tests.parent.parent.name
    assert ran(tests["apic"]) == (
        0,
        [f"{top} apic - - - 30 <{flat}> <-smp> <2> <-cpu> <qemu64,+x2apic> <-append> <a 'b c'>"],
    )
    assert ran(tests["long"]) == (
        0,
        [f"{top} long kvm - - - <{flat}> <-smp> <1> <-append> <one two> <-m> <2g> <-cpu> <max>"],
    )
    assert ran(tests["moved"]) == (0, [f"{top} moved - yes - - <{flat}> <-smp> <{cpus}> <-append> <3>"])


def test_kvm_unit_tests_that_cannot_run_here_are_skipped(unit_tests: Path) -> None:
    program(unit_tests.parent / "run", RUN)
    tests = {test.name: test for test in find_tests([str(unit_tests)])}
    assert ran(tests["disabled"]) == (77, ['skipped, disabled because: [[ "$ARCH" == "x86_64" ]]'])
    assert ran(tests["no_vmm"]) == (77, ["skipped, the VMM says: no such CPU"])


def test_kvm_unit_tests_of_kvmtool(unit_tests: Path) -> None:
    program(unit_tests.parent / "run", RUN)
    with (unit_tests.parent.parent / "config.mak").open("a") as config:
        config.write("TARGET=kvmtool\n")
    (long,) = (test for test in find_tests([str(unit_tests)]) if test.name == "long")
    _, (line,) = ran(long)
    assert line.endswith(
        "<--cpus> <1> <--params> <one two> <--nodefaults> <--network> <mode=none> <--loglevel=warning>"
    )


def test_kvm_unit_tests_for_uefi(unit_tests: Path) -> None:
    program(unit_tests.parent / "run", RUN)
    with (unit_tests.parent.parent / "config.mak").open("a") as config:
        config.write("CONFIG_EFI=y\n")
    (apic,) = (test for test in find_tests([str(unit_tests)]) if test.name == "apic")
    assert apic.skip == "apic.efi was not built"


def test_kvm_unit_tests_without_configuration_are_this_machines(unit_tests: Path) -> None:
    (unit_tests.parent.parent / "config.mak").unlink()
    (apic,) = (test for test in find_tests([str(unit_tests)]) if test.name == "apic")
    assert bool(apic.skip) == (platform.machine() != "x86_64")


def test_a_cfg_without_its_run_script_is_refused(unit_tests: Path) -> None:
    (unit_tests.parent / "run").unlink()
    with pytest.raises(UsageError, match=r"there is no .*/run"):
        suite_tests.tests_of(str(unit_tests))


def test_folders_give_their_executables(tmp_path: Path) -> None:
    for name in ("b_test", "x86/a_test", "x86/helper.so", ".git/hook"):
        program(tmp_path / name)
    (tmp_path / "README").write_text("no test")
    assert [test.name for test in find_tests([str(tmp_path)])] == ["b_test", "x86/a_test"]
    assert [test.name for test in find_tests([str(tmp_path)], only=["a_*"])] == ["x86/a_test"]
    assert [test.name for test in find_tests([str(tmp_path)], leave_out=["x86/*"])] == ["b_test"]
    with pytest.raises(UsageError, match="no test is left of 2"):
        find_tests([str(tmp_path)], only=["c*"])


def test_installed_kselftests(tmp_path: Path) -> None:
    program(tmp_path / "kvm" / "x86" / "smm_test")
    program(tmp_path / "run_kselftest.sh")
    (tmp_path / "kselftest-list.txt").write_text("kvm:x86/smm_test\nkvm:gone\n")
    for source in (tmp_path, tmp_path / "kselftest-list.txt"):
        tests = find_tests([str(source)])
        assert [test.name for test in tests] == ["kvm/x86/smm_test", "kvm/gone"]
        assert tests[0].argv == ("env", "-C", str(tmp_path / "kvm"), "./x86/smm_test")


def test_a_file_of_commands_and_a_program(tmp_path: Path) -> None:
    listing = tmp_path / "list"
    listing.write_text("# two\nrun --fast | grep ok\n\n  true\ntrue\n")
    tests = find_tests([str(listing), str(program(tmp_path / "one"))])
    assert [test.name for test in tests] == ["run --fast | grep ok", "true", "true (2)", "one"]
    assert tests[0].argv == ("/bin/sh", "-c", "run --fast | grep ok")
    assert tests[3].argv == (str(tmp_path / "one"),)


def test_what_holds_no_test_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("# nothing\n")
    (tmp_path / "binary").write_bytes(b"\x7fELF\0\0")
    for name, words in (
        ("empty", "holds no test"),
        ("binary", "neither executable nor a list"),
        ("absent", "no such file"),
    ):
        with pytest.raises(UsageError, match=words):
            suite_tests.tests_of(str(tmp_path / name))
