"""Build kvm.ko, kvm-intel.ko and kvm-amd.ko of the lab's kernel from Debian's linux-source.

Everything is fetched through apt and kept in the lab's cache: the unpacked arch/x86/kvm and virt/kvm, a tree
of kernel headers whose Makefile does not point at /usr/src, and a clean build that faults start from.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from typing import TYPE_CHECKING

from faults.catalogue import Fault, apply_fault
from kvmtrace.lab.cache import cached, digest
from kvmtrace.lab.kernels import Kernel, get_kernel

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SERIES = "6.1"
MODULES = ("kvm.ko", "kvm-intel.ko", "kvm-amd.ko")
_PARTS = ("arch/x86/kvm", "virt/kvm")
# the headers packages lack these two folders, so the module's own copies are used
_MAKEFILE_EDITS = (
    ("-I $(srctree)/arch/x86/kvm", "-I $(src) -I $(src)/../../../include/trace"),
    ("include $(srctree)/virt", "include $(src)/../../../virt"),
)


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {(done.stderr or done.stdout)[-2000:]}"
    return done.stdout


def _version_of(kernel: Kernel) -> str:
    """Return the Debian version of the lab's kernel, which its source must have as well."""
    out = _run(["apt-cache", "show", f"linux-image-{kernel.release}"], kernel.root)
    return next(line.split(": ")[1] for line in out.splitlines() if line.startswith("Version: "))


def _fetch(package: str, folder: Path) -> Path:
    _run(["apt-get", "download", "-q", package], folder)
    return next(folder.glob("*.deb"))


def unpack_parts(work: Path, series: str, parts: Iterable[str], version: str = "") -> None:
    """Unpack folders of linux-source, a tar file within a package."""
    name = f"linux-source-{series}"
    fetched = work / "fetched"  # a part may be named as a folder of the package: usr
    fetched.mkdir()
    package = _fetch(f"{name}={version}" if version else name, fetched)
    _run(["sh", "-c", f"dpkg-deb --fsys-tarfile {package.name} | tar -xf - ./usr/src/{name}.tar.xz"], fetched)
    _run(["tar", "-xJf", f"usr/src/{name}.tar.xz", *(f"{name}/{part}" for part in parts)], fetched)
    for part in parts:
        (work / part).parent.mkdir(parents=True, exist_ok=True)
        (fetched / name / part).rename(work / part)
    shutil.rmtree(fetched)


def _unpack_source(work: Path, version: str) -> None:
    """Unpack the KVM folders of the kernel's source."""
    unpack_parts(work, SERIES, _PARTS, version)
    # trace headers include themselves by a path relative to include/trace
    (work / "include" / "trace").mkdir(parents=True)
    makefile = work / "arch/x86/kvm/Makefile"
    text = makefile.read_text()
    for old, new in _MAKEFILE_EDITS:
        assert old in text, old
        text = text.replace(old, new)
    makefile.write_text(text)


def module_headers(kernel: Kernel) -> Path:
    """Return the directory to build modules in: headers and kbuild of the lab's kernel, in one tree."""

    def build(work: Path) -> None:
        own = SERIES if kernel.series == SERIES else kernel.release.removesuffix("-amd64")
        package = _fetch(f"linux-kbuild-{own}", work)
        _run(["dpkg-deb", "-x", package.name, "."], work)
        package.unlink()
        for headers in sorted((kernel.root / "usr" / "src").glob("linux-headers-*")):
            shutil.copytree(headers, work / "usr" / "src" / headers.name, symlinks=True)

    tree = cached(f"fault-headers-{kernel.release}", build) / "usr" / "src"
    own = tree / f"linux-headers-{kernel.release}"
    common = next(tree.glob("linux-headers-*-common"))
    makefile = own / "Makefile"
    line = f"include {common}/Makefile\n"
    if makefile.read_text() != line:  # Debian's has /usr/src
        makefile.write_text(line)
    return own


def make_modules(source: Path) -> None:
    """Build the modules of an unpacked source, or what has changed of them."""
    kernel = get_kernel(SERIES)
    jobs = len(os.sched_getaffinity(0))
    _run(
        ["make", "-s", f"-j{jobs}", "-C", str(module_headers(kernel)), f"M={source / 'arch/x86/kvm'}", "modules"],
        source,
    )


@functools.cache
def clean_build() -> Path:
    """Return the unpacked source with everything built, from the cache if it is there."""
    kernel = get_kernel(SERIES)
    version = _version_of(kernel)

    def build(work: Path) -> None:
        _unpack_source(work, version)
        # objects know their own path, and the finished item has another than this one: built in place below

    item = cached(f"fault-source-{digest([kernel.release, version])}", build)
    if not (item / "arch/x86/kvm/kvm-amd.ko").exists():
        make_modules(item)
    return item


def build_modules(fault: Fault | None, target: Path) -> Path:
    """Build the modules with one fault (or none) into `target`.

    Parameters
    ----------
    fault : what to break, None for a clean build
    target : directory that is made; its subdirectory `modules` is the result
    """
    source = target / "source"
    clean = clean_build()
    shutil.copytree(clean, source, copy_function=shutil.copy2)
    relocate(source, clean)
    if fault is not None:
        apply_fault(source, fault)
    make_modules(source)
    modules = target / "modules"
    modules.mkdir()
    for name in MODULES:
        strip_module(source / "arch/x86/kvm" / name, modules / name)
    shutil.rmtree(source)
    return modules


def relocate(source: Path, before: Path) -> None:
    """Tell a copy of a built source where it is: commands and lists of objects name files by their full path."""
    for pattern in (".*.cmd", "*.mod", "modules.order"):
        for listing in source.rglob(pattern):
            status = listing.stat()
            listing.write_text(listing.read_text().replace(str(before), str(source)))
            os.utime(listing, ns=(status.st_atime_ns, status.st_mtime_ns))


def strip_module(built: Path, target: Path) -> None:
    """Write a module without its debugging information."""
    _run(["strip", "--strip-debug", "-o", str(target), str(built)], target.parent)
