"""KVM's own selftests (tools/testing/selftests/kvm), built from Debian's linux-source package into the lab's cache.

Those of arm64 are cross-compiled (gcc-aarch64-linux-gnu, libc6-dev-arm64-cross).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from kvmtrace.lab.cache import cached, digest
from kvmtrace.lab.kernels import apt_options_of, get_kernel
from kvmtrace.lab.tools import find_program

# what `make headers` and the selftests need of the kernel's tree; the drivers' registers are 7.x's
_PARTS = (
    "Makefile",
    "Kbuild",
    "Kconfig",
    "scripts/*",
    "include/*",
    "tools/*",
    "usr/*",
    "lib/*",
    "drivers/dma/*",
    "drivers/net/ethernet/intel/*",
)
_FOLDER = "tools/testing/selftests/kvm"
# counts changes of what an item of the cache holds
_LAYOUT = 1


@dataclass(frozen=True)
class Architecture:
    """What the selftests are built for.

    Parameters
    ----------
    make : arguments of make
    parts : of the kernel's tree, beside what all need
    listed : what a Makefile's lists of programs are called, a pattern
    compiler : the program
    """

    make: tuple[str, ...]
    parts: tuple[str, ...]
    listed: str
    compiler: str = "gcc"


_X86 = Architecture(("ARCH=x86_64",), ("arch/x86/*",), "COMMON|x86|x86_64")
_ARM64 = Architecture(
    ("ARCH=arm64", "CROSS_COMPILE=aarch64-linux-gnu-"),
    ("arch/arm64/*",),
    "COMMON|arm64|aarch64",
    "aarch64-linux-gnu-gcc",
)
ARCHITECTURES = {"svm": _X86, "vmx": _X86, "arm64": _ARM64}


@dataclass(frozen=True)
class Selftests:
    """The selftests of one kernel series.

    Parameters
    ----------
    folder : Path, the programs, under their own names without "x86_64/" or "aarch64/"
    version : str, of the source package
    built, not_built : names of the programs that the Makefile lists
    """

    folder: Path
    version: str
    built: tuple[str, ...]
    not_built: tuple[str, ...]


def _run(command: list[str], folder: Path, log: Path | None = None, *, check: bool = True) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if log is not None:
        log.write_text(done.stdout + done.stderr)
    assert not check or done.returncode == 0, f"{' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}"
    return done.stdout


def _package(series: str) -> str:
    """Name the source package of the lab's kernel: "linux-source-6.1"."""
    return "linux-source-" + ".".join(get_kernel(series).release.split(".")[:2])


def _newest_version(series: str) -> str:
    """Return the version of the source package that apt would take."""
    command = ["apt-cache", *apt_options_of(series), "show", "--no-all-versions", _package(series)]
    lines = _run(command, Path.cwd()).splitlines()
    return next(line.split(": ")[1] for line in lines if line.startswith("Version: "))


def _unpack(series: str, version: str, work: Path, parts: tuple[str, ...]) -> Path:
    """Return the unpacked part of the source tree."""
    name = _package(series)
    _run(["apt-get", *apt_options_of(series), "download", "-q", f"{name}={version}"], work)
    package = next(work.glob("*.deb"))
    members = " ".join(f"'{name}/{part}'" for part in parts)
    pipeline = (
        f"dpkg-deb --fsys-tarfile {package.name} | tar -xf - --to-stdout ./usr/src/{name}.tar.xz"
        f" | xz -dc | tar -xf - --wildcards {members}"
    )
    _run(["bash", "-o", "pipefail", "-c", pipeline], work)
    package.unlink()
    return work / name


def _listed(makefile: str, lists: str) -> list[str]:
    """Return the programs that a Makefile lists for an architecture, "x86_64/smm_test" (7.x: "x86/smm_test")."""
    names = re.findall(rf"^TEST_GEN_PROGS_(?:{lists}) \+= (\S+)$", makefile, re.MULTILINE)
    return [name for name in names if not name.startswith("$")]


def _build(series: str, version: str, architecture: Architecture, work: Path) -> None:
    find_program(architecture.compiler)
    source = _unpack(series, version, work, (*_PARTS, *architecture.parts))
    tests = source / _FOLDER
    nice = ["nice", "-n", "10", "make", "-s", *architecture.make]
    _run([*nice, "headers"], source)
    # a stable kernel's source may hold a test that does not compile: keep going, and say which
    jobs = f"-j{len(os.sched_getaffinity(0))}"
    _run([*nice, jobs, "-k"], tests, work / "build.log", check=False)
    (work / "programs").mkdir()
    listed = _listed("".join(path.read_text() for path in sorted(tests.glob("Makefile*"))), architecture.listed)
    for name in listed:
        if (tests / name).is_file():
            shutil.copy(tests / name, work / "programs" / Path(name).name)
    (work / "listed").write_text("".join(f"{Path(name).name}\n" for name in listed))
    shutil.rmtree(source)


def build_selftests(isa: str, series: str) -> Selftests:
    """Return the selftests of a kernel series for the lab of an ISA, built if they are not cached (some minutes)."""
    version = _newest_version(series)
    architecture = ARCHITECTURES[isa]
    recipe = [series, version, str(_LAYOUT)] + [isa] * (architecture is _ARM64)
    name = f"selftests-{series}-{digest(recipe)}"
    item = cached(name, lambda work: _build(series, version, architecture, work))
    listed = (item / "listed").read_text().split()
    built = tuple(test for test in listed if (item / "programs" / test).exists())
    return Selftests(item / "programs", version, built, tuple(sorted({*listed} - {*built})))
