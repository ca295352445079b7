"""apt with a sources list of its own: kernels of a later Debian; nothing of this machine is changed."""

from __future__ import annotations

from kvmtrace.errors import CapabilityError
from kvmtrace.lab.cache import cache_dir, locked
from kvmtrace.lab.tools import run_tool

_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def apt_options(suite: str) -> list[str]:
    """Return options with which apt-get and apt-cache know a Debian suite ("trixie-backports") and nothing else.

    The suite's package lists are fetched the first time, from the archive that this machine uses for Debian itself.

    Raises
    ------
    CapabilityError
        apt knows no Debian archive, or the lists cannot be fetched.
    """
    folder = cache_dir() / f"apt-{suite}"
    options = {
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": folder / "lists",
        "Dir::Cache::archives": folder / "archives",
        "Dir::Cache::pkgcache": folder / "pkgcache.bin",
        "Dir::Cache::srcpkgcache": folder / "srcpkgcache.bin",
        "APT::Sandbox::User": "root",
    }
    arguments = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]
    complete = folder / "complete"
    with locked(f"apt-{suite}"):
        if not complete.exists():
            for name in ("lists/partial", "archives/partial"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / "sources.list").write_text(f"deb [signed-by={_KEYRING}] {_archive()} {suite} main\n")
            run_tool(["apt-get", *arguments, "update", "-q"], remedy="check the network")
            complete.touch()
    return arguments


def _archive() -> str:
    """Return the address of the Debian archive in this machine's own sources."""
    listing = run_tool(["apt-get", "indextargets", "--format", "$(LABEL)\t$(REPO_URI)", "Created-By: Packages"])
    for label, _, address in (line.partition("\t") for line in listing.splitlines()):
        if label == "Debian":
            return address
    raise CapabilityError("apt knows no Debian archive", "add Debian's sources, run apt-get update")
