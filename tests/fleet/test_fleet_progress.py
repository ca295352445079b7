"""What `fleet summarize` says while it works and at its end, without worker processes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner

from kvmtrace.cli.fleet import _shower
from kvmtrace.cli.main import cli
from kvmtrace.fleet.summarizing import MADE, Progress

if TYPE_CHECKING:
    import pytest

RECORDING = Path(__file__).parents[2] / "fixtures" / "svm-6.1-lifecycle.dat"


def test_rate_and_remaining_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    show = _shower()
    progress = Progress(4_000, began=time.monotonic() - 10)
    assert progress.remaining_s() is None
    progress.counts[MADE] = 1_000
    show(progress)
    assert capsys.readouterr().err == "\r\x1b[K1,000 of 4,000 recordings, 100.0/s, 30 s left"
    show(progress)
    assert capsys.readouterr().err == "", "no more than five times a second"
    progress.counts[MADE] = 4_000
    show(progress)
    assert capsys.readouterr().err == "\r\x1b[K4,000 of 4,000 recordings, 400.0/s\n"


def test_strict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def here(engine: Any, task: Any, arguments: list[str], done: Any) -> None:
        for argument in arguments:
            done(argument, task(argument))

    monkeypatch.setattr("kvmtrace.fleet.summarizing.run_tasks", here)
    command = ["fleet", "summarize", str(RECORDING), str(tmp_path / "absent.dat"), "-o", str(tmp_path / "dest")]
    for strict, code in (([], 0), (["--strict"], 3)):
        done = CliRunner().invoke(cli, [*command, *strict])
        assert done.exit_code == code
        assert done.output.endswith(", 1 failed\n")
