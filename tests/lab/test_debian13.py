"""Set-up, demo and unit tests on Debian 13 (Python 3.13, its own python3-bpfcc), in a chroot made from its archive."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmtrace.lab.cache import cached

REPOSITORY = Path(__file__).parents[2]
SUITE = "trixie"
PACKAGES = "ca-certificates,git,make,sudo"  # tests of the distribution ask git what belongs to it
# what this machine knows of the way to package archives
WAY = ("/etc/resolv.conf", "/etc/pip.conf", "/etc/ssl/certs", "/opt/wheels", "/opt/pypi", "/opt/pypi-more")
ENVIRONMENT = ("pip_", "http_", "https_", "no_proxy", "ssl_", "requests_")


def archive() -> str:
    """Return the address of the Debian archive that this machine uses."""
    command = ["apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return next(line.partition(" ")[2] for line in listing.splitlines() if line.startswith("Debian "))


def bootstrap(work: Path) -> None:
    (work / "root").mkdir(mode=0o755)
    command = [
        "mmdebstrap",
        "--variant=apt",
        f"--include={PACKAGES}",
        "--components=main",
        SUITE,
        work / "root",
        archive(),
    ]
    subprocess.run([*map(str, command)], check=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Debian 13 of our own with the committed files in /kvmtrace."""
    folder = tmp_path_factory.mktemp("debian13") / "root"
    subprocess.run(["cp", "-a", cached(f"debian-{SUITE}-2", bootstrap) / "root", folder], check=True)
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    for name in filter(None, os.fsdecode(files).split("\0")):
        target = folder / "kvmtrace" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, target)
    return folder


def run(root: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a shell command in the chroot, with the kernel's file systems; its mounts go with it."""
    mounts = [f"mount --rbind /{name} {root}/{name}" for name in ("proc", "sys", "dev")]
    for path in filter(os.path.exists, WAY):
        place = f"{root}{path}"
        make = f"mkdir -p {place}" if os.path.isdir(path) else f"touch {place}"
        mounts.append(f"{make}; mount --bind {os.path.realpath(path)} {place}")
    kept = {name: value for name, value in os.environ.items() if name.lower().startswith(ENVIRONMENT)}
    kept |= {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
    script = " && ".join([*mounts, f"exec chroot {root} sh -c 'cd /kvmtrace && {command}'"])
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], env=kept, capture_output=True, text=True, timeout=3600, check=False
    )


@pytest.mark.lab
def test_debian_13(root: Path) -> None:
    for command in (
        "git init -q . && git add -A",
        "make setup",
        "make demo",
        '.venv/bin/python -m pytest -q -m "not lab and not lab_smoke and not slow and not kvm and not browser" tests',
    ):
        done = run(root, command)
        assert done.returncode == 0, (command, done.stdout[-3000:], done.stderr[-3000:])
    assert "Python 3.13" in run(root, ".venv/bin/python --version").stdout
