"""Debian kernels for the lab: fetched through apt, unpacked into the cache, never installed."""

from __future__ import annotations

import lzma
import re
import shutil
from typing import TYPE_CHECKING

from kvmtrace.errors import CapabilityError, UsageError
from kvmtrace.lab.backports import apt_options
from kvmtrace.lab.cache import cache_dir, cached, locked
from kvmtrace.lab.repack import repack_kernel
from kvmtrace.lab.tools import run_tool
from kvmtrace.lazy_dataclass import dataclass
from kvmtrace.scratch import ScratchFolder

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Series:
    """Where the kernels of a series come from.

    Parameters
    ----------
    image : of the names of its images; the group is the release; the newest is taken
    suite : Debian suite, "" for those of this machine
    parts : packages that hold the kernel, its modules and headers; {0} is the release, {1} that without "-amd64"
    """

    image: re.Pattern[str]
    suite: str = ""
    # the headers are there so that bcc can compile
    parts: tuple[str, ...] = ("linux-image-{0}", "linux-headers-{0}", "linux-headers-{1}-common")


SERIES: dict[str, Series] = {
    "6.1": Series(re.compile(r"linux-image-(6\.1\.0-\d+-amd64)")),
    "6.12": Series(re.compile(r"linux-image-(6\.12\.\d+\+deb\d+-amd64)")),
    "7": Series(
        re.compile(r"linux-image-(7\.\d+\.\d+\+deb13-amd64)"),
        "trixie-backports",
        ("linux-base-{0}", "linux-binary-{0}", "linux-modules-{0}", "linux-headers-{0}", "linux-headers-{1}-common"),
    ),
}

FETCH_REMEDY = "run apt-get update, or check the network"
# counts changes of what an unpacked kernel holds
LAYOUT = 2


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel.

    Parameters
    ----------
    series : str, as the user chose it ("6.1")
    release : str, what `uname -r` will print
    root : directory holding boot/, lib/modules/RELEASE/ and usr/src/ of its packages
    """

    series: str
    release: str
    root: Path

    @property
    def image(self) -> Path:
        """The kernel image, repacked without compression (repack.py)."""
        return self.root / "boot" / "bzImage"

    @property
    def modules(self) -> Path:
        """The directory with modules.dep."""
        return self.root / "lib" / "modules" / self.release

    def load_order(self, names: tuple[str, ...]) -> list[Path]:
        """Return the module files that loading `names` takes, dependencies first; built-in ones are left out.

        Raises
        ------
        CapabilityError
            The kernel has no such module.
        """
        dependencies = self._dependencies()
        by_name = {_module_name(path): path for path in dependencies}
        builtin = {_module_name(line) for line in (self.modules / "modules.builtin").read_text().split()}
        order: list[str] = []
        for name in names:
            if name in builtin:
                continue
            if name not in by_name:
                raise CapabilityError(f"kernel {self.release} has no module {name}", "choose another --kernel")
            path = by_name[name]
            # modules.dep lists the deepest dependency last
            order += [p for p in (*reversed(dependencies[path]), path) if p not in order]
        return [self.modules / path for path in order]

    def _dependencies(self) -> dict[str, list[str]]:
        lines = (self.modules / "modules.dep").read_text().splitlines()
        return {path: rest.split() for path, _, rest in (line.partition(":") for line in lines)}


def _module_name(path: str) -> str:
    return path.rsplit("/", 1)[-1].partition(".ko")[0].replace("-", "_")


SIGNATURE_MAGIC = b"~Module signature appended~\n"


def read_module(path: Path) -> bytes:
    """Return a module's ELF image, uncompressed and without its signature.

    Checking the signatures takes a tenth of the VMX lab's boot; unsigned modules load all the same.
    Source: kernel/module/signing.c, mod_verify_sig; include/linux/module_signature.h
    """
    data = path.read_bytes()
    if path.suffix == ".xz":
        data = lzma.decompress(data)
    if data.endswith(SIGNATURE_MAGIC):
        # struct module_signature (12 bytes) stands before the magic; its last member is the length, big endian
        end = len(data) - len(SIGNATURE_MAGIC)
        data = data[: end - 12 - int.from_bytes(data[end - 4 : end], "big")]
    return data


def get_kernel(series: str) -> Kernel:
    """Return the kernel of a series, fetched from Debian's archive if it is not cached.

    The release is chosen when the series is first used and kept until the cache is removed.

    Raises
    ------
    UsageError
        No such series.
    CapabilityError
        apt cannot provide it.
    """
    if series not in SERIES:
        raise UsageError(f"no kernel {series}; there are {', '.join(SERIES)}")
    release = _chosen_release(series)
    root = cached(f"kernel-{release}-{LAYOUT}", lambda work: _unpack(series, release, work))
    return Kernel(series, release, root)


def _chosen_release(series: str) -> str:
    note = cache_dir() / f"series-{series}"
    with locked(f"series-{series}"):
        if not note.exists():
            note.write_text(_newest_release(series))
        return note.read_text().strip()


def apt_options_of(series: str) -> list[str]:
    """Return the options with which apt knows the packages of a series."""
    suite = SERIES[series].suite
    return apt_options(suite) if suite else []


def _newest_release(series: str) -> str:
    names = run_tool(["apt-cache", *apt_options_of(series), "pkgnames", "linux-image-"]).split()
    releases = [found.group(1) for found in map(SERIES[series].image.fullmatch, names) if found]
    if not releases:
        raise CapabilityError(f"apt knows no Debian kernel {series}", "run apt-get update (Debian 12)")
    return max(releases, key=lambda release: [int(part) for part in re.findall(r"\d+", release)])


def _packages(series: str, release: str) -> list[str]:
    """Name the packages of a kernel: image and modules; headers (two packages) so that bcc can compile."""
    return [part.format(release, release.removesuffix("-amd64")) for part in SERIES[series].parts]


def _unpack(series: str, release: str, root: Path) -> None:
    options = apt_options_of(series)
    with ScratchFolder("debs") as folder:
        download = ["apt-get", *options, "download", "-q", *_packages(series, release)]
        run_tool(download, cwd=str(folder), remedy=FETCH_REMEDY)
        for package in sorted(folder.glob("*.deb")):
            run_tool(["dpkg-deb", "-x", str(package), str(root)])
    shutil.rmtree(root / "usr" / "share", ignore_errors=True)
    _merge_usr(root)
    run_tool(["depmod", "-b", str(root), release])
    images = (root / "boot" / f"vmlinuz-{release}", root / "lib" / "modules" / release / "vmlinuz")
    compressed = next(image for image in images if image.exists())
    (root / "boot" / "bzImage").write_bytes(repack_kernel(compressed.read_bytes()))


def _merge_usr(root: Path) -> None:
    """Bring modules that a package holds in usr/lib (Debian 13's do) to where the lab looks for them."""
    (root / "boot").mkdir(exist_ok=True)
    if (root / "usr" / "lib" / "modules").is_dir():
        shutil.copytree(root / "usr" / "lib" / "modules", root / "lib" / "modules", symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(root / "usr" / "lib" / "modules")
