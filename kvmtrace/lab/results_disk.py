"""The disk that a VMX lab host writes its results to: the final archive, and before it what was complete so far.

A tar archive of all that the command made begins at byte 0 once it has ended. Meanwhile init.sh puts the files that no
longer change behind it, in one of two slots by turns: a block that says which turn it was, written last, and a tar
archive. So one of them is whole whenever the host fails.
"""

from __future__ import annotations

import re
import tarfile
from typing import IO, TYPE_CHECKING

from kvmtrace.lab.image import CYLINDER_BYTES

if TYPE_CHECKING:
    from pathlib import Path

DISK_BYTES = (512 << 20) // CYLINDER_BYTES * CYLINDER_BYTES
SLOTS = (256 << 20, 384 << 20)
BLOCK = 512
_TURN = re.compile(rb"kvmtrace-files (\d{1,9})\n")


def make_disk(path: Path) -> None:
    """Make an empty disk; it takes no room until it is written to."""
    with path.open("wb") as handle:
        handle.truncate(DISK_BYTES)


def rescue(disk: Path, target: Path) -> tuple[str, ...]:
    """Unpack the files that were complete when the host failed; return their relative paths, sorted."""
    if not disk.exists():
        return ()
    with disk.open("rb") as handle:
        turns = [(turn, at) for at in SLOTS if (turn := _turn(handle, at))]
        if not turns:
            return ()
        handle.seek(max(turns)[1] + BLOCK)
        target.mkdir(parents=True, exist_ok=True)
        names = []
        with tarfile.open(fileobj=handle, mode="r|") as tar:
            for member in tar:
                source = tar.extractfile(member) if member.isfile() else None
                path = target / member.name
                if source is not None and path.resolve().is_relative_to(target.resolve()):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(source.read())
                    names.append(str(path.relative_to(target)))
        return tuple(sorted(names))


def _turn(handle: IO[bytes], at: int) -> int:
    """Return the turn of a slot's archive, 0 where there is none."""
    handle.seek(at)
    found = _TURN.match(handle.read(BLOCK))
    return int(found[1]) if found else 0
