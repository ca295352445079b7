"""The spool directory and the way from it to the file: private, complete, repeatable."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from pathlib import Path

import pytest

from kvmtrace.capture.ftrace import trace_dat_writer as tracedat
from kvmtrace.capture.ftrace.assemble import assemble, seal
from kvmtrace.capture.ftrace.trace_dat_writer import Tail
from kvmtrace.capture.recover import reclaim_file
from kvmtrace.capture.settings import META_MAGIC
from kvmtrace.capture.spool import PAGE_SIZE, Spool
from kvmtrace.errors import CapabilityError, UsageError

TAIL = Tail({7: "vcpu"}, {0: "entries: 0\n"}, "[mono]", "test")
META = {"schema": "kvmtrace.capture/1", "notes": []}


def pages(cpu: int, count: int, start: int = 0) -> bytes:
    return b"".join(struct.pack("<QQ", cpu * 1000 + start + i, 0).ljust(PAGE_SIZE, bytes([cpu])) for i in range(count))


def filled(output: Path) -> Spool:
    """Return a spool of three segments on two CPUs (one with a page torn by a kill)."""
    spool = Spool.create(output)
    spool.write_file("head", b"HEAD" * 100)
    spool.write_file("cpu0.0", pages(0, 200))
    spool.write_file("cpu0.2", pages(0, 3, 200))
    spool.write_file("cpu1.1", pages(1, 70) + b"torn")
    return spool


def read_back(path: Path) -> tuple[list[bytes], dict[str, object]]:
    """Return each CPU's data and the metadata, by the file's own table."""
    data = path.read_bytes()
    assert data.endswith(META_MAGIC)
    length = struct.unpack("<Q", data[-24:-16])[0]
    meta = json.loads(data[-24 - length : -24])
    at = data.index(b"flyrecord\0") + 10
    places = [struct.unpack_from("<QQ", data, at + 16 * cpu) for cpu in range(2)]
    assert all(offset % PAGE_SIZE == 0 for offset, _ in places)
    return [data[offset : offset + size] for offset, size in places], meta


def test_file_holds_every_whole_page_in_order(tmp_path: Path) -> None:
    spool = filled(tmp_path / "a.dat")
    seal(spool, TAIL, META)
    path = assemble(spool, "a.dat")
    spool.discard()
    cpus, meta = read_back(path)
    assert cpus == [pages(0, 203), pages(1, 70)]
    assert meta == META
    assert [p.name for p in tmp_path.iterdir()] == ["a.dat"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_assembly_killed_anywhere_leads_to_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracedat, "COPY_BYTES", 16 * PAGE_SIZE)
    real, kills = os.copy_file_range, 0

    class Killed(BaseException):
        pass

    for survived in range(40):
        spool = filled(tmp_path / "b.dat")
        seal(spool, TAIL, META)
        left = survived

        def copy(*args: int) -> int:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*args)

        monkeypatch.setattr(os, "copy_file_range", copy)
        try:
            assemble(spool, "b.dat")
        except Killed:
            kills += 1
        monkeypatch.setattr(os, "copy_file_range", real)
        if spool.segments():
            spool.close()  # what a kill does
            adopted = Spool.adopt(tmp_path / "b.dat", spool.path)
            assert adopted is not None
            assemble(adopted, "b.dat")
            adopted.discard()
        else:
            spool.discard()
        assert read_back(tmp_path / "b.dat")[0] == [pages(0, 203), pages(1, 70)]
    assert 15 < kills < 40  # every step was interrupted once, and some runs were not


def test_a_spool_in_use_is_not_adopted(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "c.dat")
    assert Spool.adopt(tmp_path / "c.dat", spool.path) is None
    assert reclaim_file(tmp_path / "c.dat") == []
    spool.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_sealed_spool_is_finished_by_the_next_command(tmp_path: Path) -> None:
    spool = filled(tmp_path / "d.dat")
    seal(spool, TAIL, META)
    spool.close()
    assert any(str(tmp_path / "d.dat") in line for line in reclaim_file(tmp_path / "d.dat"))
    assert read_back(tmp_path / "d.dat")[0] == [pages(0, 203), pages(1, 70)]
    assert [p.name for p in tmp_path.iterdir()] == ["d.dat"]


def test_recovery_spares_a_newer_file_of_that_name(tmp_path: Path) -> None:
    spool = filled(tmp_path / "e.dat")
    seal(spool, TAIL, META)
    spool.close()
    (tmp_path / "e.dat").write_text("made since")
    reclaim_file(tmp_path / "e.dat")
    assert (tmp_path / "e.dat").read_text() == "made since"
    other = next(p for p in tmp_path.iterdir() if p.name.startswith("e.dat.recovered-"))
    assert read_back(other)[0] == [pages(0, 203), pages(1, 70)]


def test_spool_is_private_and_the_old_file_stays_until_the_end(tmp_path: Path) -> None:
    output = tmp_path / "f.dat"
    output.write_text("old")
    spool = Spool.create(output)
    assert stat.S_IMODE(spool.path.stat().st_mode) == 0o700
    assert output.read_text() == "old"
    assert spool.release_reserve()
    assert not spool.release_reserve()
    spool.discard()
    assert output.read_text() == "old"


def test_a_planted_link_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    output = tmp_path / "g.dat"
    output.symlink_to(victim)
    spool = filled(output)
    seal(spool, TAIL, META)
    assemble(spool, "g.dat")
    spool.discard()
    assert victim.read_text() == "precious"
    assert not output.is_symlink()


def test_links_inside_the_spool_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    spool = Spool.create(tmp_path / "h.dat")
    (spool.path / "cpu0.0").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        spool.open_old("cpu0.0")
    with pytest.raises(FileExistsError):
        spool.open_new("cpu0.0")
    spool.discard()
    assert victim.read_text() == "precious"


def test_a_spool_of_somebody_else_is_not_trusted(tmp_path: Path) -> None:
    spool = filled(tmp_path / "i.dat")
    seal(spool, TAIL, META)
    spool.close()
    spool.path.chmod(0o755)  # as somebody's plant would be
    assert Spool.adopt(tmp_path / "i.dat", spool.path) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="chown takes root")
def test_the_file_gets_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_UID", "65534")
    monkeypatch.setenv("SUDO_GID", "65534")
    spool = filled(tmp_path / "j.dat")
    seal(spool, TAIL, META)
    path = assemble(spool, "j.dat")
    spool.discard()
    assert (path.stat().st_uid, path.stat().st_gid) == (65534, 65534)


@pytest.mark.parametrize(
    ("name", "why"),
    [("", "directory"), ("sub", "directory"), ("fifo", "not a regular file"), ("-", "not -")],
)
def test_outputs_that_cannot_be(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match=why):
        Spool.create(Path(name) if name == "-" else tmp_path / name)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="make it first"):
        Spool.create(tmp_path / "no" / "x.dat")


def test_device_as_output_is_refused() -> None:
    with pytest.raises(UsageError, match="not a regular file"):
        Spool.create(Path("/dev/null"))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_place_that_takes_no_files() -> None:
    with pytest.raises(CapabilityError, match="choose another place"):
        Spool.create(Path("/proc/kvmtrace.dat"))


def test_no_more_open_files_is_no_fault_of_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_more(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(Spool, "_reserve", no_more)
    with pytest.raises(CapabilityError, match="ulimit -n"):
        Spool.create(tmp_path / "x.dat")
    assert list(tmp_path.iterdir()) == []
