"""Ctrl-C and SIGTERM while a command imports: one line or nothing, and the exit code of an interrupt."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
PRESS = "import os, signal; os.kill(os.getpid(), signal.SIGINT)\n"
# as NumPy's C code and pandas do: what comes in between becomes another error, told on the way
STUBBORN = """
import os, signal, sys, traceback
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000): pass
except BaseException:
    traceback.print_exc()
    raise ImportError("cannot be imported") from None
"""
# as the locks of imports do: an interrupt in a finalizer is told and forgotten
FINALIZER = """
import os, signal
class Guard:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000): pass
Guard()
"""


def run(tmp_path: Path, name: str, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that imports a module of our own in place of another one."""
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "kvmtrace", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_before_the_command_is_known(tmp_path: Path) -> None:
    done = run(tmp_path, "click", PRESS, "doctor")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "kvmtrace: interrupted\n")


@pytest.mark.parametrize("source", [PRESS, STUBBORN, FINALIZER])
def test_in_an_import_of_a_command(source: str, tmp_path: Path) -> None:
    done = run(tmp_path, "numpy", source, "check", "x.dat")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "kvmtrace: interrupted\n")


def test_what_goes_on_for_long_is_interrupted_behind_the_import(tmp_path: Path) -> None:
    # an import that succeeds, then a command that would run on
    (tmp_path / "click_before.py").write_text(PRESS)
    code = "from kvmtrace.cli.ctrl_c import CtrlC\nwith CtrlC():\n import click_before, time; time.sleep(20)"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=15, check=False
    )
    assert "KeyboardInterrupt" in done.stderr
    assert "click_before.py" not in done.stderr


def test_terminated_in_an_import(tmp_path: Path) -> None:
    done = run(tmp_path, "numpy", PRESS.replace("SIGINT", "SIGTERM"), "check", "x.dat")
    assert (done.returncode, done.stdout, done.stderr) == (-15, "", "")


def test_an_ignored_one_stays_ignored(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text(PRESS + "raise ImportError('went on')\n")
    command = f"trap '' INT; exec {sys.executable} -m kvmtrace doctor"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert "went on" in done.stderr
