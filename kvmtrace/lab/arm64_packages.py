"""Debian's arm64 packages for the arm64 lab: fetched through apt, unpacked into the cache, never installed.

apt keeps a state of its own for the other architecture, below the lab's cache, so that this machine's dpkg does not
learn of it; the archive is the one that this machine uses for its own packages.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from kvmtrace.errors import CapabilityError, UsageError
from kvmtrace.lab.cache import cache_dir, cached, digest, locked
from kvmtrace.lab.image import BCC_PACKAGE, SYSTEM_PYTHON, compile_tree
from kvmtrace.lab.kernels import Kernel
from kvmtrace.lab.tools import run_tool
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.scratch import ScratchFolder

# kernel series -> names of its images in Debian's archive (the newest is taken)
SERIES: dict[str, re.Pattern[str]] = {
    "6.1": re.compile(r"linux-image-(6\.1\.0-\d+-arm64)"),
    "6.12": re.compile(r"linux-image-(6\.12\.\d+\+deb\d+-arm64)"),
}
# what the root file system holds: an interpreter for kvmtrace, the tools whose recordings ours are compared with, a VMM
ROOT_PACKAGES = (
    "python3-minimal",
    "libpython3-stdlib",
    "busybox-static",
    "trace-cmd",
    "linux-perf",
    "coreutils",
    "qemu-system-arm",
)
# 210 MB more, most of it LLVM, and what the exporter needs; kvmtrace's own programs need no kernel headers
BCC_PACKAGES = ("python3-bpfcc", "python3-prometheus-client")
# directories of a merged /usr; Debian's packages still ship files in both places
MERGED = ("bin", "sbin", "lib", "lib64")
REMEDY = "check the network, or Debian's sources"


@dataclass(frozen=True)
class Arm64Kernel(Kernel):
    """An unpacked arm64 kernel, whose image needs no repacking."""

    @property
    def image(self) -> Path:
        """The kernel's EFI-stub image, which QEMU loads as it is."""
        return self.root / "boot" / f"vmlinuz-{self.release}"


@dataclass(frozen=True)
class OwnKernel(Kernel):
    """A kernel of one's own, which needs no modules: its root is the image."""

    @property
    def image(self) -> Path:
        """The image."""
        return self.root

    def load_order(self, names: tuple[str, ...]) -> list[Path]:  # noqa: ARG002
        """Return no file: all is built in."""
        return []


def get_own_kernel(image: Path) -> OwnKernel:
    """Return a kernel by its image; its release says what the image holds.

    Raises
    ------
    UsageError
        There is no such file.
    """
    if not image.is_file():
        raise UsageError(f"{image}: no such kernel image")
    return OwnKernel("", f"own-{digest([image.read_bytes()])}", image)


def apt_options() -> list[str]:
    """Return options with which apt-get and apt-cache know arm64 packages; the lists are fetched the first time.

    Raises
    ------
    CapabilityError
        The lists cannot be fetched.
    """
    state = cache_dir() / "apt-arm64"
    options = {
        "Dir::State": state,
        "Dir::State::lists": state / "lists",
        "Dir::State::status": state / "status",
        "Dir::Cache": state / "cache",
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",
    }
    arguments = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
    complete = state / "complete"
    with locked("apt-arm64"):
        if not complete.exists():
            for name in ("lists/partial", "cache/archives/partial"):
                (state / name).mkdir(parents=True, exist_ok=True)
            (state / "status").touch()
            run_tool(["apt-get", *arguments, "update", "-q"], remedy=REMEDY)
            complete.touch()
    return arguments


def get_arm64_kernel(series: str) -> Arm64Kernel:
    """Return the arm64 kernel of a series, fetched from Debian's archive if it is not cached.

    Raises
    ------
    UsageError
        No such series.
    CapabilityError
        apt cannot provide it.
    """
    if series not in SERIES:
        raise UsageError(f"no arm64 kernel {series}; there are {', '.join(SERIES)}")
    note = cache_dir() / f"series-arm64-{series}"
    with locked(note.name):
        if not note.exists():
            note.write_text(_newest_release(series))
        release = note.read_text().strip()
    return Arm64Kernel(series, release, cached(f"kernel-{release}-1", lambda work: _unpack_kernel(release, work)))


