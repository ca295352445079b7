"""The trigger `model`: parts are checked one after the other, and the part before is there for whoever needs it."""

from __future__ import annotations

import io
import json
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvmtrace.watch import model_trigger
from kvmtrace.watch.model_trigger import ModelTrigger
from kvmtrace.watch.saved_files import NAME, RateLimit
from kvmtrace.watch.triggers import parse_trigger

if TYPE_CHECKING:
    from pathlib import Path

VIOLATION = {"model": {"violations": [{"severity": "violation", "vm": "web-3"}]}}


class Process:
    """A check that has ended, or has not (None)."""

    def __init__(self, returncode: int | None) -> None:
        self.returncode = returncode

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.returncode = -9

    def wait(self) -> None:
        pass


class Asked:
    """A ModelTrigger whose parts are texts, and whose checks say what they are told to."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cleared, self.saved = folder, 0, 0
        self.answers: list[int | None] = []
        monkeypatch.setattr(model_trigger, "save", self.save)
        monkeypatch.setattr(model_trigger, "start_check", self.start)
        model = ModelTrigger.of([parse_trigger("model")], 0.0, folder)
        assert model is not None
        self.model = model

    def save(self, rings: Any, ring: Any, path: Path, wanted: Any) -> tuple[Path, dict[str, Any]]:
        assert wanted.whole
        self.saved += 1
        path.write_text(f"part {self.saved}")
        return path, {}

    def start(self, path: Path, fired: Any) -> Any:
        process: Any = Process(self.answers.pop(0))
        said = io.BytesIO(json.dumps(VIOLATION).encode())
        return model_trigger._Check(path, fired, process, said, time.monotonic() + 100)

    def clear(self) -> None:
        self.cleared += 1

    def part(self, answer: int | None) -> Path | None:
        """Save a part and look at what its check says."""
        self.answers.append(answer)
        rings: Any = SimpleNamespace(swap=lambda: self)
        self.model.begin(rings, [])
        return self.model.look()

    def found(self) -> dict[str, str]:
        """Return what lies in the folder."""
        return {path.name: path.read_text() for path in self.folder.iterdir()}

    def recordings(self) -> dict[str, str]:
        return {name: text for name, text in self.found().items() if NAME.match(name)}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    return Asked(tmp_path, monkeypatch)


def test_parts_that_conform_go_and_the_last_one_waits(asked: Asked) -> None:
    for _ in range(5):
        assert asked.part(0) is None
        assert len(asked.found()) <= 2
    assert not asked.recordings()
    assert asked.cleared == 5
    asked.model.close()
    assert not asked.found()


def test_a_violation_is_kept_with_the_part_before_it(asked: Asked) -> None:
    asked.part(0)
    asked.part(0)
    path = asked.part(1)
    assert path is not None
    assert "-web-3-model.dat" in path.name
    assert asked.recordings() == {path.name: "part 3", f"{path.stem}-before.dat": "part 2"}
    asked.model.close()
    assert set(asked.found()) == set(asked.recordings())


def test_another_recording_is_given_the_part_that_ends_where_it_begins(asked: Asked) -> None:
    assert asked.model.give_part("kvmtrace-x.dat") is None
    asked.part(0)
    asked.part(0)
    name = asked.model.give_part("kvmtrace-x.dat")
    assert name == "kvmtrace-x-before.dat"
    assert (asked.folder / name).read_text() == "part 2"
    asked.model.break_off()
    assert set(asked.found()) == {name}, "the next recording begins elsewhere"
    assert asked.model.give_part("kvmtrace-y.dat") is None


def test_a_check_goes_on_while_another_recording_is_saved(asked: Asked) -> None:
    asked.part(0)
    assert asked.part(None) is None
    assert not asked.model.is_due()
    asked.model.break_off()
    check: Any = asked.model._check
    check.process.returncode = 1
    path = asked.model.look()
    assert path is not None
    assert asked.found() == {path.name: "part 2"}


@pytest.mark.parametrize("answer", [2, 4, 70, -9])
def test_a_check_that_fails_is_told(answer: int, asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked.part(answer) is None
    assert "the model was not asked" in capsys.readouterr().err
    assert not asked.recordings()


def test_a_part_without_vms_is_no_matter(asked: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked.part(3) is None
    assert not capsys.readouterr().err


def test_what_a_killed_one_left_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".kvmtrace-part-4194305-1.dat").write_text("of a process that is gone")
    (tmp_path / ".kvmtrace-part-1-1.dat").write_text("of one that lives")
    Asked(tmp_path, monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == [".kvmtrace-part-1-1.dat"]


def test_asking_the_limit_counts_nothing() -> None:
    limit = RateLimit(1, 1000.0)
    assert limit.is_free()
    limit.note()
    assert not limit.is_free()
    assert not limit.suppressed
