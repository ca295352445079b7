"""The units are what systemd takes, and as closed as they can be; a service tells systemd and the journal its state."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvmtrace.cli.man_pages import pages
from kvmtrace.watch.service import NOTICE, Signals, notify, notify_reload, say

UNITS = Path(__file__).parents[2] / "docs" / "systemd"
NAMES = ("kvmtrace-watch.service", "kvmtrace-exporter.service")
EXPOSURE = 40  # tenths: "OK" is below 50; both need BPF, the watch writes to tracefs


@pytest.fixture(params=NAMES)
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a unit that runs this kvmtrace."""
    path = tmp_path / str(request.param)
    program = Path(sys.executable).with_name("kvmtrace")
    text = (UNITS / str(request.param)).read_text().replace("ExecStart=kvmtrace ", f"ExecStart={program} ")
    path.write_text(text.replace("Documentation=", "#"))  # the manual page is not installed here
    return path


def test_systemd_takes_the_unit(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if unit.name in line]
    assert not ours


def test_the_unit_is_closed(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", "--no-pager", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("name", NAMES)
def test_the_manual_page_is_there(name: str) -> None:
    text = (UNITS / name).read_text()
    page = name.removesuffix(".service")
    assert f"man:{page}(1)" in text
    assert f"{page}.1" in pages()


def test_options_of_the_units_exist(unit: Path) -> None:
    command = next(line for line in unit.read_text().splitlines() if line.startswith("ExecStart="))
    name = command.split()[1]
    done = subprocess.run(
        [sys.executable, "-m", "kvmtrace", name, "--help"], capture_output=True, text=True, check=True
    )
    for word in command.split():
        if word.startswith("--"):
            assert word in done.stdout


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("READY=1")
        notify_reload()
        assert listener.recv(100) == b"READY=1"
        assert listener.recv(100).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
    notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", "nonsense")
    notify("READY=1")


def test_the_journal_is_told_how_important_a_line_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    say("a\x1b[2Jb\nc")
    monkeypatch.setenv("JOURNAL_STREAM", "8:1234")
    say("saved", NOTICE)
    assert capsys.readouterr().err == "kvmtrace: a?[2Jb?c\n<5>kvmtrace: saved\n"


def test_signals_are_noted_and_given_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Signals(signal.SIGUSR1) as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        came = signals.take()
        assert set(came) == {signal.SIGUSR1, signal.SIGTERM}
        assert not signals.take()
    assert signal.getsignal(signal.SIGUSR1) == before
