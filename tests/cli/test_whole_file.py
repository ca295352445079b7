"""A file appears when it is complete: no link is followed, no killed process leaves anything for long."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import pytest

from kvmtrace.cli.output import write_text
from kvmtrace.whole_file import write_whole


def data(out: IO[bytes]) -> None:
    out.write(b"new")


@pytest.fixture(params=["unnamed", "named"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "named":  # what file systems say that have no files without a name
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    return str(request.param)


def test_it_is_private_and_alone(way: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    write_whole(tmp_path / "a", data)
    assert (tmp_path / "a").read_bytes() == b"new"
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_links_are_replaced(way: str, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a").symlink_to(tmp_path / "victim")
    write_whole(tmp_path / "a", data)
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "a").is_symlink()


def test_what_fails_leaves_the_old_one(way: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fails(out: IO[bytes]) -> None:
        out.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", fails)
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_put_in_a_fifos_place_is_not_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the opening somebody puts a link to another file there."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.mkfifo(tmp_path / "a")
    real = os.open

    def swapped(path: str, flags: int, *rest: int, dir_fd: int | None = None) -> int:
        if path == "a":
            (tmp_path / "a").unlink()
            (tmp_path / "a").symlink_to(victim)
        return real(path, flags, *rest, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(OSError, match="symbolic links"):
        write_whole(tmp_path / "a", data)
    assert victim.read_text() == "precious"


def test_a_fifo_is_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    write_whole(tmp_path / "pipe", data)
    reader.join(timeout=300)
    assert read == [b"new"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_errors_name_the_users_path(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "such", Path("/proc/x")):
        with pytest.raises(OSError, match=re.escape(str(path))):
            write_whole(path, data)
    with pytest.raises(OSError, match="'/dev/full'"):
        write_whole(Path("/dev/full"), lambda out: (out.write(b"x"), out.flush())[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_killed_writer_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from kvmtrace.whole_file import write_whole\n"
        "def write(out):\n    out.write(b'x' * 100000); out.flush(); print('on', flush=True); time.sleep(60)\n"
        "write_whole(Path(sys.argv[1]), write)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "o")], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"on\n"
        writer.send_signal(number)
    assert list(tmp_path.iterdir()) == []


def test_what_was_left_goes_with_the_next(tmp_path: Path) -> None:
    (tmp_path / ".a.kvmtrace-out-4194305").write_text("of a dead process")
    (tmp_path / f".a.kvmtrace-out-{os.getppid()}").write_text("of a living one")
    (tmp_path / ".ab.kvmtrace-out-4194305").write_text("of another file")
    write_whole(tmp_path / "a", data)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a", f".a.kvmtrace-out-{os.getppid()}", ".ab.kvmtrace-out-4194305"}


@pytest.mark.skipif(os.geteuid() != 0, reason="chown takes root")
def test_under_sudo_it_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "65534")
    monkeypatch.setenv("SUDO_GID", "65534")
    write_text(tmp_path / "a", "text")
    assert (tmp_path / "a").stat().st_uid == 65534


def test_killed_at_each_system_call(tmp_path: Path) -> None:
    """In small: link and rename, where a name exists that is not the user's."""
    program = "from pathlib import Path; from kvmtrace.cli.output import write_text; write_text(Path('o'), 'x')"
    for call in ("link", "linkat", "rename", "renameat", "fchown", "write", "unlink", "unlinkat"):
        for _ in range(2):  # killed, then the next command
            inject = ["strace", "-f", "-o", "/dev/null", "-e", f"inject={call}:signal=KILL:when=1"]
            subprocess.run([*inject, sys.executable, "-c", program], cwd=tmp_path, check=False, timeout=300)
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=300)
        assert [path.name for path in tmp_path.iterdir()] == ["o"], call
        (tmp_path / "o").unlink()


@pytest.mark.slow
def test_an_export_killed_at_each_system_call(tmp_path: Path) -> None:
    """The real command: the output is whole or not there, and nothing stands beside it after the next one."""
    source = Path(__file__).parents[2] / "fixtures" / "svm-6.1-lifecycle.dat"
    command = [sys.executable, "-m", "kvmtrace", "export", str(source), "-o", "o.csv"]
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    whole = (tmp_path / "o.csv").read_bytes()
    kills = kept = 0
    for call in ("openat", "write", "link", "linkat", "rename", "renameat", "fchown", "fchmod", "unlink", "unlinkat"):
        for number in range(1, 400):
            (tmp_path / "o.csv").unlink(missing_ok=True)
            inject = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={call}", "-P", str(tmp_path), "-e"]
            done = subprocess.run(
                [*inject, f"inject={call}:signal=KILL:when={number}", *command],
                cwd=tmp_path,
                stdout=subprocess.DEVNULL,
                check=False,
            )
            if done.returncode == 0:
                break
            kills += 1
            if (tmp_path / "o.csv").exists():
                kept += 1
                assert (tmp_path / "o.csv").read_bytes() == whole, (call, number)
            subprocess.run([*command, "--force"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
            assert [path.name for path in tmp_path.iterdir()] == ["o.csv"], (call, number)
    print(f"{kills} kills, {kept} left the whole output")
    assert kills > 3