def _newest_release(series: str) -> str:
    names = run_tool(["apt-cache", *apt_options(), "pkgnames", "linux-image-6."]).split()
    releases = [found.group(1) for found in map(SERIES[series].fullmatch, names) if found]
    if not releases:
        raise CapabilityError(f"apt knows no arm64 kernel {series}", REMEDY)
    return max(releases, key=lambda release: [int(part) for part in re.findall(r"\d+", release)])


def _unpack_kernel(release: str, root: Path) -> None:
    with ScratchFolder("debs") as folder:
        run_tool(
            ["apt-get", *apt_options(), "download", "-q", f"linux-image-{release}"], cwd=str(folder), remedy=REMEDY
        )
        for package in sorted(folder.glob("*.deb")):
            run_tool(["dpkg-deb", "-x", str(package), str(root)])
    shutil.rmtree(root / "usr" / "share", ignore_errors=True)
    run_tool(["depmod", "-b", str(root), release])


def arm64_root(*, with_bcc: bool = False) -> Path:
    """Return the root file system: ROOT_PACKAGES and all that they depend on, with a merged /usr.

    Parameters
    ----------
    with_bcc : one that also holds bcc, for the bpf back end

    Raises
    ------
    CapabilityError
        apt cannot provide them.
    """
    packages = (*ROOT_PACKAGES, *(BCC_PACKAGES if with_bcc else ()))
    recipe = Path(__file__).read_bytes()
    return cached(f"arm64-root-{digest([recipe, *packages])}", lambda work: _unpack_root(work, packages))


def _unpack_root(root: Path, names: tuple[str, ...]) -> None:
    options = apt_options()
    archives = cache_dir() / "apt-arm64" / "cache" / "archives"
    with locked("apt-arm64"):
        shutil.rmtree(archives, ignore_errors=True)
        (archives / "partial").mkdir(parents=True)
        fetch = ["install", "--download-only", "-y", "-q", "--no-install-recommends", *names]
        run_tool(["apt-get", *options, *fetch], remedy=REMEDY)
        packages = sorted(archives.glob("*.deb"))
        for name in MERGED:
            (root / "usr" / name).mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(f"usr/{name}")
        for package in packages:
            _unpack_merged(package, root)
        shutil.rmtree(archives)
    for name in ("proc", "sys", "dev", "tmp", "run", "root", "etc", "var", "usr/local/bin"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("doc", "man", "locale", "info"):
        shutil.rmtree(root / "usr" / "share" / name, ignore_errors=True)
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\n")
    _add_busybox(root)
    _compile_library(root)
    if (root / BCC_PACKAGE.relative_to("/")).is_dir():
        compile_tree(root / BCC_PACKAGE.relative_to("/"))


def _compile_library(root: Path) -> None:
    """Compile Python's own library, as its packages do when they are installed; emulated, it takes a minute a start."""
    library = root / "usr" / "lib" / SYSTEM_PYTHON.resolve().name
    if library.is_dir():  # no other version would read what this machine's compiles
        compile_tree(library)


def _unpack_merged(package: Path, root: Path) -> None:
    """Unpack a package whose /bin, /sbin and /lib are links into /usr here."""
    with tempfile.TemporaryDirectory(prefix="kvmtrace-deb-", dir=root.parent) as folder:
        run_tool(["dpkg-deb", "-x", str(package), folder])
        for name in MERGED:
            apart = Path(folder) / name
            if apart.is_dir() and not apart.is_symlink():
                shutil.copytree(apart, Path(folder) / "usr" / name, symlinks=True, dirs_exist_ok=True)
                shutil.rmtree(apart)
        shutil.copytree(folder, root, symlinks=True, dirs_exist_ok=True)


def _add_busybox(root: Path) -> None:
    """Give busybox's names to what no package provides, the shell first of all."""
    for name in ("sh", "ls", "cat", "mount", "sed", "grep", "ps", "sleep", "hostname", "dmesg", "tar", "find", "awk"):
        link = root / "usr" / "bin" / name
        if not link.exists() and not link.is_symlink():
            link.symlink_to("busybox")


def arm64_busybox() -> Path:
    """Return the busybox of the root file system, which needs no libraries."""
    return arm64_root() / "usr" / "bin" / "busybox"
