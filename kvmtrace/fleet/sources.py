"""Which recordings SOURCE names: files, folders, globs, on this machine or behind an fsspec URL."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.errors import FormatError, UsageError
from kvmtrace.fleet.store import filesystem_of
from kvmtrace.scratch import ScratchFolder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# object stores raise these without a number
CODES = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}
# what lies beside recordings and is none: manifests, reports, checksums
NO_RECORDINGS = (".json", ".html", ".md", ".csv", ".sha256", ".parquet.tmp")


def find_sources(wanted: Iterable[str]) -> list[str]:
    """Return the recordings that SOURCEs name, each once, in the order given.

    A folder stands for the files below it, hidden ones and those with a suffix of NO_RECORDINGS left out;
    a file that is named itself is always taken.

    Raises
    ------
    UsageError
        A SOURCE names nothing.
    """
    found: dict[str, None] = {}
    for url in wanted:
        own = _expanded(url)
        if not own:
            raise UsageError(f"{url}: no recording there")
        found.update(dict.fromkeys(own))
    return list(found)


def _expanded(url: str) -> list[str]:
    filesystem, path = filesystem_of(url)
    if any(sign in path for sign in "*?["):
        below = [str(name) for name in filesystem.glob(path) if filesystem.isfile(name)]
    elif filesystem.isdir(path):
        below = [str(name) for name in filesystem.find(path)]
        below = [name for name in below if _may_be_recording(name.removeprefix(path))]
    else:
        return [url]  # one that is not there fails as a source, and is told as such
    remote = "://" in url
    return sorted(filesystem.unstrip_protocol(name) if remote else name for name in below)


def _may_be_recording(name: str) -> bool:
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and not name.endswith(NO_RECORDINGS)


@contextmanager
def at_hand(source: str) -> Iterator[Path]:
    """Give a recording as a file of this machine: itself, or a copy that is removed afterwards.

    Raises
    ------
    OSError
        It cannot be read.
    FormatError
        As it is raised within, told of the source instead of its copy.
    """
    filesystem, path = filesystem_of(source)
    protocols = filesystem.protocol
    if "file" in ((protocols,) if isinstance(protocols, str) else protocols):
        yield Path(path)
        return
    with ScratchFolder("fleet") as folder:
        copy = folder / "recording"
        try:
            filesystem.get_file(path, str(copy))
        except OSError as error:
            raise _of_source(error, source) from error
        try:
            yield copy
        except FormatError as error:
            if error.path != str(copy):
                raise
            raise FormatError(source, error.offset, error.expected, error.found) from error


def _of_source(error: OSError, source: str) -> OSError:
    """Return an object store's error as one of this source, with a number."""
    code = error.errno or CODES.get(type(error), errno.EIO)
    return type(error)(code, error.strerror or " ".join(str(error).split()), source)
