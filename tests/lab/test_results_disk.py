"""The results' disk of the VMX lab: what was complete when the host failed comes back."""

from __future__ import annotations

import io
import tarfile
from typing import TYPE_CHECKING

import pytest

from kvmtrace.lab.results_disk import BLOCK, DISK_BYTES, SLOTS, make_disk, rescue

if TYPE_CHECKING:
    from pathlib import Path


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def put(disk: Path, slot: int, turn: int | None, files: dict[str, bytes]) -> None:
    """Write a slot as init.sh does; without a turn it was not finished."""
    with disk.open("r+b") as handle:
        handle.seek(SLOTS[slot])
        handle.write((b"" if turn is None else b"kvmtrace-files %d\n" % turn).ljust(BLOCK, b"\0"))
        handle.write(archive(files))


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    make_disk(tmp_path / "disk")
    assert (tmp_path / "disk").stat().st_size == DISK_BYTES > SLOTS[1]
    return tmp_path / "disk"


def test_nothing_was_complete(disk: Path, tmp_path: Path) -> None:
    assert rescue(disk, tmp_path / "out") == ()
    assert rescue(tmp_path / "none", tmp_path / "out") == ()
    assert not (tmp_path / "out").exists()


def test_the_latest_whole_turn_counts(disk: Path, tmp_path: Path) -> None:
    put(disk, 1, 9, {"./a": b"old"})
    put(disk, 0, 10, {"./a": b"new", "./sub/b": b"x" * 5000})
    assert rescue(disk, tmp_path / "out") == ("a", "sub/b")
    assert (tmp_path / "out" / "a").read_bytes() == b"new"
    put(disk, 0, None, {"./a": b"half"})  # the host failed while it wrote
    assert rescue(disk, tmp_path / "again") == ("a",)
    assert (tmp_path / "again" / "a").read_bytes() == b"old"


def test_nothing_is_written_elsewhere(disk: Path, tmp_path: Path) -> None:
    put(disk, 0, 2, {"../outside": b"x", "/tmp/kvmtrace-outside": b"x", "inside": b"y"})
    assert rescue(disk, tmp_path / "out") == ("inside",)
    assert not (tmp_path / "outside").exists()
