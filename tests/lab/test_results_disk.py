"""The results' disk of the VMX lab: what was complete when the host failed comes back."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from kvmtrace.lab import image
from kvmtrace.lab.results_disk import BLOCK, DISK_BYTES, SLOTS, make_disk, rescue


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


def test_what_init_writes_is_read(disk: Path, tmp_path: Path) -> None:
    """The function of init.sh, in the shell that runs it: names with spaces and patterns, files that still change."""
    text = Path(image.__file__).with_name("init.sh").read_text()
    function = text[text.index("bring_to_disk() {") : text.index("\n}\n", text.index("bring_to_disk() {")) + 3]
    (tmp_path / "bin").mkdir()
    subprocess.run(["busybox", "--install", "-s", str(tmp_path / "bin")], check=True)
    upper = tmp_path / "upper"
    (upper / "sub").mkdir(parents=True)
    (upper / "a b").write_text("first")
    (upper / "sub" / "*").write_text("second")
    (upper / ".x.kvmtrace-1").write_text("not complete")
    function = function.replace("/rw/upper$cwd", str(upper)).replace("sleep 4", "sleep 0.3")
    script = f"export PATH={tmp_path}/bin\nresults={disk}\n{function}\nbring_to_disk"
    with subprocess.Popen(["busybox", "sh", "-c", script], stderr=subprocess.DEVNULL, start_new_session=True) as shell:
        deadline = time.monotonic() + 30
        while not (found := rescue(disk, tmp_path / "out")) and time.monotonic() < deadline:
            time.sleep(0.1)
        (upper / "later").write_text("third")
        while "later" not in found and time.monotonic() < deadline:
            time.sleep(0.1)
            found = rescue(disk, tmp_path / "out") or found
        os.killpg(shell.pid, signal.SIGKILL)
    assert found == ("a b", "later", "sub/*")
    assert (tmp_path / "out" / "sub" / "*").read_text() == "second"
