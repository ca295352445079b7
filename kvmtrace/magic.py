"""The IPython magic: `%load_ext kvmtrace`, then `%%kvmtrace` records the cell's shell command."""

from __future__ import annotations

import atexit
import functools
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from kvmtrace.api import LoadedRecording, load
from kvmtrace.errors import CapabilityError
from kvmtrace.scratch import ScratchFolder, remove_dead


def record_cell(line: str, cell: str | None = None) -> LoadedRecording:
    """Record a cell's command; the line holds options of `kvmtrace record`.

    `%kvmtrace --guest lifecycle`, or `%%kvmtrace` with an empty cell, records a bundled guest.

    Returns
    -------
    LoadedRecording; the file is `-o FILE` of the line, or a temporary one

    Raises
    ------
    CapabilityError
        The recorder failed; its message is shown.
    """
    options = shlex.split(line)
    if "-o" in options:
        path = Path(options[options.index("-o") + 1])
    else:
        path = Path(tempfile.mkdtemp(prefix="cell-", dir=session_folder())) / "cell.dat"
        options += ["-o", str(path)]
    command = ["--", "/bin/sh", "-c", cell] if cell and cell.strip() else []
    done = subprocess.run(
        [sys.executable, "-m", "kvmtrace", "record", *options, *command], capture_output=True, text=True, check=False
    )
    if not done.returncode:
        print(done.stdout + done.stderr, end="")  # the recorder speaks on standard error
    else:
        raise CapabilityError(done.stderr.strip().removeprefix("kvmtrace: ") or "kvmtrace record failed")
    return load(path)


def _without_cell(lines: list[str]) -> list[str]:
    """Turn `%%kvmtrace OPTIONS` without anything below it into the line magic: IPython refuses an empty cell."""
    if lines and lines[0].startswith("%%kvmtrace") and not "".join(lines[1:]).strip():
        return [lines[0][1:]]
    return lines


@functools.cache
def session_folder() -> Path:
    """Return this process's folder for recordings without a name; it goes with the process."""
    remove_dead()
    folder = ScratchFolder("cells")
    atexit.register(folder.close)
    return folder.path


def load_ipython_extension(ipython: Any) -> None:
    """Register the magic, of a cell and of a line."""
    ipython.register_magic_function(record_cell, magic_kind="line_cell", magic_name="kvmtrace")
    ipython.input_transformers_cleanup.append(_without_cell)
