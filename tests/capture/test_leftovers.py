"""What dead recorders left: whatever is wrong with it is told in a line and stops nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from kvmtrace.capture import recorders
from kvmtrace.capture.ftrace.assemble import assemble, seal
from kvmtrace.capture.ftrace.trace_dat_writer import Tail
from kvmtrace.capture.invoking_user import invoking_user
from kvmtrace.capture.manifest import DamagedSpoolError, read_manifest
from kvmtrace.capture.recorders import Registration
from kvmtrace.capture.recover import reclaim, reclaim_file
from kvmtrace.capture.spool import Spool
from kvmtrace.cli.interrupted import finish_interrupted
from kvmtrace.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

META = {"schema": "kvmtrace.capture/1", "notes": []}
WHOLE = {"created_ns": 1, "owner": None, "state": "sealed", "places": {}, "end": 4}
RECORDING_META = {"target": {"pids": []}, "notes": [], "events": [], "clock": "mono", "kvmtrace": "1"}


@pytest.fixture(autouse=True)
def _own_registry(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorders, "RUN_DIR", tmp_path_factory.mktemp("run") / "kvmtrace")
    # trace instances are the machine's: another test may have killed its recorder
    monkeypatch.setattr("kvmtrace.capture.ftrace.take_over.remove_orphans", list)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "5",
        "null",
        '"recording"',
        "[" * 100_000,
        "\xff",
        json.dumps({"state": "recording"}),
        json.dumps(WHOLE | {"state": "else"}),
        json.dumps(WHOLE | {"owner": [99999999999999, 1]}),
        json.dumps(WHOLE | {"owner": [0xFFFFFFFF, 0]}),
        json.dumps(WHOLE | {"owner": ["1", "1"]}),
        json.dumps(WHOLE | {"created_ns": None}),
        json.dumps(WHOLE | {"places": ["cpu0.0"]}),
        json.dumps(WHOLE | {"end": -1}),
        json.dumps(WHOLE | {"skips": {"cpu0.0": "x"}}),
        json.dumps(WHOLE | {"state": "recording", "meta": RECORDING_META | {"clock": 7}}),
    ],
)
def test_damaged_manifests_are_told_and_set_aside(text: str, tmp_path: Path) -> None:
    with pytest.raises(DamagedSpoolError):
        read_manifest(text.encode("latin-1"))
    spool = Spool.create(tmp_path / "a.dat")
    spool.close()
    (spool.path / "manifest.json").write_bytes(text.encode("latin-1"))
    lines = reclaim()  # by its entry
    assert len(lines) == 1
    assert "a.dat: its manifest is damaged" in lines[0]
    aside = [path for path in tmp_path.iterdir() if path.name.startswith("a.dat.unfinished-")]
    assert [str(path) for path in aside] == [lines[0].rpartition(" ")[2]]
    assert reclaim() == []
    assert reclaim_file(tmp_path / "a.dat") == []


def test_whole_manifests_are_taken() -> None:
    assert read_manifest(b"") == {}
    assert read_manifest(json.dumps(WHOLE).encode()) == WHOLE
    assert read_manifest(json.dumps({"created_ns": 1, "owner": [65534, 65534]}).encode())
    assert read_manifest(json.dumps(WHOLE | {"state": "recording", "meta": RECORDING_META}).encode())


def interrupted(output: Path) -> Spool:
    spool = Spool.create(output)
    spool.write_file("head", b"HEAD")
    seal(spool, Tail({}, {}, "[mono]", "test"), META)
    spool.close()
    return spool


def test_a_bad_neighbour_stops_nobody(tmp_path: Path) -> None:
    bad, good = interrupted(tmp_path / "bad.dat"), interrupted(tmp_path / "good.dat")
    (bad.path / "header").unlink()
    lines = reclaim()
    assert good.output.exists()
    assert any("cannot finish the interrupted recording" in line and "bad.dat" in line for line in lines)
    assert any("finished the recording" in line and "good.dat" in line for line in lines)
    assert reclaim() == []


def test_damaged_entries_are_removed(tmp_path: Path) -> None:
    spool = interrupted(tmp_path / "a.dat")
    for path in recorders.RUN_DIR.iterdir():
        path.write_text('{"output": 7}')
    assert reclaim() == []
    assert not recorders.RUN_DIR.exists()
    assert reclaim_file(spool.output) == [f"finished the recording of a killed recorder: {spool.output}"]


def adopted(output: Path) -> Spool:
    spool = Spool.adopt(output, interrupted(output).path)
    assert spool is not None
    return spool


@pytest.mark.parametrize("state", ["sealed", "complete"])
def test_what_was_published_is_not_finished_again(state: str, tmp_path: Path) -> None:
    spool = adopted(tmp_path / "a.dat")
    if state == "sealed":
        assemble(spool, "a.dat")
    else:
        spool.write_file("out", b"whole")
        spool.save({"state": state})
        spool.publish("out", "a.dat")
    whole = spool.output.read_bytes()
    spool.close()  # killed before it was through with the rest
    assert reclaim() == []
    assert [path.name for path in tmp_path.iterdir()] == ["a.dat"]
    assert spool.output.read_bytes() == whole


def test_killed_before_the_file_had_its_name(tmp_path: Path) -> None:
    spool = adopted(tmp_path / "a.dat")
    spool.write_file("out", b"whole")
    spool.save({"state": "complete", "publishing": True})
    spool.close()
    assert reclaim() == [f"finished the recording of a killed recorder: {spool.output}"]
    assert spool.output.read_bytes() == b"whole"


def test_a_full_disk_leaves_the_spool_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = interrupted(tmp_path / "a.dat")

    def full(*_: Any) -> Path:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "publish", full)
        assert reclaim() == [f"cannot finish the interrupted recording {spool.output} now: No space left on device"]
    assert spool.path.is_dir()
    assert len(reclaim()) == 1
    assert spool.output.exists()


def test_reading_another_file_says_and_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spool = interrupted(tmp_path / "theirs.dat")
    finish_interrupted([str(tmp_path / "mine.dat")])
    assert capsys.readouterr().err == ""
    assert spool.path.is_dir()
    finish_interrupted([str(tmp_path / "theirs.dat")])
    assert "finished the recording" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.dat"]


def test_an_entry_leaves_nothing_behind(tmp_path: Path) -> None:
    spool = Spool.create(tmp_path / "a.dat")
    assert [path.suffix for path in recorders.RUN_DIR.iterdir()] == [".json"]
    spool.discard()
    assert not recorders.RUN_DIR.exists()
    assert list(tmp_path.iterdir()) == []


def test_an_entry_without_unnamed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # EISDIR, as file systems say that cannot do it
    entry = Registration.create("ab", {"output": "x"})
    assert entry is not None
    assert entry.read() == {"output": "x"}
    left = recorders.RUN_DIR / "1-cd.new"
    left.touch()
    assert recorders.dead_recorders() == []
    assert left.exists()  # perhaps somebody is about to rename it
    os.utime(left, (1, 1))
    assert recorders.dead_recorders() == []
    assert not left.exists()
    entry.remove()


def test_two_commands_that_finish_one_file_agree(tmp_path: Path) -> None:
    output = tmp_path / "a.dat"
    spool = Spool.create(output, "ab")
    spool.write_file("head", b"HEAD")
    spool.write_file("cpu0.0", bytes(4096) * 5000)
    seal(spool, Tail({}, {}, "[mono]", "test"), META)
    spool.close()
    for entry in recorders.dead_recorders():
        entry.remove()
    renamed = spool.path.with_name(".a.dat.kvmtrace-4194305-ab")  # of a process that is gone
    spool.path.rename(renamed)
    code = (
        "import sys; from pathlib import Path; from kvmtrace.capture.recover import reclaim_file\n"
        "sys.stdin.readline(); reclaim_file(Path(sys.argv[1])); sys.exit(not Path(sys.argv[1]).exists())"
    )
    finishers = [
        subprocess.Popen([sys.executable, "-c", code, str(output)], stdin=subprocess.PIPE, text=True) for _ in range(4)
    ]
    for finisher in finishers:
        assert finisher.stdin is not None
        finisher.stdin.write("go\n")
        finisher.stdin.flush()
    assert [finisher.wait(timeout=300) for finisher in finishers] == [0, 0, 0, 0]
    for finisher in finishers:
        assert finisher.stdin is not None
        finisher.stdin.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.dat"]


def test_a_renamed_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    spool = Spool.create(tmp_path / "old" / "a.dat")
    spool.write_file("out", b"data")
    (tmp_path / "old").rename(tmp_path / "new")
    assert spool.where().parent == tmp_path / "new"
    assert spool.publish("out", "a.dat") == tmp_path / "new" / "a.dat"
    spool.discard()


def test_a_deleted_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    spool = Spool.create(tmp_path / "gone" / "a.dat")
    for path in spool.path.iterdir():
        path.unlink()
    spool.path.rmdir()
    (tmp_path / "gone").rmdir()
    assert spool.gone()
    assert "deleted during the recording" in str(spool.why_unpublished(FileNotFoundError(2, "no")))
    spool.discard()


@pytest.mark.skipif(os.geteuid() != 0, reason="sudo's variables count for root only")
@pytest.mark.parametrize(
    ("uid", "gid"),
    [("99999999999999", "1"), ("4294967295", "4294967295"), ("1", "4294967295"), ("-1", "0"), ("x", "1"), ("1", "")],
)
def test_impossible_users_are_refused_at_the_start(uid: str, gid: str, tmp_path: Path) -> None:
    environment = os.environ | {"SUDO_UID": uid, "SUDO_GID": gid}
    done = subprocess.run(
        [sys.executable, "-m", "kvmtrace", "record", "-o", str(tmp_path / "x.dat"), "--", "id"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "not a user's and a group's id" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_largest_user_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("SUDO_UID", "4294967294")
    monkeypatch.setenv("SUDO_GID", "4294967294")
    assert invoking_user() == (4294967294, 4294967294)
    monkeypatch.setenv("SUDO_UID", "4294967295")
    with pytest.raises(UsageError):
        invoking_user()
