"""The recorded processes: started behind a gate, or found running. Shared by both back ends.

A started target exists before it runs: the recorder first traces its pid, then calls `release()`.

    with Target(spec) as target:
        trace(target.tids())
        target.release()
        wait_for(target.pidfd, ...)      # readable once the target has ended
    target.status, target.guest_run
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pwd
import select
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kvmtrace.capture.invoking_user import invoking_user
from kvmtrace.capture.pid_namespace import require_initial
from kvmtrace.errors import CapabilityError, UsageError

if TYPE_CHECKING:
    from types import TracebackType

    from kvmtrace.capture.settings import TargetSpec

STOP_GRACE_S = 3.0  # between SIGTERM and SIGKILL of a target that we started
PR_SET_PDEATHSIG = 1  # include/uapi/linux/prctl.h


class Target:
    """The process (with all its threads, children included) whose events are recorded.

    Parameters
    ----------
    spec : TargetSpec

    Attributes
    ----------
    pid : int or None (whole machine)
    pidfd : int or None, readable once the process has ended
    status : int or None, exit status of a started process, -N if signal N killed it
    guest_run : dict or None, what the bundled VMM said at its end (schema kvmtrace.guest_run/1)

    Raises
    ------
    UsageError
        No such process, command or guest.
    CapabilityError
        Processes cannot be told by their ids here.
    """

    def __init__(self, spec: TargetSpec) -> None:
        self.spec = spec
        self.pid: int | None = None
        self.pidfd: int | None = None
        self.status: int | None = None
        self.guest_run: dict[str, Any] | None = None
        self._gate: int | None = None  # a byte written here lets the started process run
        self._exec_error: int | None = None
        self._json: int | None = None
        self._started = spec.kind in ("guest", "command")
        if spec.kind != "all":
            require_initial("recording a target", "-a, the whole machine,")
        if spec.kind == "guest":
            self._start_guest()
        elif spec.kind == "command":
            self._start_command()
        elif spec.kind == "pid":
            self.pid = _process_of(spec.pid)
        if self.pid is not None:
            self.pidfd = os.pidfd_open(self.pid)

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def tids(self) -> list[int]:
        """Return the thread ids to trace now; [] for the whole machine or a process that has ended."""
        if self.pid is None:
            return []
        try:
            return sorted(int(path.name) for path in Path(f"/proc/{self.pid}/task").iterdir())
        except FileNotFoundError:
            return []

    def release(self) -> None:
        """Let a started target run; does nothing for others.

        Raises
        ------
        UsageError
            The command could not be executed.
        """
        if self._gate is None:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self._gate, b"G")
        os.close(self._gate)
        self._gate = None
        if self._exec_error is not None:
            code = os.read(self._exec_error, 16)  # end of file once exec succeeded
            os.close(self._exec_error)
            self._exec_error = None
            if code:
                raise UsageError(f"cannot run {self.spec.command[0]}: {os.strerror(int(code))}")

    def ended(self) -> bool:
        """Say whether the process has ended; reaps it if it was started here."""
        if self.pid is None or self.pidfd is None or self.status is not None:
            return self.status is not None
        if not select.select([self.pidfd], [], [], 0)[0]:
            return False
        if self._started:
            if self.spec.output is not None:  # not yet reaped: the number of its process group is still its own
                self._signal_group(signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
        return True

    def stop(self) -> None:
        """End a target that was started here: SIGTERM, and SIGKILL if it ignores that."""
        if not self._started or self.pid is None or self.pidfd is None or self.ended():
            return
        for number, patience in ((signal.SIGTERM, STOP_GRACE_S), (signal.SIGKILL, None)):
            for one in (number, signal.SIGCONT):
                if self.spec.output is not None:
                    self._signal_group(one)
                signal.pidfd_send_signal(self.pidfd, one)
            select.select([self.pidfd], [], [], patience)
            if self.ended():
                return

    def _signal_group(self, number: signal.Signals) -> None:
        """Signal what runs in the process group of a target that has its own."""
        assert self.pid is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all of it has ended
            os.killpg(self.pid, number)

    def close(self) -> None:
        """End a started target, collect what the guest said and close all descriptors."""
        for fd in (self._gate, self._exec_error):
            if fd is not None:
                os.close(fd)  # an unreleased child sees the end of file and ends by itself
        self._gate = self._exec_error = None
        self.stop()
        if self._json is not None:
            self.guest_run = _read_json(self._json)
            os.close(self._json)
            self._json = None
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None

    def _start_guest(self) -> None:
        """Start `python -m kvmtrace.workload` and wait until it is ready."""
        name = self.spec.guest
        assert name is not None
        ready_read, ready_write = os.pipe()
        gate_read, self._gate = os.pipe()
        self._json = os.memfd_create("guest_run")  # a file, not a pipe: the guest can never block on it
        argv = [
            sys.executable,
            "-P",
            "-m",
            "kvmtrace.workload",
            name,
            *self.spec.guest_arguments,
            "--ready-fd",
            str(ready_write),
            "--go-fd",
            str(gate_read),
            "--json-fd",
            str(self._json),
        ]
        self.pid = os.fork()
        if self.pid == 0:
            _exec_guest(argv, (ready_write, gate_read, self._json))
        os.close(ready_write)
        os.close(gate_read)
        ready = os.read(ready_read, 1)
        os.close(ready_read)
        if ready:
            return
        _, status = os.waitpid(self.pid, 0)
        self._refuse(os.waitstatus_to_exitcode(status), name)

    def _refuse(self, code: int, name: str) -> NoReturn:
        """Raise what the guest's exit code means; it has said the details on standard error."""
        for fd in (self._gate, self._json):
            if fd is not None:
                os.close(fd)
        if code == CapabilityError.exit_code:
            raise CapabilityError(f"guest {name} cannot run on this machine", "see the line above")
        if code == UsageError.exit_code:
            raise UsageError(f"guest {name} was not started, see above")
        raise CapabilityError(f"guest {name} ended before it ran, exit code {code}")

    def _start_command(self) -> None:
        """Fork a child that executes the command once it is released."""
        user = None if self.spec.as_root else invoking_user()
        if shutil.which(self.spec.command[0]) is None:
            raise UsageError(f"{self.spec.command[0]}: command not found")
        gate_read, gate_write = os.pipe()
        error_read, error_write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(gate_write)
            _exec_command(self.spec, gate_read, error_write, user)
        os.close(gate_read)
        os.close(error_write)
        self._gate, self._exec_error = gate_write, error_read


