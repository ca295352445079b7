"""Finishing what killed recorders left: their files, their tracing instances, their probes.

`reclaim()` does it for the whole machine, when a command records or diagnoses; `reclaim_file()` for one file, when a
command reads it. What a dead recorder had not read yet is read now: its instance went on recording. Whatever is wrong
with one of them is told in a line and set aside: it stops neither the others nor the command.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvmtrace.capture.manifest import DamagedSpoolError
from kvmtrace.capture.recorders import Registration, dead_recorders, lock_entry, registered

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmtrace.capture.spool import Spool

# what may be better next time: the spool stays where it is
TEMPORARY = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)
WAIT_S = 30.0  # for another command that is finishing the same file


def reclaim() -> list[str]:
    """Remove what dead recorders left in the kernel and turn their spools into files.

    Returns
    -------
    list of str, one line for people per thing done or impossible
    """
    from kvmtrace.capture.ftrace.take_over import remove_orphans

    said = []
    for entry in dead_recorders():
        said += _reclaim_entry(entry)
    try:
        said += remove_orphans()
    except OSError as error:
        said.append(f"cannot look for what dead recorders left in the kernel: {error.strerror}")
    return said


def reclaim_file(output: Path) -> list[str]:
    """Finish what killed recorders left of one file; waits for another command that is doing so.

    Parameters
    ----------
    output : Path as the user gave it

    Returns
    -------
    list of str, one line for people per thing done or impossible
    """
    said = []
    deadline = time.monotonic() + WAIT_S
    while True:
        busy = False
        for path in spools_of(output):
            if _owner(path) in registered():
                entry = lock_entry(_owner(path))
                said += [] if entry is None else _reclaim_entry(entry)
                busy |= entry is None
            else:
                said += _reclaim_beside(output, path)
                busy |= path.exists()
            busy &= not _alive(path)
        if not busy or time.monotonic() > deadline:
            return [line for line in said if line]
        time.sleep(0.02)


def spools_of(output: Path) -> list[Path]:
    """Return the spools that wait beside a file, of recorders dead or alive."""
    prefix = f".{output.name}.kvmtrace-"
    try:
        return sorted(path for path in output.parent.iterdir() if path.name.startswith(prefix))
    except OSError:
        return []


def _owner(spool: Path) -> str:
    """Return the PID-TOKEN of a spool's name."""
    return spool.name.rpartition(".kvmtrace-")[2]


def _alive(spool: Path) -> bool:
    """Say whether the recorder of a spool lives, as far as its process id tells."""
    pid = _owner(spool).partition("-")[0]
    return not pid.isdigit() or Path("/proc", pid).exists()


def _reclaim_entry(entry: Registration) -> list[str]:
    """Reclaim one registered recorder; the entry stays if it may work next time."""
    from kvmtrace.capture.ftrace.take_over import free_tracing, take_over

    values = entry.read()
    output, path = values.get("output"), values.get("spool")
    name = entry.path.stem
    if not isinstance(output, str) or not isinstance(path, str):
        free_tracing(name)
        entry.remove()
        return []

    def finish() -> list[str]:
        spool = _adopt(Path(output), Path(path))
        try:
            if spool is None:
                return []
            take_over(name, spool)
            return finish_spool(spool)
        finally:
            if spool is not None:
                spool.close()

    said, is_over = _try(finish, Path(output), Path(path))
    if is_over:
        free_tracing(name)
        entry.remove()
    else:
        entry.close()
    return said


def _reclaim_beside(output: Path, path: Path) -> list[str]:
    """Finish a spool whose recorder is dead and has no entry."""

    def finish() -> list[str]:
        spool = _adopt(output, path)
        if spool is None:
            return [_why_not(output, path)]
        try:
            if not spool.manifest and _alive(path):  # it has just been made
                return []
            return finish_spool(spool)
        finally:
            spool.close()

    return _try(finish, output, path)[0]


def _adopt(output: Path, path: Path) -> Spool | None:
    from kvmtrace.capture.spool import Spool

    return Spool.adopt(output, path)


def _try(finish: Callable[[], list[str]], output: Path, path: Path) -> tuple[list[str], bool]:
    """Finish a spool, or set it aside; return what to say, and whether nothing is left to be done."""
    try:
        return finish(), True
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in TEMPORARY:
            return [f"cannot finish the interrupted recording {output} now: {why}"], False
    except DamagedSpoolError as error:
        why = str(error)
    except Exception as error:  # noqa: BLE001 (a spool of another version, or damaged: it shall stop nobody)
        why = f"{type(error).__name__}: {error}"
    return [_set_aside(output, path, why)], True


def _set_aside(output: Path, path: Path, why: str) -> str:
    from kvmtrace.capture.spool import set_aside

    text = f"cannot finish the interrupted recording {output}: {why}"
    try:
        return f"{text}; what there is of it was moved to {set_aside(output, path)}"
    except OSError:
        return f"{text}; what there is of it lies in {path}"


def finish_spool(spool: Spool) -> list[str]:
    """Turn a spool into its file, or discard it if it holds nothing."""
    from kvmtrace.capture.ftrace.assemble import OUT, assemble
    from kvmtrace.capture.ftrace.take_over import seal_without_instance

    if spool.manifest.get("state") == "recording":
        seal_without_instance(spool)
    state = spool.manifest.get("state")
    if state is None or spool.was_published(OUT):  # it never began, or was through but for this
        spool.discard()
        return []
    name = _free_name(spool)
    # a bpf capture is readable as it stands
    path = spool.publish(OUT, name) if state == "complete" else assemble(spool, name)
    spool.discard()
    return [f"finished the recording of a killed recorder: {path}"]


def _free_name(spool: Spool) -> str:
    """Return the output's name, or a new one if somebody made a file of that name since."""
    name = spool.output.name
    try:
        there = os.stat(name, dir_fd=spool.parent_fd, follow_symlinks=False)
    except FileNotFoundError:
        return name
    if there.st_mtime_ns < spool.manifest["created_ns"]:
        return name
    return f"{name}.recovered-{spool.path.name.rpartition('-')[2]}"


def _why_not(output: Path, path: Path) -> str:
    """Say why a spool is left alone; "" if its recorder still lives or it is gone."""
    try:
        owner = path.lstat().st_uid
    except OSError:
        return ""
    if owner == os.geteuid():
        return ""
    return f"an interrupted recording waits beside {output}; finish it with: sudo kvmtrace doctor"
