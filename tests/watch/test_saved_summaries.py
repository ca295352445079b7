"""`watch --summaries`: what was saved is summarised beside the watch; what cannot be is told."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.fleet.reduce import Fleet
from kvmtrace.watch import saved_summaries
from kvmtrace.watch.saved_summaries import SavedSummaries

if TYPE_CHECKING:
    import pytest

RECORDING = Path(__file__).parents[2] / "fixtures" / "svm-6.1-lifecycle.dat"


def test_each_is_summarised_and_what_fails_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_summaries, "LAST_S", 300)
    damaged = tmp_path / "damaged.dat"
    damaged.write_bytes(b"no recording")
    summaries = SavedSummaries(str(tmp_path / "dest"))
    summaries.add(damaged)
    summaries.add(RECORDING)
    summaries.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"kvmtrace: {damaged} was not summarised: why is in {tmp_path / 'dest'}"
    with Fleet(str(tmp_path / "dest")) as fleet:
        assert fleet.sql("SELECT source FROM recordings").source.tolist() == [str(RECORDING)]
        assert fleet.sql("SELECT kind FROM failures").kind.tolist() == ["FormatError"]


def test_the_watch_does_not_wait_for_ever(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_summaries, "COMMAND", ("sh", "-c", "sleep 60"))
    monkeypatch.setattr(saved_summaries, "LAST_S", 0.1)
    summaries = SavedSummaries(str(tmp_path))
    summaries.add(RECORDING)
    summaries.add(RECORDING)
    began = time.monotonic()
    summaries.close()
    assert time.monotonic() - began < 10
    assert "it took too long" in capfd.readouterr().err