def _process_of(pid: int | None) -> int:
    """Return the process (thread group) that task `pid` belongs to."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise UsageError(f"there is no process {pid}") from error
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["Tgid"])


def _default_signals() -> None:
    """Undo what Python and the recorder changed; ignored signals survive exec."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def _exec_guest(argv: list[str], keep: tuple[int, ...]) -> NoReturn:
    """In the child: become the bundled VMM, which dies with the recorder."""
    try:
        signal.set_wakeup_fd(-1)
        _default_signals()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the recorder, which then ends the guest
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        for fd in keep:
            os.set_inheritable(fd, True)
        os.execv(argv[0], argv)  # noqa: S606 (no shell is what we want)
    finally:
        os._exit(127)


def _exec_command(spec: TargetSpec, gate: int, error: int, user: tuple[int, int] | None) -> NoReturn:
    """In the child: wait for the gate, then become the command, as `user` if given."""
    try:
        signal.set_wakeup_fd(-1)
        _default_signals()
        if not os.read(gate, 1):
            os._exit(1)  # the recorder gave up
        try:
            if spec.output is not None:
                _apart(spec.output)
            if user is not None:
                _become(*user)
            os.execvp(spec.command[0], list(spec.command))  # noqa: S606 (no shell is what we want)
        except OSError as problem:
            os.write(error, str(problem.errno).encode())
    finally:
        os._exit(127)


def _apart(output: int) -> None:
    """Begin a session, read nothing, print to `output`."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, number in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(fd, number)


def _become(uid: int, gid: int) -> None:
    """Give up root for good."""
    try:
        entry = pwd.getpwuid(uid)
        os.initgroups(entry.pw_name, gid)
        os.environ.update(HOME=entry.pw_dir, USER=entry.pw_name, LOGNAME=entry.pw_name)
    except KeyError:  # a user without an entry has no further groups
        os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)


def _read_json(fd: int) -> dict[str, Any] | None:
    """Return the guest's JSON object; None if it wrote none."""
    text = os.pread(fd, os.fstat(fd).st_size, 0)
    try:
        value = json.loads(text) if text.strip() else None
    except ValueError:  # killed in the middle of it
        return None
    return value if isinstance(value, dict) else None
