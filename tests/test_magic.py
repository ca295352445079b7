"""`%%kvmtrace` records a cell's command, or a bundled guest, and returns the loaded recording."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

import pytest

import kvmtrace
from kvmtrace.errors import CapabilityError
from kvmtrace.magic import load_ipython_extension, record_cell, session_folder

if TYPE_CHECKING:
    from pathlib import Path


class Shell:
    """What IPython offers an extension."""

    def __init__(self) -> None:
        self.magics: dict[str, object] = {}
        self.input_transformers_cleanup: list[object] = []

    def register_magic_function(self, function: object, magic_kind: str, magic_name: str) -> None:
        self.magics[f"{magic_kind} {magic_name}"] = function


def test_the_extension_registers_the_cell_magic() -> None:
    shell = Shell()
    load_ipython_extension(shell)
    assert shell.magics == {"line_cell kvmtrace": record_cell}
    assert kvmtrace.load_ipython_extension is load_ipython_extension


@pytest.mark.kvm
def test_an_empty_cell_records_a_guest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rec = record_cell(f"--backend ftrace --guest lifecycle -o {tmp_path / 'x.dat'}", "\n")
    assert (rec.userspace_exits["name"] == "KVM_EXIT_HLT").sum() == 5
    assert rec.replay().conforms
    assert "recorded" in capsys.readouterr().out


@pytest.mark.kvm
def test_a_cell_is_a_shell_command(tmp_path: Path) -> None:
    rec = record_cell(f"--backend ftrace -o {tmp_path / 'x.dat'}", "echo one > /dev/null\ntrue\n")
    assert len(rec.table) > 0
    assert not len(rec.userspace_exits)


def test_what_goes_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="no guest"):
        record_cell(f"--backend ftrace --guest nonsense -o {tmp_path / 'x.dat'}", "")


@pytest.mark.parametrize("cell", ["%%kvmtrace", "%%kvmtrace\n", "%kvmtrace"])
def test_ipython_takes_an_empty_cell(cell: str) -> None:
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell()
    load_ipython_extension(shell)
    done = shell.run_cell(cell.replace("kvmtrace", "kvmtrace --guest nonsense"))
    assert isinstance(done.error_in_exec, CapabilityError), "the recorder, not IPython, has the last word"
    assert "no guest" in str(done.error_in_exec)


def test_a_session_has_a_folder_and_those_of_dead_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    session_folder.cache_clear()
    dead = tmp_path / "kvmtrace-cells.ab"
    dead.mkdir()
    mine = session_folder()
    assert session_folder() == mine
    assert list(tmp_path.iterdir()) == [mine]
    session_folder.cache_clear()
