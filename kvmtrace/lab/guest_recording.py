"""Records bundled guests, or QEMU booting a small Linux, in a lab: one boot of the host for any number of them."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import TYPE_CHECKING

from kvmtrace.errors import CapabilityError, UsageError
from kvmtrace.lab.lab_run import LabResult, run_lab
from kvmtrace.lab.linux_guest import LINUX_GUEST
from kvmtrace.lab.run_folder import run_folder
from kvmtrace.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kvmtrace.lab.job import Job

LINUX = "linux"
# a line for each recording: its name, the recorder's exit code
_STATUS = "recorded.status"


@dataclass(frozen=True)
class LabRecording:
    """One recording to make in a lab.

    Parameters
    ----------
    guest : name of a bundled guest, or "linux"
    vcpus : of the Linux guest (bundled guests know theirs)
    count : argument of a bundled guest, None for its own
    events : event set of `kvmtrace record`
    backend : of `kvmtrace record`
    with_trace_cmd : also record with `trace-cmd record -e kvm` at the same time, to NAME.trace-cmd.dat
    """

    guest: str
    vcpus: int = 1
    count: int | None = None
    events: str = "lifecycle"
    backend: str = "ftrace"
    with_trace_cmd: bool = False

    @property
    def name(self) -> str:
        """File name without suffix: "lifecycle", "linux-2vcpu"."""
        return f"{LINUX}-{self.vcpus}vcpu" if self.guest == LINUX else self.guest

    def command(self) -> list[str]:
        """Return what runs in the lab; it writes NAME.dat."""
        record = ["kvmtrace", "record", "--backend", self.backend, "--events", self.events, "-o", f"{self.name}.dat"]
        if self.guest == LINUX:
            record += ["--", LINUX_GUEST, str(self.vcpus)]
        else:
            record += ["--guest", self.guest, *(["--count", str(self.count)] if self.count else [])]
        if self.with_trace_cmd:
            record = ["trace-cmd", "record", "-q", "-e", "kvm", "-o", f"{self.name}.trace-cmd.dat", *record]
        return record


def record_in_lab(
    recordings: Sequence[LabRecording], job: Job, *, stream: bool = False, phase: Callable[[str], object] = str
) -> LabResult:
    """Make recordings in one lab host; they end up as NAME.dat in `job.out`.

    Parameters
    ----------
    recordings : what to record, in this order
    job : where (ISA, kernel, limits); its command and directory are replaced

    Raises
    ------
    CapabilityError
        The lab could not run, or a recording failed; its message has what the recorder said.
    UsageError
        No such guest.
    """
    _validate(recordings, job.isa)
    assert job.out is not None, "a recording that is not brought back"
    lines = []
    for recording in recordings:
        lines += [shlex.join(recording.command()), f"echo {recording.name} $? >>{_STATUS}"]
    with run_folder("empty") as folder:
        (folder / "cwd").mkdir()
        script = ("sh", "-c", "\n".join(lines))
        result = run_lab(replace(job, command=script, cwd=folder / "cwd"), stream=stream, phase=phase)
    failed = _read_failures(job.out / _STATUS)
    if failed or result.status:
        said = (result.stdout + result.stderr).decode(errors="replace").strip().splitlines()[-8:]
        raise CapabilityError(f"recording {', '.join(failed) or 'guests'} in the lab failed: " + " | ".join(said))
    return result


def _validate(recordings: Sequence[LabRecording], isa: str) -> None:
    from kvmtrace.workload.machines import find_guest

    for recording in recordings:
        if recording.guest != LINUX:
            find_guest(recording.guest, isa)
    if not recordings:
        raise UsageError("nothing to record")


def _read_failures(path: Path) -> list[str]:
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    return [name for name, status in lines if status != "0"]
