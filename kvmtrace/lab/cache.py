"""The lab's cache: kernels and images that are fetched or built once.

Every item is a directory (or file) that is made under a temporary name and renamed when complete, so that an
interrupted build leaves nothing that looks finished. Builders of one item wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.errors import CapabilityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

CACHE_VARIABLE = "KVMTRACE_LAB_CACHE"
KEEP_S = 7 * 24 * 3600.0


def cache_dir() -> Path:
    """Return the cache directory, made if missing: $KVMTRACE_LAB_CACHE, or kvmtrace/lab in the XDG cache.

    Raises
    ------
    CapabilityError
        What it is to lie in is missing: root would make even a home that no user has (/nonexistent).
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        made = [Path(chosen)]
    else:
        xdg = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        made = [xdg, xdg / "kvmtrace", xdg / "kvmtrace" / "lab"]
    if not made[0].absolute().parent.is_dir():
        raise CapabilityError(
            f"{made[0].parent}: no such directory for the labs' files", f"set {CACHE_VARIABLE} to another place"
        )
    for folder in made:
        folder.mkdir(exist_ok=True)
    return made[-1].resolve()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock `name`; other processes that want it wait."""
    with (cache_dir() / f"{name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Return the cache item `name`, built if it is not there.

    Parameters
    ----------
    name : str, file name of the item; whatever it depends on must be part of it (see `digest`)
    build : called with a directory (empty) that becomes the item
    """
    path = cache_dir() / name
    if path.exists():
        os.utime(path)
        return path
    with locked(name):
        if not path.exists():
            for left in cache_dir().glob(f"{name}.*.part"):  # nobody else is building it: of a killed one
                shutil.rmtree(left, ignore_errors=True)
            work = Path(tempfile.mkdtemp(prefix=f"{name}.", suffix=".part", dir=cache_dir()))
            try:
                build(work)
                work.chmod(0o755)
                work.rename(path)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            _forget_old(name)
    return path


def _forget_old(name: str) -> None:
    """Remove items that `name` has succeeded (all but the digest is equal) and that nobody used for days."""
    kind = name.rpartition("-")[0]
    for path in cache_dir().glob(f"{kind}-*"):
        if path.is_dir() and path.name != name and time.time() - path.stat().st_mtime > KEEP_S:
            shutil.rmtree(path, ignore_errors=True)
            (cache_dir() / f"{path.name}.lock").unlink(missing_ok=True)


def digest(parts: Iterable[str | bytes]) -> str:
    """Return 16 hex digits that change with any of the parts."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()[:16]


def file_key(path: Path) -> str:
    """Return what identifies a file's content well enough for rebuilding: path, size and change time."""
    status = path.stat()
    return f"{path}:{status.st_size}:{status.st_mtime_ns}"
