"""Manual pages say what --help says, and are sound roff."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

from kvmtrace.cli.main import COMMANDS
from kvmtrace.cli.man_pages import pages

if TYPE_CHECKING:
    from pathlib import Path


def test_there_is_a_page_for_each_command() -> None:
    found = pages()
    assert all("\\fB\\-h, \\-\\-help" in page for page in found.values())
    assert {"kvmtrace.1", *(f"kvmtrace-{name}.1" for name in COMMANDS)} <= set(found)
    assert "kvmtrace-lab-run.1" in found
    assert "\\-\\-exit\\-reason" in found["kvmtrace-record.1"]
    assert "\n.SH EXIT CODES\n" in found["kvmtrace.1"]
    for name, text in found.items():
        assert ".SH NAME" in text, name
        assert ".SH EXAMPLE" in text, name
        assert all(re.match(r"\.(TH|SH|PP|TP|nf|fi)\b", line) for line in text.splitlines() if line.startswith(".")), (
            name
        )


def test_it_writes_them(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "kvmtrace.cli.man_pages", str(tmp_path)], check=True)
    assert {path.name for path in tmp_path.iterdir()} == set(pages())


def test_a_page_renders(tmp_path: Path) -> None:
    (tmp_path / "record.1").write_text(pages()["kvmtrace-record.1"])
    command = ["groff", "-man", "-Tascii", "-ww", str(tmp_path / "record.1")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--max-size" in done.stdout
    assert done.stderr == ""
